"""Accuracy with its error, and whether two models differ on the same questions.

Both models answer the same questions, so that what the questions themselves contribute to the
error falls out: only those count on which exactly one of the two is right (McNemar 1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Pairs up to which the binomial distribution is summed; beyond, chi-square is as good.
MOST_SUMMED = 1_000


@dataclass(frozen=True)
class Paired:
    """A model against the reference on the same samples.

    Args:
        reference: the reference's mean.
        reference_error: its standard error; nan for one sample.
        difference: the model's mean less the reference's.
        error: of the difference, over samples in pairs; nan for one sample.
        won: samples that only the model gets right; None where samples are not right or wrong.
        lost: likewise, only the reference.
        p_value: of no difference, by McNemar's test, two-sided; None likewise.
    """

    reference: float
    reference_error: float
    difference: float
    error: float
    won: int | None = None
    lost: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class TaskMetric:
    """One figure of a task.

    Args:
        value: mean over samples.
        error: its standard error; nan for one sample.
        paired: against the reference, None without one.
    """

    value: float
    error: float
    paired: Paired | None = None


@dataclass(frozen=True)
class TaskScore:
    """What a model reached in a task.

    Args:
        source: "file" or "lm_eval".
        samples: how many questions.
        metrics: by name, the main one first.
        sha256: of a file's bytes, else empty.
    """

    source: str
    samples: int
    metrics: dict[str, TaskMetric]
    sha256: str = ""

    @property
    def main(self) -> str:
        """The metric that stands for the task."""
        return next(iter(self.metrics))


def metric_of(values: Sequence[float], reference: Sequence[float] | None) -> TaskMetric:
    """Average the values of samples, and compare them with the reference's in pairs.

    Args:
        values: one for each sample; 0 and 1 are wrong and right.
        reference: the reference's on the same samples, None without one.
    """
    mean, error = _mean(values)
    if reference is None:
        return TaskMetric(mean, error)
    theirs, their_error = _mean(reference)
    difference, spread = _mean([a - b for a, b in zip(values, reference, strict=True)])
    paired = Paired(theirs, their_error, difference, spread)
    if {*values, *reference} <= {0.0, 1.0}:
        won = sum(a > b for a, b in zip(values, reference, strict=True))
        lost = sum(a < b for a, b in zip(values, reference, strict=True))
        p_value = mcnemar(won, lost)
        paired = Paired(theirs, their_error, difference, spread, won, lost, p_value)
    return TaskMetric(mean, error, paired)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of n values and its standard error, nan for one."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)


def mcnemar(won: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's test for the samples on which two models differ.

    Exact, by the binomial distribution, up to MOST_SUMMED such samples; beyond, by chi-square with
    the continuity correction (Edwards 1948).

    Args:
        won: samples that only one of them gets right.
        lost: samples that only the other gets right.
    """
    count = won + lost
    if count > MOST_SUMMED:
        square = max(0, abs(won - lost) - 1) ** 2 / count
        return math.erfc(math.sqrt(square / 2))
    tail = sum(math.comb(count, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**count)
