"""Round to nearest: the baseline every other method must beat.

Shapes: R = out_features, C = in_features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qtool.grids.protocol import Grid, QuantizedTensor
from qtool.methods.inverse_hessian import InverseHessian
from qtool.methods.protocol import Rounded, Rounding, RoundingOptions


def rtn(
    weight: Tensor,  # [R, C] float32; not modified
    inverse: InverseHessian | None,
    grid: Grid,
    parameters: Any,  # of the grid, already fitted to `weight`
    options: RoundingOptions,
) -> Rounded:
    """Round each weight to the nearest value of its own group's grid."""
    del inverse, options
    return Rounded(QuantizedTensor(grid.encode(weight, parameters), parameters, grid))


RTN = Rounding("rtn", frozenset(), rtn, "")
