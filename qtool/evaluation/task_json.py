"""Task scores in the terms of the JSON contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.evaluation.task_statistics import TaskMetric, TaskScore


def tasks_json(scores: Mapping[str, TaskScore]) -> dict[str, Any]:
    """Return task -> its main figure, and below `other` those that it has besides."""
    return {name: _score(score) for name, score in scores.items()}


def _score(score: TaskScore) -> dict[str, Any]:
    main, *others = score.metrics
    found: dict[str, Any] = {"source": score.source, "samples": score.samples}
    if score.sha256:
        found["sha256"] = score.sha256
    found |= {"metric": main, **_metric(score.metrics[main])}
    if others:
        found["other"] = {name: _metric(score.metrics[name]) for name in others}
    return found


def _metric(metric: TaskMetric) -> dict[str, Any]:
    found: dict[str, Any] = {"value": metric.value, "se": metric.error}
    paired = metric.paired
    if paired is not None:
        found |= {
            "reference": paired.reference,
            "reference_se": paired.reference_error,
            "difference": paired.difference,
            "difference_se": paired.error,
        }
        if paired.p_value is not None:
            found |= {"won": paired.won, "lost": paired.lost, "mcnemar_p": paired.p_value}
    return found
