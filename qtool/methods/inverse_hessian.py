"""The inverse of a damped Hessian as a product of triangles, made within one square.

With the columns turned round, H = M M^T by Cholesky. Turned back, M is an upper triangle V with
H = V V^T, so that  U = V^-1  is the upper triangle with  U^T U = H^-1  that GPTQ wants: one
factorization and one triangular inverse, 2/3 C^3 operations, where inverting first and factoring
the inverse takes 4/3 C^3 and five squares more.

Shapes: C = in_features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import NumericalError

DAMPING_STEP = 10.0
DAMPING_TRIES = 5
PANEL = 256  # columns that are factored or inverted at once


@dataclass(frozen=True)
class InverseHessian:
    """How an error in one column is passed on: all that roundings need to know of the inputs."""

    order: Tensor  # [C] int64, the columns in the order in which they are rounded
    factor: Tensor  # [C, C] float32, upper triangular U, rows and columns in that order
    damp_percent: float  # what was really added
    hessian: Tensor  # [C, C] float32, in its own order and without damping


def invert(hessian: Tensor, *, damp_percent: float, act_order: bool = False) -> InverseHessian:
    """Order the columns and factor the inverse of the damped Hessian.

    Args:
        hessian: [C, C] float32; not modified. An input that was never seen (zero on the diagonal)
            is decoupled: its weights are rounded to nearest and disturb no others.
        damp_percent: fraction of mean(diag H) added to the diagonal; multiplied by ten, up to
            five times, while H cannot be factored.
        act_order: order columns by falling diag H, else as they are.

    Returns:
        Upper-triangular U [C, C] with U^T U = (H + damping * mean(diag H) * I)^-1 in the order of
        the columns, and the fraction that was used.

    Raises:
        NumericalError: H is not finite or cannot be factored.
    """
    if not _finite(hessian):
        raise NumericalError(
            "the Hessian of the calibration inputs is not finite",
            "the model overflows on this text; try --device cpu or other calibration data",
        )
    order = (
        hessian.diagonal().argsort(descending=True, stable=True)
        if act_order
        else torch.arange(len(hessian), device=hessian.device)
    )
    turned = order.flip(0)
    mean = hessian.diagonal().mean()
    dead = (hessian.diagonal() == 0)[turned]
    damping = damp_percent
    for _ in range(DAMPING_TRIES + 1):
        square = hessian[turned[:, None], turned]
        diagonal = square.diagonal()
        diagonal[dead] = 1 if mean == 0 else mean
        diagonal += damping * mean
        if _factor(square):
            _invert_lower(square)
            _turn(square)
            if _finite(square):
                return InverseHessian(order, square, damping, hessian)
        damping = damping * DAMPING_STEP or 0.01
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {damping / DAMPING_STEP:g}",
        "use more calibration windows, or a larger --damp-percent",
    )


def _finite(square: Tensor) -> bool:
    """Return whether all numbers are finite, without another square to say of which."""
    return all(math.isfinite(end) for end in torch.aminmax(square))


def _factor(square: Tensor) -> bool:
    """Replace a symmetric matrix [C, C] by its lower Cholesky factor; return whether it has one."""
    for start in range(0, len(square), PANEL):
        stop = min(start + PANEL, len(square))
        panel = square[start:, start:stop]  # [C - start, B]
        panel.addmm_(square[start:, :start], square[start:stop, :start].T, alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(panel[: stop - start])
        if failed:
            return False
        panel[: stop - start] = lower
        below = panel[stop - start :]
        below.copy_(torch.linalg.solve_triangular(lower.T, below, upper=True, left=False))
    square.tril_()
    return True


def _invert_lower(square: Tensor) -> None:
    """Replace a lower triangular matrix [C, C] by its inverse.

    The inverse of [[A, 0], [B, D]] is [[A^-1, 0], [-D^-1 B A^-1, D^-1]].
    """
    size = len(square)
    if size <= PANEL:
        unit = torch.eye(size, dtype=square.dtype, device=square.device)
        square.copy_(torch.linalg.solve_triangular(square, unit, upper=False))
        return
    half = size // 2
    first, below, last = square[:half, :half], square[half:, :half], square[half:, half:]
    solved = torch.linalg.solve_triangular(last, below, upper=False)
    below.copy_(torch.linalg.solve_triangular(first, solved, upper=False, left=False).neg_())
    del solved
    _invert_lower(first)
    _invert_lower(last)


def _turn(square: Tensor) -> None:
    """Put rows and columns of a matrix [C, C] in the opposite order."""
    size = len(square)
    for start in range(0, size // 2, PANEL):
        stop = min(start + PANEL, size // 2)
        upper, lower = square[start:stop], square[size - stop : size - start]
        kept = upper.flip((0, 1))
        upper.copy_(lower.flip((0, 1)))
        lower.copy_(kept)
    if size % 2:
        square[size // 2] = square[size // 2].flip(0)
