"""A reference's distributions shortened to a few hundred tokens each, and divergence from those.

The likeliest TOP tokens are kept with their log probabilities. Of the rest, the tail, its mass is
kept and DRAWN tokens drawn by their probability, evenly spread over the vocabulary, so that

    KL(p || q) = sum over top of p (log p - log q) + tail mass * mean over drawn of (log p - log q)

is right on average whatever the model does to the tail; lumping the tail together would always
come out too low. The model's log q is exact: all of its logits are there. A few rows are kept
whole, so that the error can be measured for every model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.evaluation.rows import (
    RowScores,
    WholeRows,
    blocks_of,
    log_totals,
    losses_of,
)

TOP = 256
DRAWN = 64


@dataclass(frozen=True)
class ShortRows:
    """What is kept of the reference for R consecutive positions.

    Args:
        ids: [R, top + drawn] int64, the likeliest tokens in falling order, then those drawn.
        likeliest: [R] int64, the one that `max` finds; 16-bit logits have several that are equal.
        logs: [R, top + drawn] float32, their log probabilities.
        tail: [R] float64, the mass of all tokens but the top ones.
        losses: [R] float64, -log p of the token that follows.
        n_top: how many of `ids` are top tokens.
        kept: [K] int64, rows that are kept whole.
        whole: [K, V] float32, their log probabilities.
    """

    ids: Tensor
    likeliest: Tensor
    logs: Tensor
    tail: Tensor
    losses: Tensor
    n_top: int
    kept: Tensor
    whole: Tensor

    def against(self, logits: Tensor, targets: Tensor) -> RowScores:
        """Score a model's logits [R, V] float32 for targets [R] int64 and compare them."""
        log_total, top = log_totals(logits)
        ids = self.ids.to(logits.device)
        logs = self.logs.to(logits.device).double()
        excess = logs - logits.gather(1, ids).double() + log_total[:, None]
        weighted = (logs[:, : self.n_top].exp() * excess[:, : self.n_top]).sum(dim=-1)
        drawn = excess[:, self.n_top :]
        if drawn.shape[1]:
            weighted += self.tail.to(logits.device) * drawn.mean(dim=-1)
        divergences = weighted.clamp(min=0)
        return RowScores(
            losses_of(logits, targets, log_total),
            top,
            self.losses.to(logits.device),
            self.likeliest.to(logits.device),
            divergences,
            self._differences(logits, targets, divergences),
        )

    def _differences(self, logits: Tensor, targets: Tensor, estimated: Tensor) -> Tensor:
        """Return (estimated - exact) [K] of the rows that are kept whole."""
        if not len(self.kept):
            return torch.empty(0, dtype=torch.float64)
        kept = self.kept.to(logits.device)
        whole = WholeRows(self.whole.to(logits.device))
        exact = whole.against(logits[kept], targets[kept]).divergences
        if exact is None:
            raise RuntimeError("whole rows were compared without a divergence")
        return estimated[kept] - exact

    def rows(self, start: int, stop: int) -> ShortRows:
        """Return what is kept of the positions from `start` to `stop`."""
        inside = (self.kept >= start) & (self.kept < stop)
        return ShortRows(
            self.ids[start:stop],
            self.likeliest[start:stop],
            self.logs[start:stop],
            self.tail[start:stop],
            self.losses[start:stop],
            self.n_top,
            self.kept[inside] - start,
            self.whole[inside],
        )


def shortened(
    logits: Tensor,
    targets: Tensor,
    kept: Tensor,
    draw: torch.Generator,
    *,
    top: int = TOP,
    drawn: int = DRAWN,
) -> ShortRows:
    """Shorten logits [R, V] float32 to what `ShortRows` keeps, on the CPU.

    Args:
        logits: of the reference.
        targets: [R] int64, the tokens that follow.
        kept: [K] int64, rows to keep whole.
        draw: decides which tokens of the tail are drawn; a CPU generator.
        top: likeliest tokens to keep.
        drawn: tokens of the tail to draw; none where the vocabulary has no more than `top`.
    """
    rows, vocabulary = logits.shape
    top = min(top, vocabulary)
    drawn = drawn if top < vocabulary else 0
    starts = torch.rand(rows, generator=draw).to(logits.device)
    log_total, likeliest = log_totals(logits)
    parts = [
        _short_block(logits[block], log_total[block], starts[block], top, drawn)
        for block in blocks_of(logits)
    ]
    places = kept.to(logits.device)
    whole = (logits[places].double() - log_total[places, None]).float()
    ids, logs, tail = (torch.cat([part[index] for part in parts]).cpu() for index in range(3))
    losses = losses_of(logits, targets.to(logits.device), log_total)
    return ShortRows(ids, likeliest.cpu(), logs.float(), tail, losses.cpu(), top, kept, whole.cpu())


def _short_block(
    logits: Tensor, log_total: Tensor, starts: Tensor, top: int, drawn: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and log probabilities [R, top + drawn] and the tail's mass [R] float64."""
    largest, ids = logits.topk(top, dim=-1)
    tail = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    if drawn:
        weights = (logits - largest[:, :1]).exp_().scatter_(1, ids, 0.0)
        reached = weights.cumsum(dim=-1)
        total = reached[:, -1:]
        # Evenly spread from one random start: as right on average as separate draws, and closer.
        steps = (torch.arange(drawn, device=logits.device) + starts[:, None]) / drawn
        places = torch.searchsorted(reached, steps * total, right=True)
        ids = torch.cat([ids, places.clamp(max=logits.shape[1] - 1)], dim=1)
        tail = total[:, 0].double() * (largest[:, 0].double() - log_total).exp()
    logs = logits.gather(1, ids).double() - log_total[:, None]
    return ids, logs, tail
