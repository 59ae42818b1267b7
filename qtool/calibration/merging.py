"""Add one set of calibration statistics to another, token by token as if read in one go."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.calibration.moments import Moments
from qtool.calibration.statistics_file import ExpertMoments, Statistics
from qtool.checkpoint.untrusted import printable
from qtool.errors import UsageError


def merged(one: Statistics, other: Statistics) -> Statistics:
    """Return statistics over the text of both; a tensor that only one knows is kept.

    Windows are counted in those of `one`, as a file has one length for all.

    Raises:
        UsageError: they have different sizes for a tensor, so they are of different models.
    """
    moments = dict(one.moments)
    experts = dict(one.experts)
    for name, added in other.moments.items():
        if name in experts:
            raise _mismatch(name)
        moments[name] = _added(name, moments[name], added) if name in moments else added
    for name, more in other.experts.items():
        if name in moments:
            raise _mismatch(name)
        experts[name] = _experts_added(name, experts[name], more) if name in experts else more
    length = one.sequence_length or other.sequence_length
    tokens = one.windows * one.sequence_length + other.windows * other.sequence_length
    return Statistics(
        moments,
        tuple(dict.fromkeys([*one.datasets, *other.datasets])),
        -(-tokens // length) if length else one.windows + other.windows,
        length,
        experts,
        (*one.warnings, *other.warnings),
    )


def _added(name: str, one: Moments, other: Moments) -> Moments:
    if one.diagonal.shape != other.diagonal.shape:
        raise _mismatch(name)
    counts = torch.tensor([one.tokens, other.tokens], dtype=torch.float64)
    return Moments(
        one.tokens + other.tokens,
        _mean(counts, one.mean_abs, other.mean_abs),
        _mean(counts, one.diagonal, other.diagonal),
    )


def _experts_added(name: str, one: ExpertMoments, other: ExpertMoments) -> ExpertMoments:
    if one.diagonal.shape != other.diagonal.shape:
        raise _mismatch(name)
    counts = torch.stack([one.counts, other.counts]).double()
    # Experts that neither saw keep their ones.
    weights = torch.where(counts.sum(dim=0) > 0, counts, 1.0)
    mean = _mean(weights[:, :, None], one.diagonal, other.diagonal)
    return ExpertMoments(counts.sum(dim=0).float(), mean)


def _mean(weights: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return the weighted mean of two tensors; weights [2, ...], float64."""
    total = one.cpu().double() * weights[0] + other.cpu().double() * weights[1]
    return (total / weights.sum(dim=0)).float()


def _mismatch(name: str) -> UsageError:
    return UsageError(
        f"the statistics differ in the size of '{printable(name)}'",
        "they were made with different models; merge those of one model only",
    )
