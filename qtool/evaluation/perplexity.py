"""Means over tokens with their standard errors; perplexity on windows that do not overlap.

Every token of a window but its first is predicted from those before it in the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens with its standard error."""

    value: float
    standard_error: float
    tokens: int


def mean_over_windows(windows: Sequence[Tensor]) -> Estimate:
    """Average per-token values; the error is that of window means.

    Tokens of one window are alike, so counting them as independent would make the error look
    smaller than it is.

    Args:
        windows: one tensor of per-token values for each window.
    """
    values = torch.cat([w.double().cpu() for w in windows])
    means = torch.stack([w.double().mean().cpu() for w in windows])
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Estimate(float(values.mean()), error, values.numel())


def perplexity(losses: Sequence[Tensor]) -> Estimate:
    """Return exp of the mean loss over windows, with its standard error to first order."""
    mean = mean_over_windows(losses)
    value = math.exp(min(mean.value, 700.0))
    return Estimate(value, value * mean.standard_error, mean.tokens)


def perplexity_ratio(losses: Sequence[Tensor], reference: Sequence[Tensor]) -> Estimate:
    """Return perplexity over the reference's; tokens are paired, which makes the error small."""
    return perplexity([ours - theirs for ours, theirs in zip(losses, reference, strict=True)])
