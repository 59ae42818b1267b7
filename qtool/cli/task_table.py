"""The table of task scores that a person reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qtool.checkpoint.untrusted import printable
from qtool.evaluation.task_scoring import ACC, ACC_NORM, EXACT

if TYPE_CHECKING:
    from rich.table import Table

    from qtool.evaluation.task_statistics import TaskMetric
    from qtool.pipeline.evaluate_tasks import ModelTasks

MEANINGS = {
    ACC: "the likeliest choice is right",
    ACC_NORM: "the choice that is likeliest per character is right",
    EXACT: "greedy decoding gives an accepted answer",
}


def task_table(models: Sequence[tuple[str, ModelTasks]]) -> Table | None:
    """Return every model's scores, task by task; None where there were no tasks.

    Args:
        models: the name of each, and what it reached.
    """
    from rich.table import Table

    tasks = [one for _, one in models]
    if not any(one.scores for one in tasks):
        return None
    metrics = [m for one in tasks for score in one.scores.values() for m in score.metrics.values()]
    compared = any(metric.paired is not None for metric in metrics)
    table = Table(box=None, pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("model", overflow="fold")
    titles = ["metric", "score", *(["original's", "difference", "won, lost", "p"] * compared)]
    for title in [*titles, "samples"]:
        table.add_column(title, justify="right", no_wrap=True)
    for task in dict.fromkeys(task for one in tasks for task in one.scores):
        for name, one in models:
            score = one.scores.get(task)
            for metric, figure in score.metrics.items() if score else ():
                row = [printable(task), printable(name), printable(metric)]
                row += [_score(figure), *(_paired(figure) if compared else ())]
                table.add_row(*row, str(score.samples if score else ""))
    return table


def task_notes(tasks: Sequence[ModelTasks]) -> Iterator[str]:
    """Yield what the columns mean, as far as it is not said by their names."""
    scores = [score for one in tasks for score in one.scores.values()]
    found = dict.fromkeys(name for score in scores for name in score.metrics)
    known = [f"{name}: {MEANINGS[name]}" for name in found if name in MEANINGS]
    if known:
        yield "; ".join(known)
    if any(m.paired and m.paired.p_value is not None for s in scores for m in s.metrics.values()):
        yield (
            "won, lost: samples that only the model, only the original gets right; p: of so uneven "
            "a split where the two are equally good (McNemar)"
        )


def _score(figure: TaskMetric) -> str:
    if not 0 <= figure.value <= 1:
        return f"{figure.value:.4g}"
    return f"{100 * figure.value:.1f}{_error(figure.error)} %"


def _paired(figure: TaskMetric) -> list[str]:
    paired = figure.paired
    if paired is None:
        return 4 * [""]
    if not (0 <= figure.value <= 1 and 0 <= paired.reference <= 1):
        return [f"{paired.reference:.4g}", f"{paired.difference:+.4g}", "", ""]
    shown = [
        f"{100 * paired.reference:.1f} %",
        f"{100 * paired.difference:+.1f}{_error(paired.error)} %",
    ]
    if paired.p_value is None:
        return [*shown, "", ""]
    return [*shown, f"{paired.won}, {paired.lost}", f"{paired.p_value:.2g}"]


def _error(error: float) -> str:
    return "" if math.isnan(error) else f" ± {100 * error:.1f}"
