"""What `qtool quantize` prints: the plan, and the result with what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.checkpoint.untrusted import printable, shown_path
from qtool.console import printable_line
from qtool.evaluation.gates import gate_error, gate_json, shown_outcome
from qtool.pipeline.artifact import calibration_of, environment, resources_of
from qtool.pipeline.gguf_output import PlannedGguf
from qtool.pipeline.outputs import PlannedOutput
from qtool.pipeline.plan import Plan
from qtool.pipeline.quantize import QuantizeResult
from qtool.recipe.sizes import shown_size

WORST_SHOWN = 5


Job = tuple[Plan, list[Path]]
Finished = tuple[QuantizeResult, list[Path]]


def plan_result(jobs: list[Job], warnings: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the JSON object of a dry run."""
    return {
        **_head(jobs[0][0]),
        "dry_run": True,
        "artifacts": [
            {"format": o.name, "path": str(_placed(o, path).absolute()), "bytes": o.n_bytes}
            for plan, paths in jobs
            for o, path in zip(plan.outputs, paths, strict=True)
        ],
        "tensors": [
            {
                "name": x.name,
                "shape": list(x.shape),
                "grid": x.grid.name,
                "bits_per_weight": x.grid.bits_per_weight(*x.shape),
            }
            for x in jobs[0][0].linears
        ],
        "warnings": [{"code": code, "message": message} for code, message in warnings],
        "error": None,
    }


def _head(plan: Plan) -> dict[str, Any]:
    return {
        "schema": "qtool.quantize/1",
        "ok": True,
        "exit_code": 0,
        "model": {
            "id": plan.checkpoint.source,
            "revision": plan.checkpoint.revision,
            "parameters": sum(ref.n_elements for ref in plan.checkpoint.refs.values()),
        },
        "quantization": {
            "method": plan.method.name,
            "grid": plan.scheme,
            "bits_per_weight": plan.bits_per_weight,
        },
    }


def plan_table(jobs: list[Job], again: str) -> RenderableType:
    """Return what a dry run shows a person; `again` are the arguments of the command line."""
    first = jobs[0][0]
    facts = [
        ("model", f"{first.checkpoint.name} ({first.family.name}, {first.n_blocks} blocks)"),
        ("method", first.method.name),
        ("reads", shown_size(first.checkpoint.total_bytes)),
    ]
    for plan, paths in jobs:
        facts += _schemes(plan)
        if plan.linears:
            facts.append(("bits per weight", f"{plan.bits_per_weight:.3f} with scales"))
        for output, path in zip(plan.outputs, paths, strict=True):
            files = output.n_files
            size = f"{shown_size(output.n_bytes)} in {files} file{'s' if files > 1 else ''}"
            facts.append(("writes", f"{typed(_placed(output, path))} ({output.name}, {size})"))
            facts.append(("loads in", ", ".join(output.loads_in)))
            facts.append(("kept", ", ".join(output.kept) or _never_rounded(output)))
    command = printable_line(f"next: qtool quantize {again}")
    if len(jobs) == 1 and len(jobs[0][1]) == 1:
        command += f" -o {typed(jobs[0][1][0])}"
    return Group(_facts(facts), Text(), Text(command, no_wrap=True, overflow="ignore"))


def _never_rounded(output: PlannedOutput) -> str:
    gguf = output.name.startswith("gguf:")
    return "nothing but norms" if gguf else "nothing but embeddings and norms"


def _schemes(plan: Plan) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for linear in plan.linears:
        counts[linear.grid.name] = counts.get(linear.grid.name, 0) + 1
    return [("scheme", f"{name} for {count} linears") for name, count in counts.items()]


def _facts(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, Text(printable(value)))
    return table


