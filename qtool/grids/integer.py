"""Uniform integer grids, symmetric and asymmetric, per tensor, channel or group.

    weight ~= scale * (code - zero),    code in [0, 2**bits)

Scales come from the minimum and maximum, or from a search over shrunken ranges for the least
(importance-weighted) squared error. They are rounded to the dtype in which the file will hold
them *before* codes are chosen, so what was optimised is what is stored.

Shapes: R = out_features, C = in_features, G = groups along C (1 unless per group).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qtool.errors import NumericalError, UsageError
from qtool.grids.refit import Knob
from qtool.grids.rows import no_group

Granularity = Literal["tensor", "channel", "group"]

# Fractions of the min-max range that the search tries, widest first. A symmetric grid reaches
# only (2**bits - 1) / 2 steps to the positive side but one half more to the negative, so a range
# a little wider than min-max can pay as well.
SEARCHED_RANGES = tuple(1.10 - 0.025 * step for step in range(25))  # 1.10 .. 0.50


@dataclass(frozen=True)
class IntegerParameters:
    """Scale and zero point of every group."""

    scale: Tensor  # [R, G] float32, > 0, representable in the grid's scale dtype
    zero: Tensor  # [R, G] float32, integer-valued, in [0, 2**bits)


@dataclass(frozen=True)
class IntegerGrid:
    """Evenly spaced values.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: input columns that share one scale; only for granularity "group".
        symmetric: one zero point, 2**(bits - 1), for all groups.
        granularity: what shares one scale.
        search: choose scales by least squared error instead of min-max.
        scale_dtype: the dtype in which scales are stored.
        lowest_zero: least zero point; 1 for files that store `zero - 1`.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    granularity: Granularity = "group"
    search: bool = False
    scale_dtype: torch.dtype = torch.float16
    lowest_zero: int = 0
    name: str = field(init=False)

    def __post_init__(self) -> None:
        if self.bits not in {2, 3, 4, 8}:
            raise UsageError(f"{self.bits}-bit integers are not a grid", "choose 2, 3, 4 or 8 bits")
        spread = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        sign = "sym" if self.symmetric else "asym"
        object.__setattr__(self, "name", f"int{self.bits}-{sign}-{spread}")

    @property
    def max_code(self) -> int:
        """The largest code; the smallest is 0."""
        return int(2**self.bits) - 1

    def width(self, columns: int) -> int:
        """Return how many consecutive columns share one scale in a row of `columns`."""
        return self.group_size if self.granularity == "group" else columns

    def check_row(self, columns: int) -> None:
        """Refuse a row that the group size does not divide.

        Raises:
            UsageError: names the group sizes from 16 to 1024 that work.
        """
        if self.granularity == "group" and columns % self.group_size:
            raise no_group(self.group_size, columns)

    def check_range(self, weight: Tensor) -> None:
        """Refuse weights that no scale of this grid reaches: clamped ones would be quite others.

        Args:
            weight: [R, C], any float dtype, finite.

        Raises:
            NumericalError: names the largest weight and the dtype of the scales.
        """
        low, high = float(weight.min().clamp(max=0)), float(weight.max().clamp(min=0))
        bound = max(-low, high)
        reach = 2 * bound if self.symmetric else high - low
        above = math.inf if self.symmetric else self.max_code - self.lowest_zero
        if max(reach / self.max_code, high / above) > self.largest_scale:
            kind = str(self.scale_dtype).removeprefix("torch.")
            raise NumericalError(
                f"a weight of {bound:.3g} is beyond what {self.bits} bits with scales of "
                f"{kind} hold",
                "leave this linear as it is with --ignore, or use -f compressed-tensors, whose "
                "scales have the model's own dtype",
            )

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Return bits per weight with a stored scale and, if asymmetric, a `bits` wide zero."""
        scales = 1 if self.granularity == "tensor" else rows * columns // self.width(columns)
        overhead = self.scale_dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + scales * overhead / (rows * columns)

    def plain(self) -> IntegerGrid:
        """Return the grid with scales from the minimum and maximum alone."""
        return replace(self, search=False)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> IntegerParameters:
        """Choose scales and zeros for weight [R, C] float32.

        Args:
            weight: not modified.
            importance: [C] float32 >= 0, weight of each column's squared error in the search;
                without it all columns count the same. Min-max ignores it.
        """
        rows, columns = weight.shape
        self.check_row(columns)
        if self.granularity == "tensor":
            groups = weight.reshape(1, 1, rows * columns)
        else:
            groups = weight.reshape(rows, -1, self.width(columns))
        if self.search:
            scale, zero = self._search(groups, importance)
        else:
            scale, zero = self._range(groups, 1.0)
        if self.granularity == "tensor":
            scale, zero = scale.expand(rows, 1), zero.expand(rows, 1)
        return IntegerParameters(scale.contiguous(), zero.contiguous())

    def _range(self, groups: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        """Scale and zero [R, G] for groups [R, G, g] from a fraction of their range."""
        low = groups.amin(dim=2).clamp(max=0) * fraction
        high = groups.amax(dim=2).clamp(min=0) * fraction
        return self._parameters(low, high)

    def _parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        half = self.max_code / 2  # because the whole range may overflow float32
        if self.symmetric:
            scale = self.storable(torch.maximum(-low, high) / half)
            return scale, torch.full_like(scale, float((self.max_code + 1) // 2))
        scale = (high / 2 - low / 2) / half
        # Codes below the least zero point serve no weight where none is negative.
        scale = torch.maximum(scale, high / (self.max_code - self.lowest_zero))
        scale = self.storable(scale)
        return scale, (-low / scale).round().clamp(self.lowest_zero, self.max_code)

    @property
    def largest_scale(self) -> float:
        """The largest scale that its dtype holds and with which no code overflows float32."""
        farthest = 2 ** (self.bits - 1) if self.symmetric else self.max_code
        # bfloat16's own limit leaves float32 room for rounding.
        most = torch.finfo(torch.bfloat16).max / farthest
        return float(min(torch.finfo(self.scale_dtype).max, most))

    def storable(self, scale: Tensor) -> Tensor:
        """Round scales to the dtype they are stored in, never to zero or a subnormal.

        None becomes so large that a code times it is infinite.
        """
        # Readers multiply in 16 bits: a subnormal scale would be flushed to zero there.
        least = torch.finfo(self.scale_dtype).smallest_normal
        kept = scale.clamp(min=least, max=self.largest_scale)
        return kept.to(self.scale_dtype).to(torch.float32)

    def _search(self, groups: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Least weighted squared error over SEARCHED_RANGES, for groups [R, G, g]."""
        rows, count, width = groups.shape
        weights = None
        if importance is not None and self.granularity != "tensor":
            # One dead input must not make a whole group indifferent to its weights.
            floor = importance.mean() * 1e-6 + torch.finfo(torch.float32).tiny
            weights = (importance + floor).reshape(1, count, width)
        elif importance is not None:
            columns = importance.numel()
            weights = importance.repeat(width // columns).reshape(1, 1, width)
        low = groups.amin(dim=2).clamp(max=0)
        high = groups.amax(dim=2).clamp(min=0)
        best = torch.full((rows, count), math.inf, device=groups.device)
        scale, zero = self._parameters(low, high)
        for fraction in SEARCHED_RANGES:
            tried, offset = self._parameters(low * fraction, high * fraction)
            error = self._error(groups, tried, offset, weights)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, tried, scale)
            zero = torch.where(better, offset, zero)
        return scale, zero

    def _error(self, groups: Tensor, scale: Tensor, zero: Tensor, weights: Tensor | None) -> Tensor:
        scale, zero = scale[..., None], zero[..., None]
        rounded = (groups / scale).add_(zero).round_().clamp_(0, self.max_code)
        squared = rounded.sub_(zero).mul_(scale).sub_(groups).square_()
        return (squared if weights is None else squared.mul_(weights)).sum(dim=2)

    def encode(self, weight: Tensor, parameters: IntegerParameters) -> Tensor:
        """Return uint8 codes [R, C] nearest to weight [R, C] float32."""
        scale, zero = parameters.scale[..., None], parameters.zero[..., None]
        groups = weight.reshape(*parameters.scale.shape, -1)
        codes = (groups / scale).add_(zero).round_().clamp_(0, self.max_code)
        return codes.to(torch.uint8).view(weight.shape)

    def decode(self, codes: Tensor, parameters: IntegerParameters) -> Tensor:
        """Return the weight [R, C] float32 that codes [R, C] uint8 stand for."""
        scale, zero = parameters.scale[..., None], parameters.zero[..., None]
        groups = codes.to(torch.float32).reshape(*parameters.scale.shape, -1)
        return groups.sub_(zero).mul_(scale).view(codes.shape)

    def columns(self, parameters: IntegerParameters) -> IntegerColumns:
        """Return a rounder of single columns."""
        return IntegerColumns(self, parameters)

    def refit(self, codes: Tensor, parameters: IntegerParameters) -> IntegerRefit | None:
        """Return the scales for a refit, None where rows share one."""
        return None if self.granularity == "tensor" else IntegerRefit(self, codes, parameters)

    def join(self, parts: list[IntegerParameters]) -> IntegerParameters:
        """Stack the parameters of several matrices along R."""
        return IntegerParameters(
            torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts])
        )

    def rows(self, parameters: IntegerParameters, start: int, stop: int) -> IntegerParameters:
        """Return the parameters of rows `start` to `stop`."""
        return IntegerParameters(parameters.scale[start:stop], parameters.zero[start:stop])


