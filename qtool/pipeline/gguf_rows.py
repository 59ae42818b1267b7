"""Turn a checkpoint's tensors into a GGUF's bytes, some rows at a time.

Shapes: R = rows, C = columns; a vector counts as one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.reader import CHUNK_BYTES, TensorReader, check_finite
from qtool.errors import NumericalError
from qtool.formats.ggml_blocks import dequantize, is_finite, pack
from qtool.formats.reading import DenseSource
from qtool.ggml_types import GGML_TYPES
from qtool.grids.ggml import LAYOUTS, GgmlGrid
from qtool.grids.ggml_parameters import FP16_MAX, BlockParameters
from qtool.grids.protocol import QuantizedTensor
from qtool.model.conversion import ConvertedTensor, row_order

WEIGHTS_AT_ONCE = 1 << 22  # 16 MiB in float32
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def source_rows(source: DenseSource, converted: ConvertedTensor) -> Iterator[Tensor]:
    """Yield the float32 rows of a tensor as a GGUF holds them, from a checkpoint.

    Raises:
        DamagedError: the source cannot be read.
        NumericalError: a value is not finite.
    """
    if converted.source is None:
        yield torch.tensor(converted.values, dtype=torch.float32).reshape(converted.shape)
        return
    if converted.permuted_heads or len(converted.shape) == 1:
        file = source.file(converted.source)
        yield stored_rows(converted, source.read(converted.source), file)
        return
    rows, columns = converted.shape
    step = max(1, WEIGHTS_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = source.rows(converted.source, start, min(start + step, rows))
        check_finite(converted.source, part, source.file(converted.source))
        yield _moved(converted, part)


def gguf_rows(ref: TensorRef) -> Iterator[Tensor]:
    """Yield the float32 rows [r, C] of a tensor of a GGUF file, dequantized.

    Raises:
        DamagedError: the file ends too early.
        UnsupportedError: a type that nothing here reads.
    """
    columns = ref.shape[-1] if ref.shape else 1
    rows = ref.n_elements // columns
    width = GGML_TYPES[ref.dtype].n_bytes((1, columns))
    step = max(1, WEIGHTS_AT_ONCE // columns)
    with TensorReader({ref.name: ref}) as reader:
        for start in range(0, rows, step):
            count = min(step, rows - start)
            raw = reader.raw(ref.name, start * width, count * width)
            yield dequantize(ref.dtype, raw.reshape(count, width), columns)


def reads_back_finite(ref: TensorRef) -> bool:
    """Return whether all bytes of a GGUF's tensor are there and stand for finite numbers.

    Raises:
        DamagedError: the file ends too early.
    """
    if ref.dtype not in LAYOUTS:
        return all(
            bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()) for part in gguf_rows(ref)
        )
    width = GGML_TYPES[ref.dtype].block_bytes
    step = max(1, CHUNK_BYTES // width) * width
    with TensorReader({ref.name: ref}) as reader:
        return all(
            is_finite(ref.dtype, reader.raw(ref.name, start, min(step, ref.n_bytes - start)))
            for start in range(0, ref.n_bytes, step)
        )


def stored_rows(converted: ConvertedTensor, tensor: Tensor, file: Path | None = None) -> Tensor:
    """Return a whole tensor of the checkpoint, any float dtype, as the GGUF holds it in float32.

    Raises:
        NumericalError: a value is not finite.
    """
    check_finite(str(converted.source), tensor, file)
    if converted.permuted_heads:
        tensor = tensor[torch.as_tensor(row_order(tensor.shape[0], converted.permuted_heads))]
    return _moved(converted, tensor[: converted.shape[0]])


def _moved(converted: ConvertedTensor, tensor: Tensor) -> Tensor:
    values = tensor.to(torch.float32)
    return values + converted.offset if converted.offset else values


def encoded(name: str, kind: str, rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return the bytes, uint8, of float32 rows [R, C] or [C] as tensor type `kind` stores them.

    Args:
        name: for messages.
        kind: a float type, or one of ggml's block types.
        rows: not modified.
        importance: [C], weight of each column's squared error.

    Raises:
        NumericalError: a value that F16 cannot hold.
    """
    if kind in FLOATS:
        stored = rows.to(FLOATS[kind]).contiguous()
        if kind == "F16" and not bool(torch.isfinite(stored).all()):
            raise NumericalError(
                f"tensor '{name}' has values beyond what F16 holds",
                "choose BF16 or F32 for it, or a quantized type",
            )
        return stored.view(torch.uint8)
    grid = GgmlGrid(kind)
    parameters = grid.fit(rows, importance)
    return packed(name, QuantizedTensor(grid.encode(rows, parameters), parameters, grid))


def packed(name: str, quantized: QuantizedTensor) -> Tensor:
    """Return the bytes, uint8, of a tensor on one of ggml's grids.

    Raises:
        NumericalError: scales are the largest that float16 holds, so weights were cut off.
    """
    parameters, kind = quantized.parameters, quantized.grid.name
    if isinstance(parameters, BlockParameters):
        for scales in (parameters.super_scale, parameters.super_offset):
            if scales.numel() and float(scales.abs().max()) >= FP16_MAX:
                raise NumericalError(
                    f"tensor '{name}' has values beyond what {kind} holds",
                    "choose BF16 or F32 for it, with --override; the model may be damaged",
                )
    return pack(quantized)