def run_result(finished: list[Finished], warnings: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the JSON object of a finished run."""
    first = finished[0][0]
    outcomes = [x for result, _ in finished for m in result.measured for x in m.outcomes]
    failure = gate_error(outcomes)
    artifacts = [
        {
            "format": output.name,
            "path": str(_placed(output, path)),
            "bytes": output.n_bytes,
            "sha256": dict(digests),
            "loads_in": list(output.loads_in),
            "verified": True,
        }
        for result, _ in finished
        for output, path, digests in zip(
            result.plan.outputs, result.paths, result.digests, strict=True
        )
    ]
    resources = resources_of(first)
    resources["seconds"] = sum(result.seconds for result, _ in finished)
    return {
        **_head(first.plan),
        "ok": failure is None,
        "exit_code": 0 if failure is None else failure.exit_code,
        "calibration": calibration_of(first),
        "artifacts": artifacts,
        "metrics": first.metrics[0] if first.metrics else {},
        "gates": [gate_json(outcome) for outcome in outcomes],
        "resources": resources,
        "environment": environment(),
        "warnings": [{"code": code, "message": message} for code, message in warnings],
        "error": None if failure is None else failure.as_json(),
    }


def run_table(finished: list[Finished]) -> RenderableType:
    """Return what a finished run shows a person: sizes, loss, the worst layers, the next command.

    Args:
        finished: results of the runs, with their outputs as the user gave them.
    """
    facts = []
    for result, paths in finished:
        plan = result.plan
        before = plan.checkpoint.total_bytes
        for output, path in zip(plan.outputs, paths, strict=True):
            size = output.n_bytes
            less = f"{shown_size(size)}, was {shown_size(before)} ({before / size:.2f} x less)"
            facts += [("wrote", typed(_placed(output, path))), ("size", less)]
        if plan.linears:
            facts.append(("bits per weight", f"{plan.bits_per_weight:.3f} with scales"))
        for metrics in result.metrics[:1]:
            facts += _metric_facts(metrics)
        for measured in result.measured:
            facts += [("gate", shown_outcome(outcome)) for outcome in measured.outcomes]
    first, paths = finished[0]
    peak = max(result.peak_ram_bytes for result, _ in finished)
    ram, vram = shown_size(peak), shown_size(first.peak_vram_bytes)
    gpu = f", {vram} on the GPU" if first.peak_vram_bytes else ""
    total = sum(result.seconds for result, _ in finished)
    seconds = f"{total:.{0 if total >= 10 else 1}f}"
    facts.append(("took", f"{seconds} s, peak memory {ram}{gpu}"))
    command = f"next: qtool eval {_opened(first, paths[0])} --ref {first.plan.checkpoint.source}"
    # Never wrapped: it is there to be copied.
    ending = Text(printable_line(command), no_wrap=True, overflow="ignore")
    worst: list[RenderableType] = [_worst(first), Text()] if first.layers else []
    return Group(_facts(facts), Text(), *worst, ending)


def _opened(result: QuantizeResult, path: Path) -> str:
    """Return what is given to `eval`: a directory, or a GGUF file."""
    output = result.plan.outputs[0]
    return typed(output.opened_at(path) if isinstance(output, PlannedGguf) else path)


def _placed(output: PlannedOutput, path: Path) -> Path:
    """Return the directory, or the file (the first part of several) that was asked for."""
    if isinstance(output, PlannedGguf) and path.suffix == ".gguf":
        return output.opened_at(path)
    return path


def typed(path: Path) -> str:
    """Return a path as one types it: what lies here starts with a dot."""
    shown = shown_path(path)
    return shown if path.is_absolute() or path.parts[:1] == ("..",) else f"./{shown}"


def _metric_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    ppl, kld, top1 = metrics["ppl"], metrics["kld"], metrics["top1"]
    # One window alone gives no standard error.
    error = "" if math.isnan(kld["se"]) else f" ± {kld['se']:.4f}"
    return [
        ("perplexity", f"{ppl['value']:.3f}, was {ppl['reference']:.3f} ({ppl['ratio']:.4f} x)"),
        ("KL divergence", f"{kld['mean']:.4f}{error}, 99 % below {kld['p99']:.3f}"),
        ("same top token", f"{100 * top1['value']:.1f} % of {top1['tokens']} tokens"),
    ]


def _worst(result: QuantizeResult) -> Table:
    table = Table(box=None, pad_edge=False, title=None)
    table.add_column("layers that lost most", no_wrap=True)
    table.add_column("relative error", justify="right")
    table.add_column("against rtn", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("")
    layers = sorted(result.layers, key=lambda layer: -layer.relative_error)[:WORST_SHOWN]
    for layer in layers:
        ratio = "-" if layer.against_rtn is None else f"{layer.against_rtn:.2f} x"
        table.add_row(
            printable(layer.name),
            f"{layer.relative_error:.4f}",
            ratio,
            f"{layer.bits_per_weight:.2f}",
            layer.fallback,
        )
    return table
