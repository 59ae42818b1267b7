"""Fit scales of Q8_0, Q4_0, Q5_0, Q3_K, Q6_K, IQ4_NL and IQ4_XS.

    minimise  sum of w (x - s l)^2    over the scale s of a sub-block and the levels l of its codes

For given levels the best scale is  s = A / B  with  A = sum w x l,  B = sum w l^2,  and lowers the
error by A^2 / B. So a few scales are tried as starting points, levels are rounded for each, and the
greatest A^2 / B wins; to round once more with the scale it leads to gains less than one more start.
In types whose scales are integers times one number d for each block, any
other scale costs  B (s - d k)^2  for the levels found: d and the integers k minimise the sum of
that, which needs the sums of the sub-blocks only.

Blocks lie along the last, contiguous dimension, so that every operation, sums included, runs over
long vectors; chunks of rows stay in the cache.

Shapes: R = rows, C = columns; in a chunk of rows n = blocks; per = sub-blocks of a block, sub =
weights of a sub-block. All of them float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from qtool.grids.ggml_levels import to_nearest_level
from qtool.grids.ggml_parameters import BlockParameters, GgmlLayout, to_fp16

# The scales that are tried: those which put the weight of largest magnitude on these levels. Each
# list is in the order of gain: picked one after the other out of a fine grid of both signs, for the
# least error on normal, Student-t and real weights, with and without importance.
IQ4_STARTS = (-128.0, 116.0, -140.0, -108.0, -120.0, 128.0, -132.0, 108.0, -152.0)
STARTS: dict[str, tuple[float, ...]] = {
    "Q4_0": (-8.25, -9.0, -7.25, -7.75, -10.0, -8.5, -6.75, -11.25, -8.0),
    "Q5_0": (-16.25, -15.0, -17.0, -15.75, -14.0, -13.0, -18.0, -16.5, -15.25),
    "Q3_K": (-4.15, -4.9, -3.25, -3.85, -6.1, 4.45, -4.45, -2.95, -7.0),
    "Q6_K": (-31.9, -30.85, -29.1, -30.15, -28.05, -27.0, -32.6, -25.95, -24.9),
    "IQ4_NL": IQ4_STARTS,
    "IQ4_XS": IQ4_STARTS,
}
# Where the largest scale of a block is put, as a part of the largest integer.
SUPER_STARTS = tuple(1.0 - 0.01 * step for step in range(8))
WEIGHTS_AT_ONCE = 1 << 17  # five float32 arrays of them stay near the core
WEIGHTS_AT_ONCE_ELSEWHERE = 1 << 24  # on an accelerator launches cost more than memory
UNSEEN = 1e-3  # of the mean importance: columns below do not decide which scales are tried
LEAST_EXTREME = 1e-10  # a sub-block without a larger weight is zero in fp16 whatever the scale
LARGEST_WEIGHT = 1e10  # no type reaches it: weights beyond are clipped anyway
LEAST_FP16 = 2.0**-24
LEAST_IMPORTANCE = 1e-6  # of the mean
TINY = torch.finfo(torch.float32).tiny


def fit_symmetric(
    weight: Tensor, importance: Tensor | None, layout: GgmlLayout, *, search: bool = True
) -> BlockParameters:
    """Choose the scales of weight [R, C] float32.

    Args:
        weight: not modified.
        importance: [C] float32 >= 0, weight of each column's squared error; without it all
            columns count the same.
        layout: of a type without offsets.
        search: for the least error; otherwise the range of each sub-block decides alone.
    """
    rows, columns = weight.shape
    at_once = WEIGHTS_AT_ONCE if weight.device.type == "cpu" else WEIGHTS_AT_ONCE_ELSEWHERE
    step = max(1, min(rows, at_once // columns))
    searched = search and layout.name in STARTS
    none = torch.empty((rows, 0), device=weight.device)
    super_scale = torch.empty((rows, columns // layout.block), device=weight.device)
    count = columns // layout.sub if layout.scales else 0
    scales = torch.empty((rows, count), device=weight.device)
    room = None
    for start in range(0, rows, step):
        part = weight[start : start + step]
        shown = slice(start, start + len(part))
        if searched:
            if room is None or len(part) != step:
                room = _Room.of(part, importance, layout)
            scale, cost = _searched_scale(part, room, layout)
        else:
            scale, cost = _range_scale(part, layout), None
        if layout.scales is not None:
            scale, integers = _super_scale(scale, cost, layout.scales)
            scales[shown] = integers.t().reshape(len(part), -1)
        super_scale[shown] = to_fp16(scale).view(len(part), -1)
    return BlockParameters(super_scale, none, scales, none)


def _range_scale(part: Tensor, layout: GgmlLayout) -> Tensor:
    """Return scales [per, n] that put the largest weight of each sub-block on an end."""
    if layout.least_code:  # as long on both sides: the sign does not matter
        blocks = part.reshape(-1, layout.sub)
        return blocks.abs().amax(dim=1)[None].mul_(1 / layout.levels[-1])
    blocks = part.reshape(-1, layout.block).t().contiguous()
    return _extreme(blocks.view(-1, layout.sub, blocks.shape[1])).mul_(1 / layout.levels[0])


def _extreme(x: Tensor, dim: int = 1) -> Tensor:
    """Return the values of largest magnitude along a dimension, with their signs."""
    low, high = x.amin(dim=dim), x.amax(dim=dim)
    return torch.copysign(torch.maximum(-low, high), low + high)


def _inverse(scale: Tensor, least: float = 0.0) -> Tensor:
    """Return 1 / scale, zero where its magnitude is at most `least`; no branch for each value."""
    return hardshrink(scale, least).reciprocal_().nan_to_num_(posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class _Room:
    """Arrays [per, sub, n] that chunks of as many rows use again."""

    x: Tensor
    weights: Tensor | None  # importance of each weight, mean 1; None where all count the same
    seen: Tensor | None  # 1 where the importance is not negligible, else 0; None where it never is
    weighted: Tensor  # x times weights; `x` itself without
    levels: Tensor
    product: Tensor

    @staticmethod
    def of(part: Tensor, importance: Tensor | None, layout: GgmlLayout) -> _Room:
        """Make room for `part` [rows, C]."""
        shape = (-1, layout.sub, part.numel() // layout.block)
        x, levels, product = (
            torch.empty(part.numel(), device=part.device).view(shape) for _ in range(3)
        )
        if importance is None or not bool(importance.any()):
            return _Room(x, None, None, x, levels, product)
        relative = importance / importance.max()
        relative /= relative.mean()
        blocks = relative.expand(len(part), -1).reshape(-1, layout.block)
        weights = blocks.t().contiguous().view(shape)
        seen = (weights > UNSEEN).to(torch.float32) if relative.min() <= UNSEEN else None
        # One dead input must not make a whole sub-block indifferent to its weights.
        weights += LEAST_IMPORTANCE
        return _Room(x, weights, seen, torch.empty_like(x), levels, product)

    def fill(self, part: Tensor) -> None:
        """Take the weights [rows, C] of a chunk."""
        blocks = self.x.view(-1, self.x.shape[2])
        blocks.copy_(part.reshape(-1, len(blocks)).t()).clamp_(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        if self.weights is not None:
            torch.mul(self.x, self.weights, out=self.weighted)

    def extreme(self) -> Tensor:
        """Return the weights [per, n] of largest magnitude, but for unseen columns."""
        found = _extreme(self.x)
        if self.seen is None:
            return found
        seen = _extreme(torch.mul(self.x, self.seen, out=self.product))
        return torch.where(seen == 0, found, seen)


def _searched_scale(part: Tensor, room: _Room, layout: GgmlLayout) -> tuple[Tensor, Tensor]:
    """Return the best scales [per, n] and the B of their levels."""
    room.fill(part)
    starts = torch.tensor(STARTS[layout.name], device=part.device)
    tried = starts[:, None, None] * _inverse(room.extreme(), LEAST_EXTREME)
    moments, squares = torch.empty_like(tried), torch.empty_like(tried)
    for inverse, moment, square in zip(tried, moments, squares, strict=True):
        _sums(room, inverse, layout, moment, square)
    scales = moments / squares.clamp_(min=TINY)
    # Not argmax, which takes twenty times as long.
    _, best = (moments * scales).max(dim=0, keepdim=True)
    return scales.gather(0, best)[0], squares.gather(0, best)[0]


def _sums(room: _Room, inverse: Tensor, layout: GgmlLayout, moment: Tensor, square: Tensor) -> None:
    """Write A and B [per, n] of the levels that are nearest with 1 / scale = `inverse`."""
    levels = to_nearest_level(torch.mul(room.x, inverse[:, None], out=room.levels), layout)
    torch.sum(torch.mul(levels, room.weighted, out=room.product), 1, out=moment)
    squares = torch.mul(levels, levels, out=room.product)
    if room.weights is not None:
        squares.mul_(room.weights)
    torch.sum(squares, 1, out=square)


def _super_scale(
    scale: Tensor, cost: Tensor | None, limits: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return d [n] and the integers k [per, n] for scales and costs B of missing them [per, n]."""
    # The sign sends the largest scale to the negative end, which is one longer.
    largest = _extreme(scale, 0)
    parts = (1.0,) if cost is None else SUPER_STARTS
    ends = torch.tensor(parts, device=scale.device) * -limits[0]
    step = (largest.abs() / ends[:, None]).clamp_(min=LEAST_FP16)
    tried = to_fp16(step.mul_(-largest.sign()))  # [tried, n]
    if cost is None:
        return tried[0], _integers(scale, tried[0], limits)
    missed = _integers(scale, tried[:, None], limits).mul_(tried[:, None]).sub_(scale)
    _, best = missed.square_().mul_(cost).sum(dim=1).min(dim=0, keepdim=True)
    chosen = tried.gather(0, best)[0]
    return chosen, _integers(scale, chosen, limits)


def _integers(scale: Tensor, unit: Tensor, limits: tuple[int, int]) -> Tensor:
    return (scale * _inverse(unit)).round_().clamp_(*limits)
