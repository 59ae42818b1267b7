"""Choose the fp16 numbers and integers of blocks of 256 for scales and offsets that were real.

Every choice is made on moments (see `ggml_affine_tile`), by the error that it leaves for codes
that are already chosen; better codes can only lower it further, so no step makes things worse.

Shapes: as there, and B = blocks of a row in the tile, p = sub-blocks of a block, S = B p.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.grids.ggml_affine_tile import LEAST_SPREAD, Moments, Tile, exceeds, inverted, select
from qtool.grids.ggml_parameters import to_fp16

# Largest integer -> how many fp16 numbers are tried for a block, and what share of it the largest
# value of the block gets with the last of them; with the first it gets all.
NUMBERS_TRIED = {15: (16, 0.75), 63: (24, 0.9)}


@dataclass(frozen=True)
class Integers:
    """A choice for the blocks of a tile."""

    super_scale: Tensor  # [B, R], representable in fp16
    super_offset: Tensor  # [B, R], the same
    scales: Tensor  # [S, R] integer-valued
    offsets: Tensor  # [S, R] integer-valued

    def scale(self) -> Tensor:
        """Return the scale of every sub-block, [S, R]."""
        return _times(self.super_scale, self.scales)

    def offset(self) -> Tensor:
        """Return what is subtracted in every sub-block, [S, R]."""
        return _times(self.super_offset, self.offsets)


def round_range(tile: Tile, most: int) -> Integers:
    """Return a choice that covers every sub-block's range, its largest integers being `most`."""
    per_block = tile.per_block
    super_scale, scales = _grid((tile.high - tile.low) / tile.most, most, per_block)
    super_offset, offsets = _grid((-tile.low - tile.mean).clamp_(min=0), most, per_block)
    return Integers(super_scale, super_offset, scales, offsets)


def fit_integers(
    tile: Tile, scale: Tensor, shift: Tensor, moments: Moments, most: int, plain: Integers
) -> Integers:
    """Choose the stored numbers for real `scale` and `shift` [S, R].

    Args:
        tile: the weights.
        scale: of every sub-block.
        shift: offset plus mean of every sub-block.
        moments: of the codes for which these two are best.
        most: largest integer.
        plain: a choice to fall back on where it is better.
    """
    first, second, _ = moments.sums
    slope = tile.slope(moments)
    spread = torch.addcmul(second, first, slope, value=-1).clamp_(min=0)
    super_scale, scales = _best_grid(scale, spread, most, tile.per_block)
    kept = _times(super_scale, scales)
    offset = (shift + (kept - scale) * slope - tile.mean).clamp_(min=0)
    total = tile.total.expand_as(offset)
    super_offset, offsets = _best_grid(offset, total, most, tile.per_block)
    chosen = Integers(super_scale, super_offset, scales, offsets)
    chosen, moments = _neighbours(tile, chosen, most)
    chosen = _solve(tile, moments, chosen)
    chosen = _reround(tile, moments, chosen, most)
    loss = _error(tile, chosen) - _error(tile, plain)
    return _mixed(loss > 0, plain, chosen)


def _error(tile: Tile, chosen: Integers) -> Tensor:
    """Return the error of every block, [B, R]."""
    error = tile.error(chosen.scale(), chosen.offset() + tile.mean)
    return _sums(error, len(chosen.super_scale))


