"""GPTQ: round one column at a time, let the columns not yet rounded absorb the error.

Minimises  tr((W - Q) H (W - Q)^T)  with  H = mean of x x^T  over calibration inputs x.

Paper: Frantar et al., "GPTQ", ICLR 2023, https://arxiv.org/abs/2210.17323, algorithm 1.
Here all parameters of a row are fitted first, so columns can go in any order and no index of
groups has to be stored (act-order on static groups).

Shapes: R = out_features, C = in_features, B = columns of one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.errors import NumericalError
from qtool.grids.protocol import ColumnRounder, Grid, QuantizedTensor
from qtool.methods.descent import descend
from qtool.methods.protocol import Rounded, Rounding, RoundingOptions

DAMPING_STEP = 10.0
DAMPING_TRIES = 5


@dataclass(frozen=True)
class Feedback:
    """How an error in one column is passed on: all that GPTQ needs to know of the inputs."""

    order: Tensor  # [C] int64, the columns in the order in which they are rounded
    factor: Tensor  # [C, C] float32, upper triangular, rows and columns in that order
    damp_percent: float  # what was really added
    hessian: Tensor  # [C, C] float32, in its own order and without damping


def prepare(hessian: Tensor | None, options: RoundingOptions) -> Feedback:
    """Order the columns and factor the inverse Hessian [C, C], once for all that read the input.

    Raises:
        NumericalError: H is not finite, or not positive definite even after raised damping.
    """
    if hessian is None:
        raise TypeError("gptq needs a Hessian")
    order = (
        hessian.diagonal().argsort(descending=True, stable=True)
        if options.act_order
        else torch.arange(len(hessian), device=hessian.device)
    )
    factor, damping = inverse_cholesky(hessian[order][:, order], options.damp_percent)
    return Feedback(order, factor, damping, hessian)


def gptq(
    weight: Tensor,  # [R, C] float32, any device; not modified
    feedback: Feedback,  # same device
    grid: Grid,
    parameters: Any,  # of the grid, already fitted to `weight`
    options: RoundingOptions,
) -> Rounded:
    """Round `weight` to `grid` with the least error on the calibration inputs."""
    columns = weight.shape[1]
    order, factor = feedback.order, feedback.factor
    pending = weight[:, order].T.contiguous()  # [C, R]: a column of W is contiguous
    codes = torch.empty_like(pending)
    rounder = grid.columns(parameters)
    indices = order.tolist()
    for start in range(0, columns, options.block_columns):
        stop = min(start + options.block_columns, columns)
        errors = _round_block(pending, codes, factor, rounder, indices, start, stop)
        pending[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    quantized = QuantizedTensor(restored.T.contiguous().to(torch.uint8), parameters, grid)
    damping = feedback.damp_percent
    if options.sweeps:
        quantized = descend(
            weight,
            quantized,
            feedback.hessian,
            damping * float(feedback.hessian.diagonal().mean()) or 1.0,
            order,
            sweeps=options.sweeps,
            block_columns=options.block_columns,
        )
    return Rounded(quantized, damping, damping > options.damp_percent)


def _round_block(
    pending: Tensor,  # [C, R] consumed in place
    codes: Tensor,  # [C, R] filled in place
    factor: Tensor,  # [C, C] upper triangular
    rounder: ColumnRounder,
    indices: list[int],  # position in `pending` -> column of the weight
    start: int,
    stop: int,
) -> Tensor:
    """Round columns start..stop and return their scaled errors [stop - start, R]."""
    pivots = (1.0 / factor.diagonal()[start:stop]).tolist()
    errors = torch.empty_like(pending[start:stop])
    for j in range(start, stop):
        column = pending[j]
        chosen = rounder.encode(column, indices[j])
        codes[j] = chosen
        error = errors[j - start]
        torch.sub(column, rounder.decode(chosen, indices[j]), out=error)
        error.mul_(pivots[j - start])
        if j + 1 < stop:
            pending[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
    return errors


def inverse_cholesky(hessian: Tensor, damp_percent: float) -> tuple[Tensor, float]:
    """Factor the inverse of the damped Hessian.

    Args:
        hessian: [C, C] float32; not modified. An input that was never seen (zero on the diagonal)
            is decoupled: its weights are rounded to nearest and disturb no others.
        damp_percent: fraction of mean(diag H) added to the diagonal; multiplied by ten, up to
            five times, while H cannot be factored.

    Returns:
        Upper-triangular U [C, C] with U^T U = (H + damping * mean(diag H) * I)^-1, and the
        fraction that was used.

    Raises:
        NumericalError: H is not finite or cannot be factored.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NumericalError(
            "the Hessian of the calibration inputs is not finite",
            "the model overflows on this text; try --device cpu or other calibration data",
        )
    damping = damp_percent
    dead = hessian.diagonal() == 0
    for _ in range(DAMPING_TRIES + 1):
        damped = hessian.clone()
        diagonal = damped.diagonal()
        mean = diagonal.mean()
        diagonal[dead] = 1 if mean == 0 else mean
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping = damping * DAMPING_STEP or 0.01
    raise NumericalError(
        f"the Hessian is not positive definite even with damping {damping / DAMPING_STEP:g}",
        "use more calibration windows, or a larger --damp-percent",
    )


GPTQ = Rounding("gptq", frozenset({"hessian"}), prepare, gptq, "https://arxiv.org/abs/2210.17323")
