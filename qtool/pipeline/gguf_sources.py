"""Where the tensors of a GGUF file come from: a directory of any format, or another GGUF.

A source gives a tensor's bytes as they are where its values exist on the wanted grid already, and
its float32 rows otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.reader import TensorReader, check_finite
from qtool.formats.ggml_blocks import pack
from qtool.formats.reading import DenseSource
from qtool.ggml_types import FLOAT_TYPES
from qtool.grids.ggml import GgmlGrid
from qtool.grids.ggml_parameters import BlockParameters
from qtool.grids.integer import IntegerGrid, IntegerParameters
from qtool.grids.protocol import Grid, QuantizedTensor
from qtool.model.conversion import ConvertedTensor, row_order
from qtool.pipeline.gguf_rows import gguf_rows, source_rows

# Symmetric integers are these types of ggml where one scale covers whole blocks of 32.
BLOCK = 32
SAME_CODES = {4: "Q4_0", 8: "Q8_0"}


class TensorSource(Protocol):
    """What a GGUF writer is filled from."""

    def kind(self, converted: ConvertedTensor) -> str:
        """Return the ggml type that holds the tensor's values exactly, F32 if nothing less does."""

    def carried(self, converted: ConvertedTensor, kind: str) -> Iterator[Tensor] | None:
        """Yield the tensor's bytes as type `kind` without rounding again; None if that is more."""

    def rows(self, converted: ConvertedTensor) -> Iterator[Tensor]:
        """Yield the tensor's float32 rows."""


def same_codes(grid: Grid, columns: int) -> str | None:
    """Return the ggml type that holds an integer grid's codes, None if there is none.

    It holds the values too, if float16 holds the scales.
    """
    if not isinstance(grid, IntegerGrid) or not grid.symmetric or grid.bits not in SAME_CODES:
        return None
    fits = grid.width(columns) % BLOCK == 0 and columns % BLOCK == 0
    return SAME_CODES[grid.bits] if fits else None


def as_blocks(quantized: QuantizedTensor, kind: str) -> QuantizedTensor:
    """Write symmetric integers as Q4_0 or Q8_0: the same codes, each scale repeated."""
    parameters = quantized.parameters
    if not isinstance(parameters, IntegerParameters):
        raise TypeError(f"{quantized.grid.name} is not an integer grid")
    columns = quantized.shape[1]
    repeats = columns // BLOCK // parameters.scale.shape[1]
    scale = parameters.scale.repeat_interleave(repeats, dim=1)
    empty = scale[:, :0]
    grid = GgmlGrid(kind)
    # A grid's first code need not stand for the same level as its namesake's.
    shift = int(-(2 ** (quantized.grid.bits - 1)) - grid.layout.levels[0])
    codes = (quantized.codes.to(torch.int16) + shift).clamp_(0).to(torch.uint8)
    return QuantizedTensor(codes, BlockParameters(scale, empty, empty, empty), grid)


class DirectorySource:
    """Tensors of a model directory, float or packed.

    Args:
        source: open on the directory.
        refs: its logical tensors.
    """

    def __init__(self, source: DenseSource, refs: Mapping[str, TensorRef]) -> None:
        self._source = source
        self._refs = refs
        self._exact: dict[str, bool] = {}

    def kind(self, converted: ConvertedTensor) -> str:
        """Return the type that holds the tensor exactly."""
        if converted.source is None:
            return "F32"
        module = converted.source.removesuffix(".weight")
        grid = self._source.grids.get(module)
        if grid is not None:
            same = same_codes(grid, converted.shape[-1])
            return same if same and self._half_scales(module) else f"packed {grid.name}"
        dtype = self._refs[converted.source].dtype
        return dtype if dtype in FLOAT_TYPES and not converted.offset else "F32"

    def _half_scales(self, module: str) -> bool:
        """Return whether float16, as ggml's blocks want it, holds all scales of a module.

        Those of bfloat16 have fewer digits than float16 and nearly always fit its range.
        """
        if module not in self._exact:
            scales = self._source.scales(module)
            exact = torch.equal(scales.to(torch.float16).to(scales.dtype), scales)
            self._exact[module] = scales.dtype == torch.float16 or exact
        return self._exact[module]

    def carried(self, converted: ConvertedTensor, kind: str) -> Iterator[Tensor] | None:
        """Yield packed integers as the same integers in ggml's blocks."""
        module = (converted.source or "").removesuffix(".weight")
        if kind in FLOAT_TYPES or module not in self._source.grids or self.kind(converted) != kind:
            return None
        return self._blocks(converted, module, kind)

    def _blocks(self, converted: ConvertedTensor, module: str, kind: str) -> Iterator[Tensor]:
        quantized = as_blocks(self._source.quantized(module), kind)
        if converted.permuted_heads:
            order = torch.as_tensor(row_order(quantized.shape[0], converted.permuted_heads))
            quantized = quantized.select_rows(order)
        yield pack(quantized)

    def rows(self, converted: ConvertedTensor) -> Iterator[Tensor]:
        """Yield float32 rows, unpacked where they are packed."""
        return source_rows(self._source, converted)


class GgufSource:
    """Tensors of a GGUF file, whose names and order of rows are the wanted ones already.

    Args:
        refs: its tensors by name.
        reader: open on them.
    """

    def __init__(self, refs: Mapping[str, TensorRef], reader: TensorReader) -> None:
        self._refs = refs
        self._reader = reader

    def kind(self, converted: ConvertedTensor) -> str:
        """Return the type of the tensor in the file."""
        return self._refs[converted.name].dtype

    def carried(self, converted: ConvertedTensor, kind: str) -> Iterator[Tensor] | None:
        """Yield the bytes of a tensor that has the wanted type already."""
        return self._bytes(converted) if self.kind(converted) == kind else None

    def _bytes(self, converted: ConvertedTensor) -> Iterator[Tensor]:
        for _ in self.rows(converted):  # a damaged file is not passed on
            pass
        for piece in self._reader.chunks(converted.name):
            yield torch.frombuffer(piece, dtype=torch.uint8)

    def rows(self, converted: ConvertedTensor) -> Iterator[Tensor]:
        """Yield float32 rows, dequantized.

        Raises:
            NumericalError: a value is not finite.
        """
        ref = self._refs[converted.name]
        for part in gguf_rows(ref):
            check_finite(converted.name, part, ref.file)
            yield part