def _mixed(condition: Tensor, first: Integers, second: Integers) -> Integers:
    """Return `first` in blocks where `condition` [B, R] holds, `second` elsewhere."""
    of_subs = condition.repeat_interleave(len(first.scales) // len(condition), dim=0)
    return Integers(
        torch.where(condition, first.super_scale, second.super_scale),
        torch.where(condition, first.super_offset, second.super_offset),
        torch.where(of_subs, first.scales, second.scales),
        torch.where(of_subs, first.offsets, second.offsets),
    )


def _times(of_blocks: Tensor, integers: Tensor) -> Tensor:
    """Multiply integers [..., S, R] by the number [..., B, R] of their block."""
    blocks = of_blocks.shape[-2]
    split = integers.unflatten(-2, (blocks, -1))
    return (split * of_blocks.unsqueeze(-2)).flatten(-3, -2)


def _sums(values: Tensor, blocks: int) -> Tensor:
    """Sum [S, R] over the sub-blocks of each block, [B, R]."""
    return values.unflatten(0, (blocks, -1)).sum(dim=1)


def _grid(values: Tensor, most: int, per_block: int) -> tuple[Tensor, Tensor]:
    """Return fp16 numbers [B, R] and integers [S, R] whose product is near `values` [S, R] >= 0."""
    values = values.unflatten(0, (-1, per_block))
    number = to_fp16(values.amax(dim=1) / most)
    integers = (values * inverted(number)[:, None]).round_().clamp_(max=most)
    return number, integers.flatten(0, 1)


def _best_grid(values: Tensor, weights: Tensor, most: int, per_block: int) -> tuple[Tensor, Tensor]:
    """Return the same with the least of several squared errors, weighted by `weights` [S, R]."""
    values = values.unflatten(0, (-1, per_block))
    weights = weights.unflatten(0, (-1, per_block))
    top = values.amax(dim=1)
    number, best = to_fp16(top / most), torch.full_like(top, -torch.inf)
    count, least_share = NUMBERS_TRIED[most]
    for step in range(count):
        share = 1 - (1 - least_share) * step / (count - 1)
        tried = to_fp16(top / (most * share))
        integers = (values * inverted(tried)[:, None]).round_().clamp_(max=most)
        error = integers.mul_(tried[:, None]).sub_(values).square_().mul_(weights).sum(dim=1)
        select(number, tried, exceeds(error.neg_(), best))
    integers = (values * inverted(number)[:, None]).round_().clamp_(max=most)
    return number, integers.flatten(0, 1)


def _neighbours(tile: Tile, chosen: Integers, most: int) -> tuple[Integers, Moments]:
    """Try the integers around the chosen ones with the codes that each would get."""
    moved_scales = [(chosen.scales + more).clamp_(0, most) for more in (-1, 0, 1)]
    moved_offsets = [(chosen.offsets + more).clamp_(0, most) for more in (-1, 0, 1)]
    shifts = [_times(chosen.super_offset, moved).add_(tile.mean) for moved in moved_offsets]
    scales, offsets = chosen.scales.clone(), chosen.offsets.clone()
    found = tile.at(chosen.scale(), shifts[1])
    best = found.gain(chosen.scale(), shifts[1], tile.total)
    for moved_scale in moved_scales:
        scale = _times(chosen.super_scale, moved_scale)
        inverse = inverted(scale)
        for moved_offset, shift in zip(moved_offsets, shifts, strict=True):
            if moved_scale is moved_scales[1] and moved_offset is moved_offsets[1]:
                continue
            moments = tile.moments(inverse, shift * inverse)
            better = exceeds(moments.gain(scale, shift, tile.total), best)
            select(scales, moved_scale, better)
            select(offsets, moved_offset, better)
            found.take(moments, better)
    return replace(chosen, scales=scales, offsets=offsets), found


def _solve(tile: Tile, moments: Moments, chosen: Integers) -> Integers:
    """Return the best fp16 numbers for codes with `moments` and the chosen integers."""
    blocks = len(chosen.super_scale)
    first, second, cross = moments.sums
    scales, offsets, mean = chosen.scales, chosen.offsets, tile.mean
    weighted = offsets * tile.total
    squares = _sums(scales.square() * second, blocks)
    mixed = _sums(scales * offsets * first, blocks)
    of_offsets = _sums(weighted * offsets, blocks)
    with_scale = _sums(torch.addcmul(cross, mean, first).mul_(scales), blocks)
    with_offset = _sums(weighted * mean, blocks)
    determinant = squares * of_offsets - mixed.square()
    regular = determinant > squares * of_offsets * LEAST_SPREAD
    scale = (of_offsets * with_scale - mixed * with_offset) / determinant
    offset = (mixed * with_scale - squares * with_offset) / determinant
    regular &= (scale > 0) & (offset >= 0)
    better = replace(
        chosen,
        super_scale=to_fp16(torch.where(regular, scale, chosen.super_scale)),
        super_offset=to_fp16(torch.where(regular, offset, chosen.super_offset)),
    )
    keep = _sums(_gain(tile, moments, better) - _gain(tile, moments, chosen), blocks) < 0
    return replace(
        chosen,
        super_scale=torch.where(keep, chosen.super_scale, better.super_scale),
        super_offset=torch.where(keep, chosen.super_offset, better.super_offset),
    )


def _gain(tile: Tile, moments: Moments, chosen: Integers) -> Tensor:
    return moments.gain(chosen.scale(), chosen.offset() + tile.mean, tile.total)


def _reround(tile: Tile, moments: Moments, chosen: Integers, most: int) -> Integers:
    """Return the best integers for codes with `moments` and the chosen fp16 numbers."""
    scale, _ = tile.solve(moments)
    inverse_scale, inverse_offset = inverted(chosen.super_scale), inverted(chosen.super_offset)
    below = _times(inverse_scale, scale).floor_().clamp_(0, most)
    slope = tile.slope(moments)
    best = _gain(tile, moments, chosen)
    scales, offsets = chosen.scales.clone(), chosen.offsets.clone()
    for integers in (below, (below + 1).clamp_(max=most)):
        offset = _times(chosen.super_scale, integers).mul_(slope).sub_(tile.mean)
        rounded = _times(inverse_offset, offset).round_().clamp_(0, most)
        tried = replace(chosen, scales=integers, offsets=rounded)
        better = exceeds(_gain(tile, moments, tried), best)
        select(scales, integers, better)
        select(offsets, rounded, better)
    return replace(chosen, scales=scales, offsets=offsets)
