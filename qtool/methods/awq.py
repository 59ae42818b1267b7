"""AWQ: scale the inputs that matter up before rounding, and fold the inverse into the previous op.

Paper: Lin et al., "AWQ: Activation-aware Weight Quantization", MLSys 2024,
https://arxiv.org/abs/2306.00978. The scale of input c is  mean|x_c|^ratio, and the ratio is the
one of `grid_points` whose rounded weights give the least error on the calibration inputs,
tr(D H D^T) with D = W - Q(W s) / s. Where only the diagonal of H is known, that stands in for H.

Shapes: R = out_features, C = in_features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.grids.protocol import Grid

GRID_POINTS = 20
SAMPLED_ROWS, FINALISTS = 128, 3
PART_ROWS = 2048  # of a difference that are multiplied at once: the product is as large
# Folding a scale of 1e-4 into a 16-bit norm weight is safe; the paper's code stops there too.
SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class ScaleSearch:
    """What the search over scales found for the linears that read one input."""

    scale: Tensor  # [C] float32 > 0; all ones if nothing beats leaving the weights alone
    ratio: float
    error: float  # tr(D H D^T) with the scale
    plain_error: float  # the same without it

    @property
    def helped(self) -> bool:
        """Whether scaling lowers the error at all."""
        return self.error < self.plain_error


def search_scale(
    weights: Sequence[tuple[Tensor, Grid]],  # [R, C] float32 each, all reading one input
    mean_abs: Tensor,  # [C] float32, mean |x| of that input
    moment: Tensor,  # [C, C] float32 Hessian, or [C] its diagonal
    *,
    shared: int = 1,
    repeats: int = 1,
    grid_points: int = GRID_POINTS,
) -> ScaleSearch:
    """Find the per-input scale that loses least when the scaled weights are rounded to nearest.

    Args:
        weights: each with the grid it will be rounded to; not modified.
        mean_abs: not modified.
        moment: not modified.
        shared: size of one head; used with `repeats`.
        repeats: how many consecutive heads of inputs are copies of one head of the previous op
            (grouped-query attention), so that they must share one scale.
        grid_points: ratios tried in [0, 1).
    """
    importance = tie_repeated(mean_abs, shared, repeats).clamp(min=1e-8)
    # The scale hardly depends on how a group's range is chosen later: search with cheap fits.
    weights = [(weight, grid.plain()) for weight, grid in weights]
    ratios = [step / grid_points for step in range(1, grid_points)]
    scales = {ratio: _scale(importance, ratio) for ratio in ratios}
    if all(len(weight) > SAMPLED_ROWS for weight, _ in weights):
        # Ratios are ranked on some rows of each weight; all rows decide between the best.
        sample = [(weight[:: len(weight) // SAMPLED_ROWS], grid) for weight, grid in weights]
        ratios = sorted(ratios, key=lambda ratio: _errors(sample, moment, scales[ratio]))
        ratios = sorted(ratios[:FINALISTS])
    plain = _errors(weights, moment, None)
    best = ScaleSearch(torch.ones_like(mean_abs), 0.0, plain, plain)
    for ratio in ratios:
        error = _errors(weights, moment, scales[ratio])
        if error < best.error:
            best = ScaleSearch(scales[ratio], ratio, error, plain)
    return best


def _scale(importance: Tensor, ratio: float) -> Tensor:
    scale = importance.pow(ratio).clamp(min=SMALLEST_SCALE)
    # Centre the scales on one, so that neither weights nor the previous op overflow 16 bits.
    return scale / math.sqrt(float(scale.max()) * float(scale.min()))


def _errors(weights: Sequence[tuple[Tensor, Grid]], moment: Tensor, scale: Tensor | None) -> float:
    return sum(_error(weight, grid, moment, scale) for weight, grid in weights)


def tie_repeated(values: Tensor, head: int, repeats: int) -> Tensor:
    """Average [C] values over the heads that are copies of one, for grouped-query attention."""
    if repeats == 1:
        return values
    grouped = values.reshape(-1, repeats, head)  # [key-value heads, repeats, head]
    return grouped.mean(dim=1, keepdim=True).expand_as(grouped).reshape(-1)


def untie_repeated(values: Tensor, head: int, repeats: int) -> Tensor:
    """Take one copy of values [C] that `tie_repeated` made equal: [C / repeats]."""
    return values.reshape(-1, repeats, head)[:, 0].reshape(-1)


def output_error(difference: Tensor, moment: Tensor) -> float:
    """Return tr(D H D^T) for D [R, C] and H [C, C], or its diagonal [C]."""
    if moment.dim() == 1:
        return sum(float((part.square() @ moment).sum()) for part in difference.split(PART_ROWS))
    return sum(float((part @ moment).mul_(part).sum()) for part in difference.split(PART_ROWS))


def _error(weight: Tensor, grid: Grid, moment: Tensor, scale: Tensor | None) -> float:
    scaled = weight if scale is None else weight * scale
    parameters = grid.fit(scaled)
    rounded = grid.decode(grid.encode(scaled, parameters), parameters)
    if scale is not None:
        rounded /= scale
    error = output_error(rounded.sub_(weight), moment)
    return error if math.isfinite(error) else math.inf
