"""Nearest levels of ggml's block types, for whole arrays and in few passes.

Even levels need rounding and clamping. The levels of the IQ4 types lie unevenly, but the points
halfway between them are multiples of one half: twice the value, cut to an integer, finds the
nearest level in a table exactly, where a search by halves would take tens of times as long.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qtool.grids.ggml_parameters import GgmlLayout

TABLE_REACH = 128  # the tables cover values from -128 to 128 in halves


def nearest_codes(scaled: Tensor, layout: GgmlLayout) -> Tensor:
    """Return integer-valued codes of `scaled`, values in units of the scale; it is overwritten.

    The dtype is float32 for even levels and uint8 for others: what comes out without another pass.
    """
    levels = layout.levels
    if layout.even:
        if levels[0]:
            scaled.sub_(levels[0])
        return scaled.round_().clamp_(layout.least_code, len(levels) - 1)
    codes, _ = _tables(layout, scaled.device)
    return codes.index_select(0, _table_index(scaled)).view(scaled.shape)


def to_nearest_level(scaled: Tensor, layout: GgmlLayout) -> Tensor:
    """Round contiguous float32 `scaled` to levels in place and return it."""
    if layout.even:
        return scaled.round_().clamp_(layout.levels[0], layout.levels[-1])
    _, values = _tables(layout, scaled.device)
    torch.index_select(values, 0, _table_index(scaled), out=scaled.view(-1))
    return scaled


def levels_of(codes: Tensor, layout: GgmlLayout) -> Tensor:
    """Return the float32 levels of codes of any integer-valued dtype."""
    if layout.even:
        return codes.to(torch.float32).add_(layout.levels[0])
    table = _level_table(layout, codes.device)
    return table.index_select(0, codes.to(torch.int32).reshape(-1)).view(codes.shape)


def to_bytes(codes: Tensor) -> Tensor:
    """Return integer-valued codes 0..255 as uint8."""
    # Through int16: float32 to uint8 is the one conversion that torch does not vectorise.
    return codes if codes.dtype == torch.uint8 else codes.to(torch.int16).to(torch.uint8)


def _table_index(scaled: Tensor) -> Tensor:
    """Overwrite `scaled` with places in the tables of `_tables`, and return them flat."""
    places = scaled.mul_(2).add_(2 * TABLE_REACH).clamp_(0, 4 * TABLE_REACH - 1)
    return places.to(torch.int32).to(torch.int64).reshape(-1)


@lru_cache(maxsize=16)
def _level_table(layout: GgmlLayout, device: torch.device) -> Tensor:
    return torch.tensor(layout.levels, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _tables(layout: GgmlLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the code (uint8) and the level (float32) nearest to -128, -127.5, ... 127.5."""
    levels = torch.tensor(layout.levels, dtype=torch.float32)
    places = torch.arange(-2 * TABLE_REACH, 2 * TABLE_REACH) / 2
    codes = torch.bucketize(places, (levels[1:] + levels[:-1]) / 2, right=True)
    return codes.to(torch.uint8).to(device), levels[codes].to(device)
