"""How far a quantized model's predictions are from the original's, over all tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qtool.evaluation.perplexity import (
    Estimate,
    mean_over_windows,
    perplexity,
    perplexity_ratio,
)
from qtool.evaluation.scores import AgainstReference, Scores

QUANTILES = (0.5, 0.99, 0.999)
RESAMPLES = 200  # of whole windows, for the errors of quantiles


@dataclass(frozen=True)
class ApproximationError:
    """How far divergences from a shortened reference are from the exact ones.

    Args:
        value: mean of (estimated - exact) in nats, over the tokens whose reference is kept whole.
        standard_error: of that mean.
        tokens: how many such tokens there are.
    """

    value: float
    standard_error: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """A model against its reference on the same windows.

    Args:
        perplexity: of the model.
        reference_perplexity: of the reference.
        ratio: of the two.
        second_half: both and their ratio by llama.cpp's rule; None for windows too short for it.
        divergence: KL(reference || model) in nats per token.
        divergence_median: as an estimate, like the next two.
        divergence_p99: 99 % of tokens are below it.
        divergence_p999: 99.9 % are.
        top1: fraction of tokens where both find the same token likeliest.
        flips: fraction of tokens where one of the two finds the token that follows likeliest and
            the other does not.
        approximation: None where the reference's logits were there as a whole.
    """

    perplexity: Estimate
    reference_perplexity: Estimate
    ratio: Estimate
    second_half: tuple[Estimate, Estimate, Estimate] | None
    divergence: Estimate
    divergence_median: Estimate
    divergence_p99: Estimate
    divergence_p999: Estimate
    top1: Estimate
    flips: Estimate
    approximation: ApproximationError | None = None


def second_half(losses: Sequence[Tensor]) -> list[Tensor]:
    """Return the losses [length - 1] of each window that llama-perplexity scores.

    Only tokens of a window's second half count: all of those have at least half a window before
    them. The figure is lower than over whole windows, and comparable to llama.cpp's. Empty where
    windows are too short to have a second half.
    """
    halves = [window[(len(window) + 1) // 2 :] for window in losses]
    return [half for half in halves if len(half)]


def second_half_perplexity(scores: Sequence[Scores]) -> Estimate | None:
    """Return perplexity by llama.cpp's rule, None for windows too short for it."""
    losses = second_half([window.losses for window in scores])
    return perplexity(losses) if losses else None


def compared(scores: Sequence[Scores]) -> Comparison | None:
    """Sum up windows; None if they were scored without a reference."""
    against = [window.reference for window in scores if window.reference is not None]
    if not against:
        return None
    ours, theirs = [window.losses for window in scores], [window.losses for window in against]
    halves, other_halves = second_half(ours), second_half(theirs)
    half = (
        (perplexity(halves), perplexity(other_halves), perplexity_ratio(halves, other_halves))
        if halves
        else None
    )
    median, p99, p999 = quantiles([window.divergences for window in against])
    flips = [
        (window.right != other.right).double()
        for window, other in zip(scores, against, strict=True)
    ]
    return Comparison(
        perplexity=perplexity(ours),
        reference_perplexity=perplexity(theirs),
        ratio=perplexity_ratio(ours, theirs),
        second_half=half,
        divergence=mean_over_windows([window.divergences for window in against]),
        divergence_median=median,
        divergence_p99=p99,
        divergence_p999=p999,
        top1=mean_over_windows([window.same_top.double() for window in against]),
        flips=mean_over_windows(flips),
        approximation=_approximation(against),
    )


def quantiles(windows: Sequence[Tensor]) -> tuple[Estimate, ...]:
    """Return QUANTILES of per-token values of windows, with errors from resampling windows.

    Windows are drawn with replacement, as often as there are, RESAMPLES times, with one seed; the
    error is the deviation of what the quantile then is. A single window gives none.
    """
    values = torch.cat(list(windows)).double().numpy()
    owner = np.repeat(np.arange(len(windows)), [len(window) for window in windows])
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], owner[order]
    found = np.quantile(ordered, QUANTILES)
    errors = np.full(len(QUANTILES), math.nan)
    if len(windows) > 1:
        draw = np.random.default_rng(0)
        drawn = np.empty((RESAMPLES, len(QUANTILES)))
        for row in drawn:
            counts = np.bincount(
                draw.integers(0, len(windows), len(windows)), minlength=len(windows)
            )
            reached = np.cumsum(counts[owner])
            places = np.searchsorted(reached, np.multiply(QUANTILES, reached[-1]))
            row[:] = ordered[np.minimum(places, len(ordered) - 1)]
        errors = drawn.std(axis=0, ddof=1)
    return tuple(
        Estimate(float(value), float(error), len(values))
        for value, error in zip(found, errors, strict=True)
    )


def _approximation(against: Sequence[AgainstReference]) -> ApproximationError | None:
    differences = torch.cat([window.differences for window in against])
    count = len(differences)
    if not count:
        return None
    error = float(differences.std() / math.sqrt(count)) if count > 1 else math.nan
    return ApproximationError(float(differences.mean()), error, count)
