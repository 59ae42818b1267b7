"""What `qtool export` prints."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.checkpoint.untrusted import printable
from qtool.cli.quantize_report import typed
from qtool.console import printable_line
from qtool.pipeline.artifact import environment
from qtool.pipeline.export import ExportPlan, ExportResult
from qtool.pipeline.float_directory import PlannedFloats
from qtool.pipeline.gguf_output import PlannedGguf
from qtool.recipe.sizes import shown_size


def export_result(
    plan: ExportPlan,
    path: Path,
    warnings: list[tuple[str, str]],
    result: ExportResult | None = None,
) -> dict[str, Any]:
    """Return the JSON object of a finished export, or of a dry run."""
    output = plan.output if result is None else result.plan.output
    artifact: dict[str, Any] = {
        "format": output.name,
        "path": str(_opened(output, path).absolute()),
        "bytes": output.n_bytes,
        "loads_in": list(output.loads_in),
    }
    if result is not None:
        artifact |= {"sha256": dict(result.digests), "verified": True}
    content: dict[str, Any] = {
        "schema": "qtool.export/1",
        "ok": True,
        "exit_code": 0,
        "dry_run": result is None,
        "model": {"id": plan.checkpoint.source, "revision": plan.checkpoint.revision},
        "types": type_counts(plan),
        "bits_per_weight": bits_per_weight(plan),
        "artifacts": [artifact],
        "environment": environment(),
        "warnings": [{"code": code, "message": message} for code, message in warnings],
        "error": None,
    }
    if result is not None:
        content["resources"] = {
            "peak_ram_bytes": result.peak_ram_bytes,
            "seconds": result.seconds,
        }
    return content


def _opened(output: PlannedGguf | PlannedFloats, path: Path) -> Path:
    return output.opened_at(path) if isinstance(output, PlannedGguf) else path


def type_counts(plan: ExportPlan) -> dict[str, int]:
    """Return how many tensors of each type are written."""
    output = plan.output
    if isinstance(output, PlannedGguf):
        return dict(Counter(x.kind for x in output.tensors))
    return dict(Counter(x.dtype for x in output.shards.tensors.values()))


def bits_per_weight(plan: ExportPlan) -> float:
    """Return the mean over all weights of what is written."""
    output = plan.output
    if isinstance(output, PlannedGguf):
        return output.bits_per_weight
    weights = sum(math.prod(x.shape) for x in output.shards.tensors.values())
    return 8 * output.shards.tensor_bytes / weights


def export_table(
    plan: ExportPlan, path: Path, arguments: str, result: ExportResult | None = None
) -> RenderableType:
    """Return what a person sees: types, size, time, the next command.

    Args:
        plan: what was planned.
        path: where the user wants the result.
        arguments: the command's, as the user gave them.
        result: None after a dry run.
    """
    output = plan.output if result is None else result.plan.output
    opened = typed(_opened(output, path))
    files = output.n_files if isinstance(output, PlannedGguf) else 1
    shown = opened if files == 1 else f"{opened}, the first of {files} parts"
    before, after = plan.checkpoint.total_bytes, output.n_bytes
    types = ", ".join(f"{count} {kind}" for kind, count in type_counts(plan).items())
    facts = [
        ("wrote" if result else "writes", shown),
        ("format", output.name),
        ("tensors", types),
        ("bits per weight", f"{bits_per_weight(plan):.3f} over all tensors"),
        ("size", f"{shown_size(after)}, was {shown_size(before)}"),
    ]
    if result is not None:
        seconds = f"{result.seconds:.{0 if result.seconds >= 10 else 1}f}"
        facts.append(("took", f"{seconds} s, peak memory {shown_size(result.peak_ram_bytes)}"))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts:
        table.add_row(label, Text(printable(value)))
    command = f"next: qtool eval {opened} --ref {plan.checkpoint.source}"
    if result is None:
        command = f"next: qtool export {arguments}"
    ending = Text(printable_line(command), no_wrap=True, overflow="ignore")
    return Group(table, Text(), ending)
