"""What the integer dialects share: which modules they refuse, and what grid a header stands for.

Shapes: R = out_features, C = in_features, G = groups along C (1 unless per group).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from qtool.errors import UnsupportedError
from qtool.formats.packed_layouts import PackedIntegers
from qtool.formats.protocol import QuantizedModule
from qtool.grids.integer import Granularity, IntegerGrid
from qtool.grids.protocol import Grid

SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


def holdable(
    dialect: str,
    module: QuantizedModule,
    *,
    bits: Collection[int],
    granularities: Collection[Granularity],
    scales: Collection[torch.dtype],
) -> IntegerGrid:
    """Return the module's grid if the dialect can hold it.

    Raises:
        UnsupportedError: another kind of grid, other bits, granularity or scales than those named.
        UsageError: the group size does not divide the row.
    """
    grid = module.grid
    widths = ", ".join(map(str, sorted(bits)))
    if not isinstance(grid, IntegerGrid) or grid.bits not in bits:
        raise UnsupportedError(
            f"{module.name}: the {dialect} format cannot hold {grid.name}",
            f"it holds integers of {widths} bits",
        )
    if grid.granularity not in granularities:
        raise UnsupportedError(
            f"{module.name}: the {dialect} format has no scale per {grid.granularity}",
            "use one scale per row (--group-size -1) or per group (--group-size 128); "
            "compressed-tensors holds one scale per tensor",
        )
    if grid.scale_dtype not in scales:
        names = " or ".join(DTYPE_NAMES[dtype] for dtype in scales)
        raise UnsupportedError(
            f"{module.name}: the {dialect} format cannot store scales as {grid.scale_dtype}",
            f"fit the grid with scales of {names}",
        )
    grid.check_row(module.shape[1])
    return grid


def integer_grid(grid: Grid) -> IntegerGrid:
    """Return `grid` as the integer grid that a format was promised by `check` or `grids`."""
    if not isinstance(grid, IntegerGrid):
        raise UnsupportedError(f"{grid.name} is not an integer grid", "choose another format")
    return grid


def groups(grid: IntegerGrid, columns: int) -> int:
    """Return G for a row of `columns` weights."""
    return columns // grid.width(columns)


def grid_of(found: PackedIntegers) -> IntegerGrid:
    """Return the grid of a module as its headers describe it."""
    grid = IntegerGrid(
        bits=found.bits,
        symmetric=found.symmetric,
        granularity=found.granularity,
        scale_dtype=SCALE_DTYPES[found.scales],
        lowest_zero=found.lowest_zero,
    )
    return grid if found.group_size is None else replace(grid, group_size=found.group_size)
