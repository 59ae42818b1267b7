"""The axes transform and rounding: what a method needs, as data.

Shapes: R = out_features, C = in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from qtool.errors import UsageError
from qtool.grids.protocol import Grid, QuantizedTensor
from qtool.methods.inverse_hessian import InverseHessian
from qtool.registry import Registry


@dataclass(frozen=True)
class RoundingOptions:
    """Settings of the roundings; each reads what concerns it.

    Args:
        damp_percent: fraction of mean(diag H) added to the diagonal of the Hessian.
        act_order: round columns by falling diag H; with static groups it costs nothing later.
        sweeps: how often gptq visits all columns again; scales move between two of them.
        block_columns: columns updated eagerly; the rest wait for one matrix product.
    """

    damp_percent: float = 0.05
    act_order: bool = True
    sweeps: int = 3
    block_columns: int = 128


@dataclass(frozen=True)
class Rounded:
    """What a rounding gives back."""

    tensor: QuantizedTensor
    damp_percent: float | None = None  # what was really added, where damping is used at all
    damp_raised: bool = False  # whether that is more than was asked for


RoundFunction = Callable[
    [Tensor, InverseHessian | None, Grid, Any, RoundingOptions],
    Rounded,
]


@dataclass(frozen=True)
class Rounding:
    """A way to choose codes: `round(weight, inverse, grid, parameters, options)`.

    What it needs to know of the inputs is made once for all weights that read them.
    """

    name: str
    needs: frozenset[str]  # "hessian", or nothing
    round: RoundFunction
    paper: str


@dataclass(frozen=True)
class Method:
    """A recipe's method: an optional transform of the block, then a rounding."""

    name: str
    transform: Literal["awq"] | None
    rounding: str


METHODS = {
    "rtn": Method("rtn", None, "rtn"),
    "gptq": Method("gptq", None, "gptq"),
    "awq": Method("awq", "awq", "rtn"),
    "awq+gptq": Method("awq+gptq", "awq", "gptq"),
}

ROUNDINGS: Registry[Rounding] = Registry(
    "rounding", {"rtn": "qtool.methods.rtn:RTN", "gptq": "qtool.methods.gptq:GPTQ"}
)


def method_named(name: str) -> Method:
    """Return the method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}'", f"choose from: {', '.join(METHODS)}")
    return METHODS[name]
