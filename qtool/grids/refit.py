"""Scales that may still move once codes are chosen: what a grid offers to a refit under a Hessian.

Shapes: R = rows, w = columns that a scale reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Knob:
    """One number per row that can be turned.

    Args:
        direction: [w, R] float32, how the values of its columns change with it.
        move: takes the wanted changes [R] and returns those that the grid can store, having
            stored them.
    """

    direction: Tensor
    move: Callable[[Tensor], Tensor]


class Refit(Protocol):
    """The scales of a matrix whose codes stand, one group of columns after another."""

    def groups(self) -> Iterator[tuple[slice, Iterator[Knob]]]:
        """Yield columns and the knobs that reach just these; each sees what was moved before."""

    def parameters(self) -> Any:
        """Return the grid's parameters as they are now."""