class IntegerRefit:
    """Scales of groups while codes and zeros stay."""

    def __init__(self, grid: IntegerGrid, codes: Tensor, parameters: IntegerParameters) -> None:
        self._grid = grid
        self._codes = codes.T  # [C, R] uint8
        self._scale = parameters.scale.T.contiguous()  # [G, R]
        self._zero = parameters.zero.T.contiguous()

    def groups(self) -> Iterator[tuple[slice, Iterator[Knob]]]:
        """Yield each group's columns and its scale."""
        width = self._grid.width(len(self._codes))
        for group in range(len(self._scale)):
            columns = slice(group * width, (group + 1) * width)
            direction = self._codes[columns].to(torch.float32).sub_(self._zero[group])
            yield columns, iter([Knob(direction, partial(self._move, group))])

    def _move(self, group: int, change: Tensor) -> Tensor:
        old = self._scale[group].clone()
        # Half of a scale is as far as least squares can sensibly want to go.
        self._scale[group] = self._grid.storable(torch.maximum(old + change, old / 2))
        return self._scale[group] - old

    def parameters(self) -> IntegerParameters:
        """Return the parameters as they are now."""
        return IntegerParameters(self._scale.T.contiguous(), self._zero.T.contiguous())


class IntegerColumns:
    """Rounds single columns; keeps scales transposed so that a column's are contiguous."""

    def __init__(self, grid: IntegerGrid, parameters: IntegerParameters) -> None:
        self._grid = grid
        self._scale = parameters.scale.T.contiguous()  # [G, R]
        self._zero = parameters.zero.T.contiguous()
        self._grouped = grid.granularity == "group"

    def _group(self, index: int) -> int:
        return index // self._grid.group_size if self._grouped else 0

    def encode(self, column: Tensor, index: int) -> Tensor:
        """Return integer-valued float32 codes [R] of column `index`."""
        group = self._group(index)
        codes = (column / self._scale[group]).add_(self._zero[group])
        return codes.round_().clamp_(0, self._grid.max_code)

    def decode(self, codes: Tensor, index: int) -> Tensor:
        """Return the values [R] float32 of column `index`."""
        group = self._group(index)
        return (codes - self._zero[group]).mul_(self._scale[group])
