"""Sub-blocks of a weight matrix laid out for searching scale and offset, and their moments.

With codes q chosen, the squared error of a sub-block, weighted by w, is a polynomial of scale s
and offset t in six sums; four of them are constant or vanish once the weights x are centred on
their weighted mean. What is left are the moments

    first = sum w q,    second = sum w q q,    cross = sum w q x,    total = sum w

    error(s, t) = sum w (x - s q + t)^2 = sum w x^2 - gain(s, t)
    gain(s, t) = s (2 cross - s second + 2 t first) - t^2 total

so a pair (s, t) is judged, and the best one solved for, without touching single weights again.

Shapes: S = sub-blocks of a row in the tile, g = weights of a sub-block, R = rows of the tile. Rows
come last: sums over g and everything per sub-block then run along contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Codes that differ by less than this share of their square are one code, up to rounding.
LEAST_SPREAD = 1e-6
# A weight can stretch the range of its sub-block in full from this share of the mean importance.
FULL_REACH = 1e-3
LEAST_SCALE = 1e-30  # what stands for zero where it is divided by


@dataclass(frozen=True)
class Moments:
    """Sums over the codes of every sub-block."""

    sums: Tensor  # [3, S, R]: first, second and cross

    def gain(self, scale: Tensor, shift: Tensor, total: Tensor) -> Tensor:
        """Return by how much less than sum w x^2 the error is, [S, R]."""
        first, second, cross = self.sums
        inner = torch.addcmul(cross, shift, first).mul_(2).addcmul_(scale, second, value=-1)
        return inner.mul_(scale).addcmul_(shift * shift, total, value=-1)

    def take(self, other: Moments, better: Tensor) -> None:
        """Replace these moments by others where `better` [S, R] is 1, not 0."""
        select(self.sums, other.sums, better)


def select(into: Tensor, source: Tensor, chosen: Tensor) -> None:
    """Copy finite numbers where `chosen` is 1; float32 0 elsewhere. Faster than torch.where."""
    into.lerp_(source, chosen)


def exceeds(candidate: Tensor, best: Tensor) -> Tensor:
    """Return 1 where a candidate is better, 0 elsewhere, and raise `best` to it; float32."""
    better = torch.gt(candidate, best, out=torch.empty_like(best))
    torch.maximum(candidate, best, out=best)
    return better


class Tile:
    """Some columns of some rows, and buffers to try parameters on them in.

    Args:
        weight: [R, C'] float32, whole blocks; not modified.
        importance: [C'] float32 > 0, or None where all columns count the same.
        buffers: [4, at least R C'] float32: fresh memory would cost more than the arithmetic.
        sub: weights of a sub-block.
        most: largest code.
        signed: whether offsets of either sign can be stored.
        limit: what no weight can exceed in the type; larger ones are cut.
    """

    def __init__(
        self,
        weight: Tensor,
        importance: Tensor | None,
        buffers: Tensor,
        *,
        sub: int,
        most: int,
        signed: bool,
        limit: float,
    ) -> None:
        rows, columns = weight.shape
        count = columns // sub
        self.most, self.signed = most, signed
        self.per_block = 256 // sub  # sub-blocks of a block that has integer scales
        views = [buffer[: rows * columns].view(count, sub, rows) for buffer in buffers]
        self._x, self._weighted, self._codes, self._product = views
        x = self._x
        # In two steps, because torch transposes only what is contiguous without stumbling.
        kept = torch.clamp(weight, -limit, limit, out=self._product.view(rows, columns))
        x.view(columns, rows).copy_(kept.T)
        if importance is None:
            self._importance = None
            self.total = torch.full((count, 1), float(sub), device=weight.device)
            self.mean = x.mean(dim=1)
        else:
            self._importance = importance.view(-1, sub, 1)
            self.total = self._importance.sum(dim=1)
            torch.mul(x, self._importance, out=self._product)
            self.mean = self._product.sum(dim=1).div_(self.total)
        self._per_total = self.total.reciprocal()
        x -= self.mean[:, None]
        self.low, self.high = self._range()
        self.near_zero = False
        if not signed:
            step = (self.high - self.low) / most
            # In other tiles the best offset all but never comes out negative.
            self.near_zero = bool((self.low + self.mean + step > 0).any())
            self.low = torch.minimum(self.low, -self.mean)
        if self._importance is None:
            self._weighted = x
        else:
            torch.mul(x, self._importance, out=self._weighted)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Return the least and largest weight [S, R] of the sub-blocks, dead columns aside."""
        if self._importance is None:
            return self._x.amin(dim=1), self._x.amax(dim=1)
        mean = self.total[:, None] / self._x.shape[1]
        reach = (self._importance / (mean * FULL_REACH)).clamp_(max=1)
        torch.mul(self._x, reach, out=self._product)
        return self._product.amin(dim=1), self._product.amax(dim=1)

    def moments(self, inverse: Tensor, start: Tensor) -> Moments:
        """Return the moments of the codes nearest to inverse * x + start, [S, R] both."""
        codes, product = self._codes, self._product
        torch.addcmul(start[:, None], self._x, inverse[:, None], out=codes)
        codes.round_().clamp_(0, self.most)
        sums = inverse.new_empty((3, *inverse.shape))
        first, second, cross = sums
        torch.sum(torch.mul(codes, self._weighted, out=product), dim=1, out=cross)
        if self._importance is None:
            torch.sum(codes, dim=1, out=first)
            torch.sum(codes.square_(), dim=1, out=second)
        else:
            torch.sum(torch.mul(codes, self._importance, out=product), dim=1, out=first)
            torch.sum(product.mul_(codes), dim=1, out=second)
        return Moments(sums)

    def at(self, scale: Tensor, shift: Tensor) -> Moments:
        """Return the moments of the codes nearest to (x + shift) / scale, [S, R] both."""
        inverse = inverted(scale)
        return self.moments(inverse, shift * inverse)

    def best_gain(self, moments: Moments) -> Tensor:
        """Return the gain [S, R] of the best scale and shift for codes with `moments`."""
        first, second, cross = moments.sums
        spread = torch.addcmul(second, first * first, self._per_total, value=-1)
        # Where the codes are all the same, rounding errors must not look like a spread.
        spread.add_(second, alpha=LEAST_SPREAD).clamp_(min=LEAST_SCALE)
        gain = (cross * cross).div_(spread)
        if self.near_zero:
            held = torch.lt(cross / spread * self.slope(moments), self.mean, out=spread)
            select(gain, self._gain_through_zero(moments), held)
        return gain

    def _gain_through_zero(self, moments: Moments) -> Tensor:
        """Return the gain of the best scale where the offset is zero."""
        first, second, cross = moments.sums
        gain = torch.addcmul(cross, self.mean, first).clamp_(min=0).square_()
        gain.div_(second.clamp(min=LEAST_SCALE))
        return gain.addcmul_(self.mean.square(), self.total, value=-1)

    def error(self, scale: Tensor, shift: Tensor) -> Tensor:
        """Return the error [S, R] with the codes nearest to (x + shift) / scale, term by term."""
        codes, inverse = self._codes, inverted(scale)
        torch.addcmul((shift * inverse)[:, None], self._x, inverse[:, None], out=codes)
        codes.round_().clamp_(0, self.most)
        torch.addcmul(self._x, codes, scale[:, None], value=-1, out=self._product)
        self._product.add_(shift[:, None]).square_()
        if self._importance is not None:
            self._product.mul_(self._importance)
        return self._product.sum(dim=1)

    def solve(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Return the best scale >= 0 and shift [S, R] for codes with `moments`."""
        first, second, cross = moments.sums
        slope = self.slope(moments)
        spread = torch.addcmul(second, first, slope, value=-1)
        known = spread > second * LEAST_SPREAD
        scale = torch.where(known, cross / spread, 0).clamp_(min=0)
        shift = scale * slope
        if self.signed:
            return scale, shift
        # Less than the mean would be a negative offset: without one, the scale alone is free.
        held = shift < self.mean
        through_zero = torch.addcmul(cross, self.mean, first) / second.clamp(min=LEAST_SCALE)
        scale = torch.where(held, through_zero.clamp_(min=0), scale)
        return scale, torch.where(held, self.mean, shift)

    def slope(self, moments: Moments) -> Tensor:
        """Return by how much the best shift grows with the scale, [S, R]."""
        return moments.sums[0] * self._per_total


def inverted(values: Tensor) -> Tensor:
    """Return 1 / values of values >= 0, something finite for zero."""
    return values.clamp(min=LEAST_SCALE).reciprocal_()
