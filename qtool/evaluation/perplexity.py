"""Perplexity on consecutive windows that do not overlap, as quantization papers report it.

Every token of a window but its first is predicted from those before it in the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def token_losses(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """Return -log p [length - 1] of each token but the first.

    Args:
        log_probabilities: [length, vocabulary] float32.
        ids: [length] int64.
    """
    targets = ids[1:, None].to(log_probabilities.device)
    return -log_probabilities[:-1].gather(1, targets)[:, 0]


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens with its standard error."""

    value: float
    standard_error: float
    tokens: int


def mean_over_windows(windows: list[Tensor]) -> Estimate:
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


def perplexity(losses: list[Tensor]) -> Estimate:
    """Return exp of the mean loss over windows, with its standard error to first order."""
    mean = mean_over_windows(losses)
    value = math.exp(min(mean.value, 700.0))
    return Estimate(value, value * mean.standard_error, mean.tokens)
