"""The compressed-tensors layout `pack-quantized`, as vLLM and transformers read it.

    weight[n, k] = weight_scale[n, k // g] * (q[n, k] - zero[n, k // g])

Stored per module: `weight_packed` I32, codes packed along C; `weight_scale` in the model's dtype;
`weight_shape` I64; and, unless symmetric, `weight_zero_point`: I32 packed along R, or one I8 for a
whole tensor. The package counts from -2**(bits - 1) and adds as much before it packs, so the packed
values are our codes and zero points; only the I8 is signed. Rows that do not fill whole words end
in zero bits.

Layout: https://github.com/neuralmagic/compressed-tensors (compressors/pack_quantized)
Shapes: R = out_features, C = in_features, G = groups along C (1 unless per group).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.bitpack import pack_words, unpack_words
from qtool.formats.compressed_tensors_config import write_config
from qtool.formats.compressed_tensors_layout import (
    BITS,
    GRANULARITIES,
    read_compressed_tensors,
    zero_layout,
)
from qtool.formats.integer_modules import DTYPE_NAMES, grid_of, groups, holdable, integer_grid
from qtool.formats.packed_layouts import REPAIR, words_for
from qtool.formats.protocol import Format, QuantizedModule, TensorLayout
from qtool.grids.integer import IntegerGrid, IntegerParameters
from qtool.grids.protocol import Grid, QuantizedTensor


class CompressedTensorsFormat:
    """Integer weights packed into 32-bit words, activations left alone."""

    name: str = "compressed-tensors"
    loads_in: tuple[str, ...] = ("vLLM", "transformers")

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the model's own dtype: readers dequantize to the dtype of the scales."""
        return model_dtype if model_dtype in DTYPE_NAMES else torch.float32

    def lowest_zero(self) -> int:
        """Return 0: zero points are stored as they are."""
        return 0

    def check(self, module: QuantizedModule) -> None:
        """Refuse what the layout cannot hold.

        Raises:
            UnsupportedError: other than integers of 4 or 8 bits.
            UsageError: the group size does not divide the row.
        """
        holdable(
            self.name, module, bits=BITS, granularities=GRANULARITIES, scales=tuple(DTYPE_NAMES)
        )

    def layout(self, module: QuantizedModule) -> dict[str, TensorLayout]:
        """Return the layout of `weight_packed`, `_scale`, `_shape` and, if any, `_zero_point`."""
        self.check(module)
        grid = integer_grid(module.grid)
        rows, columns = module.shape
        words = words_for(columns, grid.bits)
        scale = TensorLayout(DTYPE_NAMES[grid.scale_dtype], _scale_shape(grid, rows, columns))
        layout = {
            "weight_packed": TensorLayout("I32", (rows, words)),
            "weight_scale": scale,
            "weight_shape": TensorLayout("I64", (2,)),
        }
        if not grid.symmetric:
            layout["weight_zero_point"] = zero_layout(
                grid.granularity, grid.bits, rows, groups(grid, columns)
            )
        return {f"{module.name}.{part}": value for part, value in layout.items()}

    def pack(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that `layout` promised."""
        self.check(QuantizedModule(name, quantized.grid, quantized.shape))
        grid = integer_grid(quantized.grid)
        parameters: IntegerParameters = quantized.parameters
        scale = parameters.scale.to(grid.scale_dtype)
        per_tensor = grid.granularity == "tensor"
        tensors = {
            "weight_packed": pack_words(quantized.codes, grid.bits),
            "weight_scale": _one(name, scale) if per_tensor else scale.contiguous(),
            "weight_shape": torch.tensor(quantized.shape, dtype=torch.int64),
        }
        if not grid.symmetric and per_tensor:
            signed = _one(name, parameters.zero) - (grid.max_code + 1) // 2
            tensors["weight_zero_point"] = signed.to(torch.int8)
        elif not grid.symmetric:
            zeros = parameters.zero.to(torch.uint8)  # [R, G]
            tensors["weight_zero_point"] = pack_words(zeros.T, grid.bits).T.contiguous()
        return {f"{name}.{part}": value for part, value in tensors.items()}

    def unpack(self, name: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Rebuild a module.

        Raises:
            DamagedError: `weight_shape` contradicts the packed weight or its scales.
        """
        integers = integer_grid(grid)
        words = tensors[f"{name}.weight_packed"]
        rows, columns = (int(size) for size in tensors[f"{name}.weight_shape"])
        scale = tensors[f"{name}.weight_scale"].to(torch.float32)
        if words.shape != (rows, words_for(columns, integers.bits)) or scale.shape != _scale_shape(
            integers, rows, columns
        ):
            raise DamagedError(
                f"tensor {name}.weight_shape says {rows} x {columns}, but weight_packed is "
                f"{list(words.shape)} and weight_scale {list(scale.shape)}",
                REPAIR,
            )
        codes = unpack_words(words, integers.bits, columns)
        if integers.granularity == "tensor":
            scale = scale.expand(rows, 1)
        zero = torch.full_like(scale, float((integers.max_code + 1) // 2))
        if f"{name}.weight_zero_point" in tensors:
            found = _read_zeros(tensors[f"{name}.weight_zero_point"], integers, rows)
            if integers.symmetric and not torch.equal(found, zero):
                raise DamagedError(
                    f"tensor {name}.weight_zero_point is not all in the middle, though the weights "
                    "are declared symmetric",
                    REPAIR,
                )
            zero = found
        return QuantizedTensor(codes, IntegerParameters(scale.contiguous(), zero), grid)

    def config(self, modules: list[QuantizedModule], kept: list[str]) -> dict[str, Any]:
        """Return the configuration with one config group per distinct scheme."""
        return write_config(modules, kept)

    def grids(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorLayout]
    ) -> dict[str, Grid]:
        """Return the grid of every module that has a `weight_packed`.

        Raises:
            UnsupportedError, DamagedError: as `read_compressed_tensors`.
        """
        found = read_compressed_tensors(config, tensors)
        return {name: grid_of(module) for name, module in found.items()}


def _scale_shape(grid: IntegerGrid, rows: int, columns: int) -> tuple[int, ...]:
    return (1,) if grid.granularity == "tensor" else (rows, groups(grid, columns))


def _one(name: str, values: Tensor) -> Tensor:
    """The one value [1] of [R, 1] that are all equal.

    Raises:
        UnsupportedError: they are not.
    """
    if bool((values != values[0]).any()):
        raise UnsupportedError(
            f"{name}: its rows no longer share one scale", "use one scale per row or per group"
        )
    return values.flatten()[:1].clone()


def _read_zeros(zeros: Tensor, grid: IntegerGrid, rows: int) -> Tensor:
    """Zero points [R, G] float32 from words [w, G], or from signed bytes [1] or [R, G]."""
    if zeros.dtype == torch.int8:
        middle = (grid.max_code + 1) // 2
        return (zeros.to(torch.float32) + middle).expand(rows, -1).contiguous()
    return unpack_words(zeros.T, grid.bits, rows).T.to(torch.float32).contiguous()


COMPRESSED_TENSORS: Format = CompressedTensorsFormat()
