"""ggml's block types as bytes: pack, unpack and dequantize rows.

A row is a sequence of blocks and a block is a sequence of fields, which BLOCKS lists in storage
order. Source: ggml-common.h and ggml-quants.c of llama.cpp b11549.

Shapes: R = rows, C = columns. Bytes are uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.ggml_fields import (
    LANE,
    Blocks,
    EightSixBitScales,
    Field,
    FifthBits,
    Half,
    Plane,
    ScaleBytes,
    ScaleOffsetNibbles,
    ScaleOffsetSixBits,
    SignedBytes,
    SixteenSixBitScales,
)
from qtool.ggml_types import GGML_TYPES
from qtool.grids.ggml import LAYOUTS, GgmlGrid
from qtool.grids.ggml_parameters import BlockParameters
from qtool.grids.protocol import QuantizedTensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES_AT_ONCE = 1 << 17  # with what is derived from them they stay in the cache


D, MIN = Half("scale"), Half("offset")
BLOCKS: dict[str, tuple[Field, ...]] = {
    "Q8_0": (D, SignedBytes()),
    "Q4_0": (D, Plane(0, 4, 2)),
    "Q4_1": (D, MIN, Plane(0, 4, 2)),
    "Q5_0": (D, FifthBits(), Plane(0, 4, 2)),
    "Q5_1": (D, MIN, FifthBits(), Plane(0, 4, 2)),
    "Q2_K": (ScaleOffsetNibbles(), Plane(0, 2, 4), D, MIN),
    "Q3_K": (Plane(2, 1, 4), Plane(0, 2, 4), SixteenSixBitScales(), D),
    "Q4_K": (D, MIN, ScaleOffsetSixBits(), Plane(0, 4, 4)),
    "Q5_K": (D, MIN, ScaleOffsetSixBits(), Plane(4, 1, 4), Plane(0, 4, 4)),
    "Q6_K": (Plane(0, 4, 8), Plane(4, 2, 4), ScaleBytes(), D),
    "IQ4_NL": (D, Plane(0, 4, 2)),
    "IQ4_XS": (D, EightSixBitScales(), Plane(0, 4, 2)),
}


def pack(quantized: QuantizedTensor) -> Tensor:
    """Return the bytes [R, row bytes] of a tensor on a GgmlGrid."""
    name, (rows, columns) = quantized.grid.name, quantized.shape
    kind, parameters = GGML_TYPES[name], quantized.parameters
    device = quantized.codes.device
    stored = torch.empty(
        (rows, columns // kind.block * kind.block_bytes), dtype=torch.uint8, device=device
    )
    for start, stop in _row_parts(rows, columns):
        part = quantized.grid.rows(parameters, start, stop)
        blocks = _blocks(name, quantized.codes[start:stop], part)
        fields = [field.write(blocks).contiguous().view(torch.int16) for field in BLOCKS[name]]
        stored[start:stop].view(-1, kind.block_bytes).view(torch.int16).copy_(
            torch.cat(fields, dim=1)
        )
    return stored


def unpack(name: str, data: Tensor, columns: int) -> QuantizedTensor:
    """Rebuild what `pack` was given from the bytes [R, row bytes] of type `name`.

    Any bytes are accepted: scales may come out infinite or NaN.

    Raises:
        DamagedError: rows of `columns` weights have another number of bytes.
    """
    grid, kind = GgmlGrid(name), GGML_TYPES[name]
    rows = len(data)
    _check_width(name, data, columns)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=data.device)
    found: list[BlockParameters] = []
    for start, stop in _row_parts(rows, columns):
        stored = data[start:stop].reshape(-1, kind.block_bytes)
        blocks = _empty_blocks(kind.block, stored)
        first = 0
        for field in BLOCKS[name]:
            last = first + field.size(kind.block, grid.layout.sub)
            field.read(_copied(stored[:, first:last]), blocks)
            first = last
        codes[start:stop] = blocks.lanes.view(torch.uint8).view(-1, columns)
        found.append(_parameters(name, blocks, stop - start))
    if not found:
        found = [_parameters(name, _empty_blocks(kind.block, data.view(0, kind.block_bytes)), 0)]
    return QuantizedTensor(codes, grid.join(found), grid)


def dequantize(name: str, data: Tensor, columns: int) -> Tensor:
    """Return the weights [R, C] float32 that the bytes [R, row bytes] of type `name` stand for.

    Raises:
        DamagedError: rows of `columns` weights have another number of bytes.
        UnsupportedError: nothing here can read the type.
    """
    _check_width(name, data, columns)
    if name in BLOCKS:
        return unpack(name, data, columns).dequantize()
    if name in FLOATS:
        return _copied(data).view(FLOATS[name]).to(torch.float32)
    import gguf
    import numpy as np

    try:
        with np.errstate(all="ignore"):  # whoever asks looks for what is not finite
            values = gguf.dequantize(data.cpu().numpy(), gguf.GGMLQuantizationType[name])
    except (KeyError, NotImplementedError) as error:
        raise UnsupportedError(
            f"tensors of type {name} cannot be read",
            f"types that can: {', '.join((*BLOCKS, *FLOATS))}",
        ) from error
    return torch.from_numpy(values).to(data.device)


def _check_width(name: str, data: Tensor, columns: int) -> None:
    kind = GGML_TYPES[name]
    if columns % kind.block or data.shape[1] != columns // kind.block * kind.block_bytes:
        raise DamagedError(
            f"{data.shape[1]} bytes are not a row of {columns} weights of type {name}",
            "download the file again",
        )


def _copied(data: Tensor) -> Tensor:
    """Copy bytes to where they may be looked at as wider types."""
    return data.clone(memory_format=torch.contiguous_format)


def is_finite(name: str, data: Tensor) -> bool:
    """Return whether bytes [R, row bytes] of a block type of ours hold finite numbers only.

    Codes and integers always are finite: only the fp16 numbers are looked at.
    """
    kind, layout = GGML_TYPES[name], LAYOUTS[name]
    blocks = data.reshape(-1, kind.block_bytes)
    start = 0
    for field in BLOCKS[name]:
        size = field.size(kind.block, layout.sub)
        if isinstance(field, Half):
            halves = blocks[:, start : start + size].contiguous().view(torch.float16)
            if not bool(torch.isfinite(halves).all()):
                return False
        start += size
    return True


def _row_parts(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, CODES_AT_ONCE // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _blocks(name: str, codes: Tensor, parameters: BlockParameters) -> Blocks:
    layout, block = LAYOUTS[name], GGML_TYPES[name].block
    least = layout.scales[0] if layout.scales else 0
    subs = block // layout.sub
    flat = codes.reshape(-1)
    if flat.storage_offset() % LANE:
        flat = _copied(flat)
    return Blocks(
        flat.view(torch.int64).reshape(-1, block // LANE),
        parameters.super_scale.to(torch.float16).reshape(-1),
        parameters.super_offset.to(torch.float16).reshape(-1),
        (parameters.scales - least).to(torch.uint8).reshape(-1, subs),
        parameters.offsets.to(torch.uint8).reshape(-1, subs),
    )


def _empty_blocks(block: int, stored: Tensor) -> Blocks:
    lanes = stored.new_zeros((len(stored), block // LANE), dtype=torch.int64)
    nothing = stored.new_empty((0, 1))
    return Blocks(lanes, nothing[:, 0].half(), nothing[:, 0].half(), nothing, nothing)


def _parameters(name: str, blocks: Blocks, rows: int) -> BlockParameters:
    scales = LAYOUTS[name].scales
    least = scales[0] if scales else 0

    def of_rows(values: Tensor) -> Tensor:
        # -1 would be ambiguous where there is nothing.
        return values.to(torch.float32).reshape(rows, values.numel() // rows if rows else 0)

    return BlockParameters(
        of_rows(blocks.scale),
        of_rows(blocks.offset),
        of_rows(blocks.scales).add_(least),
        of_rows(blocks.offsets),
    )
