"""What `qtool quantize --ladder` prints: a line for each rung, what won, and what comes next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from qtool.cli.comparison_table import ComparisonTable
from qtool.cli.quantize_report import typed
from qtool.console import printable_line
from qtool.evaluation.gates import shown_outcome
from qtool.pipeline.artifact import environment
from qtool.pipeline.ladder import Rung, rung_json
from qtool.recipe.sizes import shown_size

if TYPE_CHECKING:
    from qtool.checkpoint.locate import Checkpoint
    from qtool.errors import QtoolError


def ladder_object(
    checkpoint: Checkpoint,
    rungs: Sequence[Rung],
    best: Rung | None,
    kept: Mapping[str, Path],
    failure: QtoolError | None,
    warnings: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Return the JSON object of a ladder."""
    by_name = {rung.name: rung for rung in rungs}
    return {
        "schema": "qtool.quantize/1",
        "ok": failure is None,
        "exit_code": 0 if failure is None else failure.exit_code,
        "model": {
            "id": checkpoint.source,
            "revision": checkpoint.revision,
            "parameters": sum(ref.n_elements for ref in checkpoint.refs.values()),
        },
        "ladder": [rung_json(rung, won=rung is best) for rung in rungs],
        "winner": None if best is None else best.name,
        "artifacts": [
            {
                "rung": name,
                "format": by_name[name].plan.outputs[0].name,
                "path": str(path),
                "bytes": by_name[name].plan.outputs[0].n_bytes,
                "loads_in": list(by_name[name].plan.outputs[0].loads_in),
            }
            for name, path in kept.items()
        ],
        "environment": environment(),
        "warnings": [{"code": code, "message": message} for code, message in warnings],
        "error": None if failure is None else failure.as_json(),
    }


def ladder_table(
    checkpoint: Checkpoint,
    rungs: Sequence[Rung],
    best: Rung | None,
    kept: Mapping[str, Path],
    *,
    again: str = "",
) -> RenderableType:
    """Return what a person reads: the rungs from the largest on, and the next command."""
    titles = [
        "rung",
        "bits",
        "size",
        "perplexity ratio",
        "KL divergence",
        "same top",
        "seconds",
        "",
    ]
    table = ComparisonTable(titles, [_row(rung, won=rung is best) for rung in rungs])
    notes = [Text(printable_line(note)) for rung in rungs if (note := _note(rung))]
    gates = [
        Text(printable_line(f"gate {shown_outcome(outcome)}"))
        for rung in rungs
        if rung is best
        for outcome in rung.outcomes
    ]
    if best is not None and best.name in kept:
        path = _from_here(kept[best.name])
        following = f"next: qtool eval {typed(path)} --ref {checkpoint.source}"
        gates.append(Text(printable_line(f"wrote {typed(path)}")))
    elif again:
        following = f"next: qtool quantize {again}"
    else:
        following = f"next: qtool quantize {checkpoint.source} --ladder --gate EXPR"
    # Never wrapped: it is there to be copied.
    ending = Text(printable_line(following), no_wrap=True, overflow="ignore")
    parts = [part for lines in (notes, gates) if lines for part in (*lines, Text())]
    return Group(table, Text(), *parts, ending)


def _from_here(path: Path) -> Path:
    """Return a path below the working directory as one types it there."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _row(rung: Rung, *, won: bool) -> list[str]:
    head = [rung.name, f"{rung.plan.bits_per_weight:.2f}", shown_size(rung.n_bytes)]
    if rung.result is None:
        return [*head, "", "", "", "", rung.status]
    metrics = rung.result["metrics"]
    ppl, kld, top1 = metrics["ppl"], metrics["kld"], metrics["top1"]
    return [
        *head,
        _with_error(ppl.get("ratio"), ppl.get("ratio_se")),
        _with_error(kld["mean"], kld["se"]),
        f"{100 * top1['value']:.1f} %",
        f"{rung.seconds:.0f}",
        "WON" if won else rung.status,
    ]


def _note(rung: Rung) -> str:
    """Say why a rung did not win, in a line; empty where that needs no saying."""
    failed = [shown_outcome(outcome) for outcome in rung.outcomes if not outcome.passed]
    if failed:
        return "; ".join(failed)
    return f"{rung.name}: {rung.why}" if rung.why else ""


def _with_error(value: float, error: float | None) -> str:
    known = error is not None and math.isfinite(error)
    return f"{value:.4f}" + (f" ± {error:.4f}" if known else "")
