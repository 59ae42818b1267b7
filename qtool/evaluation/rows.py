"""Score rows of logits in as few passes over the vocabulary as there can be.

A vocabulary is long and a row of it is read many times: rows are taken a few at a time, so that
all but the first read come from the processor's cache, and no log softmax is ever written out.
With m the largest logit of a row, a those of the reference and b the model's:

    log total(b) = m + log sum exp(b - m)
    KL(a || b)   = sum p (a - b) - log total(a) + log total(b),   p = exp(a) / total(a)

Sums over the vocabulary are float32, what is left of a row is float64: the two totals are large
and nearly equal.

Shapes: R rows (positions of a window), V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PIECE_ROWS = 128  # of one window that a model gives at a time; the last piece may be shorter
# Logits of a block that stays in the cache while it is read again and again. A GPU wants plenty.
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 25}


@dataclass(frozen=True)
class RowScores:
    """What a piece of a window came to.

    Args:
        losses: [R] float64, -log p of the token that follows.
        top: [R] int64, the likeliest token.
        reference_losses: the same of the reference, None without one.
        reference_top: likewise.
        divergences: [R] float64, KL(reference || model) in nats, not negative.
        differences: [rows kept whole] float64, by how much the divergence estimated from a
            shortened reference differs from the exact one; None where the reference is whole.
    """

    losses: Tensor
    top: Tensor
    reference_losses: Tensor | None = None
    reference_top: Tensor | None = None
    divergences: Tensor | None = None
    differences: Tensor | None = None


class ReferenceRows(Protocol):
    """What is known of the reference about one piece of a window."""

    def against(self, logits: Tensor, targets: Tensor) -> RowScores:
        """Score a model's logits [R, V] float32 for targets [R] int64 and compare them."""


def blocks_of(logits: Tensor) -> list[slice]:
    """Return slices of rows [R, V] that stay in the cache."""
    wanted = BLOCK["cpu" if logits.device.type == "cpu" else "cuda"]
    step = max(1, wanted // max(logits.shape[1], 1))
    return [slice(start, start + step) for start in range(0, len(logits), step)]


@dataclass(frozen=True)
class _Totals:
    """Of a block: log of the sum of exp [R] float64, likeliest token [R], sum relative to it."""

    log: Tensor
    top: Tensor
    relative: Tensor


def _totals(logits: Tensor, work: Tensor) -> _Totals:
    """Sum up rows; `work` of their shape is left holding exp(logits - largest)."""
    largest, top = logits.max(dim=-1, keepdim=True)
    torch.sub(logits, largest, out=work)
    relative = work.exp_().sum(dim=-1).double()
    return _Totals(largest[:, 0].double() + relative.log(), top[:, 0], relative)


def log_totals(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log of the sum of exp [R] float64 and the likeliest token [R] of logits [R, V]."""
    found = []
    for rows in blocks_of(logits):
        block = logits[rows]
        found.append(_totals(block, torch.empty_like(block)))
    return torch.cat([t.log for t in found]), torch.cat([t.top for t in found])


def losses_of(logits: Tensor, targets: Tensor, log_total: Tensor) -> Tensor:
    """Return -log p [R] float64 of targets [R]."""
    return log_total - logits.gather(1, targets[:, None])[:, 0].double()


def score_rows(logits: Tensor, targets: Tensor) -> RowScores:
    """Score logits [R, V] float32 for targets [R] int64, without a reference."""
    log_total, top = log_totals(logits)
    return RowScores(losses_of(logits, targets, log_total), top)


@dataclass(frozen=True)
class WholeRows:
    """The reference's logits [R, V] float32 themselves."""

    logits: Tensor

    def against(self, logits: Tensor, targets: Tensor) -> RowScores:
        """Score a model's logits [R, V] float32 for targets [R] int64 and compare them."""
        ours, theirs, divergences = [], [], []
        for rows in blocks_of(logits):
            model, reference = logits[rows], self.logits[rows]
            work, difference = torch.empty_like(model), torch.empty_like(model)
            found = _totals(model, work)
            expected = _totals(reference, work)
            # work now holds the reference's unscaled probabilities.
            weighted = torch.sub(reference, model, out=difference).mul_(work).sum(dim=-1)
            divergences.append(weighted.double() / expected.relative - expected.log + found.log)
            ours.append(found)
            theirs.append(expected)
        expected_log = torch.cat([t.log for t in theirs])
        return RowScores(
            losses_of(logits, targets, torch.cat([t.log for t in ours])),
            torch.cat([t.top for t in ours]),
            losses_of(self.logits, targets, expected_log),
            torch.cat([t.top for t in theirs]),
            torch.cat(divergences).clamp(min=0),
        )
