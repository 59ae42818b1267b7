"""Sums over calibration inputs of one tap: mean |x|, mean x^2, Hessian, and products with a twin.

Shapes: T = tokens, C = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtool.device import ROWS_AT_ONCE, add_products, mirror

Statistic = Literal["diagonal", "hessian"]


@dataclass(frozen=True)
class Moments:
    """Statistics of the inputs x~ of one tap, and their products with the float model's x."""

    tokens: int
    mean_abs: Tensor  # [C] float32, mean |x~|
    diagonal: Tensor  # [C] float32, mean x~^2
    hessian: Tensor | None = None  # [C, C] float32, mean x~ x~^T
    cross: Tensor | None = None  # [C, C] float32, mean x~ x^T

    @property
    def second(self) -> Tensor:
        """The Hessian where it is known, else its diagonal."""
        return self.diagonal if self.hessian is None else self.hessian


class MomentSums:
    """Adds up batches of one tap's inputs.

    Args:
        columns: C.
        device: where the sums live.
        hessian: whether to sum x~ x~^T.
        cross: whether to sum x~ x^T; `add` then needs the twin inputs. Needs `hessian`.
        absolute: whether to sum |x~|; zero in the result otherwise.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device,
        *,
        hessian: bool,
        cross: bool = False,
        absolute: bool = True,
    ) -> None:
        self._tokens = 0
        self._absolute = torch.zeros(columns, device=device) if absolute else None
        self._squares = torch.zeros(columns, device=device)
        square = (columns, columns)
        self._hessian = torch.zeros(square, device=device) if hessian else None
        self._cross = torch.zeros(square, device=device) if cross else None

    def add(self, inputs: Tensor, twin: Tensor | None = None) -> None:
        """Add inputs [T, C], and the float model's inputs [T, C] at the same tokens."""
        self._tokens += inputs.shape[0]
        if self._absolute is not None:
            for part in inputs.split(ROWS_AT_ONCE):
                self._absolute += part.abs().sum(dim=0, dtype=torch.float32)
        if self._hessian is None:
            for part in inputs.split(ROWS_AT_ONCE):
                self._squares += part.to(torch.float32).square().sum(dim=0)
        elif self._cross is not None and twin is None:
            raise TypeError("cross products need the float model's inputs")
        else:
            add_products(self._hessian, self._cross, inputs, twin)

    def result(self) -> Moments:
        """Return the means; the sums must not be added to afterwards."""
        count = max(self._tokens, 1)
        hessian = None if self._hessian is None else mirror(self._hessian).div_(count)
        diagonal = self._squares / count if hessian is None else hessian.diagonal().clone()
        cross = None if self._cross is None else self._cross.div_(count)
        absolute = torch.zeros_like(diagonal) if self._absolute is None else self._absolute / count
        return Moments(self._tokens, absolute, diagonal, hessian, cross)
