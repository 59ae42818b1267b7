"""ggml's block types as grids: Q8_0, the K-quants, IQ4 and the legacy types.

    weight ~= scale * level[code] - offset

`scale` and `offset` belong to a sub-block of 16 or 32 weights of a row. In the K-quants and IQ4_XS
they are small integers times one fp16 number for each block of 256; elsewhere they are fp16
themselves. All of them are fixed, as the file will hold them, *before* codes are chosen: so a
column can be rounded at any time and in any order, which is what error feedback needs.

Layouts: ggml-common.h of llama.cpp; `qtool/formats/ggml_blocks.py` packs them.
Shapes: R = rows, C = columns, B = C / block, S = C / sub.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.ggml_types import GGML_TYPES
from qtool.grids.ggml_affine import fit_affine
from qtool.grids.ggml_levels import levels_of, nearest_codes, to_bytes
from qtool.grids.ggml_parameters import BlockParameters, GgmlLayout
from qtool.grids.ggml_refit import GgmlRefit
from qtool.grids.ggml_symmetric import fit_symmetric

# Values that the codes of IQ4_NL and IQ4_XS stand for, before scaling.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
ROWS_AT_ONCE_WEIGHTS = 1 << 18  # 1 MiB of float32: a row chunk and its codes stay in the cache


def _evenly(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1))


LAYOUTS = {
    layout.name: layout
    for layout in (
        # No writer has used -128 yet, and kernels that move signs from one factor to the other
        # overflow there: it is read, but never chosen.
        GgmlLayout("Q8_0", 32, _evenly(-128, 127), least_code=1),
        GgmlLayout("Q4_0", 32, _evenly(-8, 7)),
        GgmlLayout("Q5_0", 32, _evenly(-16, 15)),
        GgmlLayout("Q4_1", 32, _evenly(0, 15), offset="float"),
        GgmlLayout("Q5_1", 32, _evenly(0, 31), offset="float"),
        GgmlLayout("Q2_K", 16, _evenly(0, 3), (0, 15), offset="integer"),
        GgmlLayout("Q3_K", 16, _evenly(-4, 3), (-32, 31)),
        GgmlLayout("Q4_K", 32, _evenly(0, 15), (0, 63), offset="integer"),
        GgmlLayout("Q5_K", 32, _evenly(0, 31), (0, 63), offset="integer"),
        GgmlLayout("Q6_K", 16, _evenly(-32, 31), (-128, 127)),
        GgmlLayout("IQ4_NL", 32, IQ4_LEVELS),
        GgmlLayout("IQ4_XS", 32, IQ4_LEVELS, (-32, 31)),
    )
}


@dataclass(frozen=True)
class GgmlGrid:
    """One block type of ggml.

    Args:
        name: of the type, such as `Q4_K`.
        search: choose scales by least (importance-weighted) squared error, not by the range.
    """

    name: str
    search: bool = True
    layout: GgmlLayout = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", LAYOUTS[self.name])

    @property
    def bits(self) -> int:
        """Bits of one code, without scales."""
        return (len(self.layout.levels) - 1).bit_length()

    def check_row(self, columns: int) -> None:
        """Refuse a row that is not whole blocks.

        Raises:
            UsageError: names the block size.
        """
        block = GGML_TYPES[self.name].block
        if columns % block:
            raise UsageError(
                f"{self.name} stores {block} weights together, which does not divide a row of "
                f"{columns}",
                "choose a type with blocks of 32, such as Q5_0 or Q8_0",
            )

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Return bits per weight, scales included; the same for every shape."""
        del rows, columns
        return GGML_TYPES[self.name].bits_per_weight

    def plain(self) -> GgmlGrid:
        """Return the grid with scales from the range of each sub-block alone."""
        return replace(self, search=False)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> BlockParameters:
        """Choose scales and offsets for weight [R, C] float32.

        Args:
            weight: not modified.
            importance: [C] float32 >= 0, weight of each column's squared error; without it all
                columns count the same.
        """
        self.check_row(weight.shape[1])
        fit = fit_symmetric if self.layout.offset == "none" else fit_affine
        return fit(weight, importance, self.layout, search=self.search)

    def encode(self, weight: Tensor, parameters: BlockParameters) -> Tensor:
        """Return uint8 codes [R, C] of the nearest values to weight [R, C] float32."""
        rows, columns = weight.shape
        inverse = parameters.inverse_scale(self.layout)[:, :, None]
        shifted = self.layout.offset != "none"
        offset = parameters.offset(self.layout)[:, :, None] if shifted else None
        codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
        for part in _row_parts(rows, columns):
            blocks = weight[part].reshape((*inverse[part].shape[:2], -1))
            scaled = blocks * inverse[part] if offset is None else blocks + offset[part]
            if offset is not None:
                scaled.mul_(inverse[part])
            codes[part] = to_bytes(self._nearest(scaled)).view(-1, columns)
        return codes

    def _nearest(self, scaled: Tensor) -> Tensor:
        """Return codes (any dtype, integer-valued) of values in units of the scale."""
        return nearest_codes(scaled, self.layout)

    def decode(self, codes: Tensor, parameters: BlockParameters) -> Tensor:
        """Return the values [R, C] float32 that codes [R, C] uint8 stand for."""
        rows, columns = codes.shape
        scale, offset = parameters.scale(self.layout), parameters.offset(self.layout)
        values = torch.empty((rows, columns), device=codes.device)
        for part in _row_parts(rows, columns):
            levels = self._levels(codes[part]).reshape((*scale[part].shape, -1))
            values[part] = (
                (levels * scale[part, :, None]).sub_(offset[part, :, None]).reshape(-1, columns)
            )
        return values

    def _levels(self, codes: Tensor) -> Tensor:
        """Return the float32 levels of codes of any integer-valued dtype."""
        return levels_of(codes, self.layout)

    def columns(self, parameters: BlockParameters) -> GgmlColumns:
        """Return a rounder of single columns."""
        return GgmlColumns(self, parameters)

    def refit(self, codes: Tensor, parameters: BlockParameters) -> GgmlRefit:
        """Return the scales and offsets for a refit while codes [R, C] uint8 stay."""
        return GgmlRefit(codes, parameters, self.layout)

    def join(self, parts: list[BlockParameters]) -> BlockParameters:
        """Stack the parameters of several matrices along R."""
        return BlockParameters(
            *(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(BlockParameters))
        )

    def rows(self, parameters: BlockParameters, start: int, stop: int) -> BlockParameters:
        """Return the parameters of rows `start` to `stop`."""
        return BlockParameters(
            *(getattr(parameters, f.name)[start:stop] for f in fields(BlockParameters))
        )


class GgmlColumns:
    """Rounds single columns; keeps scales transposed so that a column's are contiguous."""

    def __init__(self, grid: GgmlGrid, parameters: BlockParameters) -> None:
        self._grid = grid
        self._sub = grid.layout.sub
        self._scale = parameters.scale(grid.layout).T.contiguous()  # [S, R]
        self._inverse = parameters.inverse_scale(grid.layout).T.contiguous()
        self._offset = parameters.offset(grid.layout).T.contiguous()

    def encode(self, column: Tensor, index: int) -> Tensor:
        """Return integer-valued float32 codes [R] of column `index`."""
        group = index // self._sub
        scaled = (column + self._offset[group]).mul_(self._inverse[group])
        return self._grid._nearest(scaled).to(torch.float32)

    def decode(self, codes: Tensor, index: int) -> Tensor:
        """Return the values [R] float32 of column `index`."""
        group = index // self._sub
        return self._grid._levels(codes).mul_(self._scale[group]).sub_(self._offset[group])


def _row_parts(rows: int, columns: int) -> list[slice]:
    step = max(1, ROWS_AT_ONCE_WEIGHTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
