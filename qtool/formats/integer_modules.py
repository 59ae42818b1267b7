"""What the integer dialects share: which modules they refuse, and how their headers are read.

Shapes: R = out_features, C = in_features, G = groups along C (1 unless per group).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.protocol import QuantizedModule, TensorLayout
from qtool.grids.integer import Granularity, IntegerGrid
from qtool.grids.protocol import Grid

SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}

REPAIR = "the file is truncated or was edited; download or quantize the model again"


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


def packed_modules(tensors: Mapping[str, TensorLayout], marker: str) -> list[str]:
    """Return the names of the modules that have a tensor called `<module>.<marker>`.

    Raises:
        DamagedError: there is none, although the configuration declares a quantized model.
    """
    suffix = f".{marker}"
    names = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    if not names:
        raise DamagedError(
            f"config.json declares a quantized model, but no tensor is called *{suffix}",
            "the configuration and the weights do not belong together; download the model again",
        )
    return names


def stored(tensors: Mapping[str, TensorLayout], name: str) -> TensorLayout:
    """Return the layout of tensor `name`.

    Raises:
        DamagedError: there is no such tensor.
    """
    if name not in tensors:
        raise DamagedError(f"tensor {name} is missing", REPAIR)
    return tensors[name]


def stored_matrix(tensors: Mapping[str, TensorLayout], name: str) -> tuple[int, int]:
    """Return rows and columns of the int32 matrix `name`.

    Raises:
        DamagedError: it is missing or something else.
    """
    layout = stored(tensors, name)
    if layout.dtype != "I32" or len(layout.shape) != 2:
        raise DamagedError(f"tensor {name} is {_shown(layout)}, not an I32 matrix", REPAIR)
    rows, columns = layout.shape
    return rows, columns


def expect(
    tensors: Mapping[str, TensorLayout], name: str, dtypes: Collection[str], shape: tuple[int, ...]
) -> str:
    """Return the dtype of tensor `name` after checking it.

    Raises:
        DamagedError: it is missing, or not of `shape` and one of `dtypes`.
    """
    layout = stored(tensors, name)
    if layout.dtype not in dtypes or layout.shape != shape:
        wanted = TensorLayout(" or ".join(dtypes), shape)
        raise DamagedError(
            f"tensor {name} is {_shown(layout)}; its configuration says {_shown(wanted)}", REPAIR
        )
    return layout.dtype


def setting(config: Mapping[str, Any], *keys: str) -> int:
    """Return the whole number that `config` holds under the first of `keys` it has.

    Raises:
        DamagedError: none of them is there, or it is not a whole number.
    """
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise DamagedError(
                f"config.json: quantization_config.{key} is {value!r}, not a whole number", REPAIR
            )
    raise DamagedError(f"config.json: quantization_config has no '{keys[0]}'", REPAIR)


def from_group_size(
    size: int,
    *,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    lowest_zero: int = 0,
) -> IntegerGrid:
    """Return the grid that a stored group size stands for; -1 means one scale per row.

    Raises:
        DamagedError: a group size that is neither -1 nor positive.
    """
    if size != -1 and size <= 0:
        raise DamagedError(f"config.json: a group size of {size} means nothing", REPAIR)
    grid = IntegerGrid(
        bits=bits, symmetric=symmetric, scale_dtype=scale_dtype, lowest_zero=lowest_zero
    )
    return replace(grid, granularity="channel") if size == -1 else replace(grid, group_size=size)


def _shown(layout: TensorLayout) -> str:
    return f"{layout.dtype} {list(layout.shape)}"
