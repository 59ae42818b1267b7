"""Fit scales and offsets of Q4_1, Q5_1, Q2_K, Q4_K and Q5_K.

The error that is minimised is that of what will be stored, weighted by importance and nothing
else. Each sub-block starts from a few ways to cut its range at either end, keeps the best after
the scale and offset were solved for in closed form, and tries a few ranges around that one; blocks
of 256 then choose their fp16 numbers and all integers together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.grids.ggml_affine_integers import fit_integers, round_range
from qtool.grids.ggml_affine_tile import Moments, Tile, exceeds, inverted
from qtool.grids.ggml_parameters import FP16_MAX, BlockParameters, GgmlLayout, to_fp16

TILE_WEIGHTS = 1 << 19  # four buffers of 2 MiB: cached, yet long beside the price of a call
TILE_COLUMNS = 1024
TILE_WEIGHTS_ELSEWHERE = 1 << 24  # a GPU wants long kernels instead

# Codes by which the range of a sub-block is stretched beyond its lowest and its highest weight: the
# first candidates, all pairs; and how much further the second ones are, around the best of them.
# Numbers that will be integers cannot make use of the last per cent that more candidates bring.
CUTS_OF_FLOATS, RING_OF_FLOATS = (-0.3, 0.2, 0.7, 1.2), 0.35
CUTS_OF_INTEGERS, RING_OF_INTEGERS = (-0.2, 0.5, 1.2), 0.45
LEAST_IMPORTANCE = 1e-6  # of the mean: a dead input must not make a block indifferent

FP16_EPSILON = 2.0**-10  # the most by which neighbours differ, as a share
FP16_LEAST = 2.0**-24


def fit_affine(
    weight: Tensor, importance: Tensor | None, layout: GgmlLayout, *, search: bool = True
) -> BlockParameters:
    """Choose scales and offsets for weight [R, C] float32.

    Args:
        weight: not modified.
        importance: [C] float32 >= 0, weight of each column's squared error; without it, or where
            all of it is zero, all columns count the same.
        layout: of a type with offsets.
        search: whether to look for the least error instead of taking each sub-block's range.
    """
    rows, columns = weight.shape
    integer = layout.offset == "integer"
    block = layout.block
    blocks, subs = columns // block, columns // layout.sub
    found = BlockParameters(
        weight.new_empty((rows, blocks)),
        weight.new_empty((rows, blocks)),
        weight.new_empty((rows, subs if integer else 0)),
        weight.new_empty((rows, subs if integer else 0)),
    )
    weights = _normalised(importance)
    height, width = _tile_shape(weight, block)
    buffers = weight.new_empty((4, height * width))
    for part, span in _tiles(rows, columns, height, width):
        tile = Tile(
            weight[part, span],
            None if weights is None else weights[span],
            buffers,
            sub=layout.sub,
            most=layout.levels[-1],
            signed=not integer,
            limit=FP16_MAX * layout.levels[-1] * (layout.scales[1] if layout.scales else 1),
        )
        of_blocks = slice(span.start // block, span.stop // block)
        if layout.scales is None:
            scale, offset = _fit_floats(tile) if search else _cover(tile)
            found.super_scale[part, of_blocks] = scale.T
            found.super_offset[part, of_blocks] = offset.T
            continue
        most = layout.scales[1]
        plain = round_range(tile, most)
        fit = fit_integers(tile, *_search(tile), most, plain) if search else plain
        found.super_scale[part, of_blocks] = fit.super_scale.T
        found.super_offset[part, of_blocks] = fit.super_offset.T
        of_subs = slice(span.start // layout.sub, span.stop // layout.sub)
        found.scales[part, of_subs] = fit.scales.T
        found.offsets[part, of_subs] = fit.offsets.T
    return found


def _normalised(importance: Tensor | None) -> Tensor | None:
    """Return importance with mean 1 and no zeros, None where it says nothing."""
    if importance is None:
        return None
    mean = importance.double().mean()
    if not bool(mean > 0):
        return None
    return (importance.double() / mean).clamp_(min=LEAST_IMPORTANCE).to(torch.float32)


def _tile_shape(weight: Tensor, block: int) -> tuple[int, int]:
    """Return the most rows and columns of a tile of a matrix."""
    rows, columns = weight.shape
    on_cpu = weight.device.type == "cpu"
    width = max(block, min(columns, TILE_COLUMNS) // block * block) if on_cpu else columns
    most = TILE_WEIGHTS if on_cpu else TILE_WEIGHTS_ELSEWHERE
    return max(1, min(rows, most // width)), width


def _tiles(rows: int, columns: int, height: int, width: int) -> list[tuple[slice, slice]]:
    return [
        (slice(row, min(row + height, rows)), slice(column, min(column + width, columns)))
        for row in range(0, rows, height)
        for column in range(0, columns, width)
    ]


def _search(tile: Tile) -> tuple[Tensor, Tensor, Moments]:
    """Return scale, shift [S, R] of every sub-block and the moments that they are best for."""
    cuts = CUTS_OF_FLOATS if tile.signed else CUTS_OF_INTEGERS
    ring = RING_OF_FLOATS if tile.signed else RING_OF_INTEGERS
    scale, shift = (tile.high - tile.low) / tile.most, -tile.low
    scale, shift = tile.solve(_best(tile, scale, shift, cuts))
    moments = _best(tile, scale, shift, (-ring, 0.0, ring))
    scale, shift = tile.solve(moments)
    return scale, shift, moments


def _best(tile: Tile, scale: Tensor, shift: Tensor, cuts: Sequence[float]) -> Moments:
    """Return the best moments with the range stretched by any of `cuts` codes at either end."""
    inverse = inverted(scale)
    start = shift * inverse
    best = Moments(scale.new_zeros((3, *scale.shape)))
    most = torch.full_like(scale, -torch.inf)
    for low in cuts:
        for high in cuts:
            stretch = (tile.most + low + high) / tile.most
            moments = tile.moments(inverse * stretch, (start * stretch).sub_(low))
            best.take(moments, exceeds(tile.best_gain(moments), most))
    return best


def _fit_floats(tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the fp16 scale and added offset [S, R] of least error."""
    scale, shift, moments = _search(tile)
    stored = to_fp16(scale)
    # The offset makes up for the rounding of the scale.
    offset = to_fp16(tile.mean - shift - (stored - scale) * tile.slope(moments))
    plain_scale, plain_offset = _cover(tile)
    worse = tile.error(stored, tile.mean - offset) > tile.error(
        plain_scale, tile.mean - plain_offset
    )
    return torch.where(worse, plain_scale, stored), torch.where(worse, plain_offset, offset)


def _cover(tile: Tile) -> tuple[Tensor, Tensor]:
    """Return an fp16 scale and added offset [S, R] between which the whole range lies."""
    low = tile.low + tile.mean
    offset = to_fp16(low)
    # Where fp16 is coarse beside the range, an offset that was rounded up would lose the range.
    below = to_fp16(low - low.abs() * FP16_EPSILON - FP16_LEAST)
    offset = torch.where(offset > low, below, offset)
    return to_fp16((tile.high + tile.mean - offset) / tile.most), offset
