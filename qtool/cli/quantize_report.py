"""What `qtool quantize` prints: the plan, and the result with what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.checkpoint.untrusted import printable
from qtool.console import printable_line
from qtool.pipeline.artifact import calibration_of, environment, resources_of
from qtool.pipeline.plan import Plan
from qtool.pipeline.quantize import QuantizeResult
from qtool.recipe.sizes import shown_size

WORST_SHOWN = 5


def plan_result(plan: Plan, paths: list[Path]) -> dict[str, Any]:
    """Return the JSON object of a dry run."""
    return {
        **_head(plan),
        "dry_run": True,
        "artifacts": [
            {"format": o.format.name, "path": str(path.absolute()), "bytes": o.shards.n_bytes}
            for o, path in zip(plan.outputs, paths, strict=True)
        ],
        "tensors": [
            {
                "name": x.name,
                "shape": list(x.shape),
                "grid": x.grid.name,
                "bits_per_weight": x.grid.bits_per_weight(*x.shape),
            }
            for x in plan.linears
        ],
        "warnings": [],
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
            "grid": plan.linears[0].grid.name,
            "bits_per_weight": plan.bits_per_weight,
        },
    }


def plan_table(plan: Plan, paths: list[Path]) -> RenderableType:
    """Return what a dry run shows a person."""
    facts = [
        ("model", f"{plan.checkpoint.name} ({plan.family.name}, {plan.n_blocks} blocks)"),
        ("method", plan.method.name),
        *_schemes(plan),
        ("bits per weight", f"{plan.bits_per_weight:.3f} with scales"),
        ("reads", shown_size(plan.checkpoint.total_bytes)),
    ]
    for output, path in zip(plan.outputs, paths, strict=True):
        files = len(output.shards.shards)
        size = f"{shown_size(output.shards.n_bytes)} in {files} file{'s' if files > 1 else ''}"
        facts.append(("writes", f"{_typed(path)} ({output.format.name}, {size})"))
        facts.append(("loads in", ", ".join(output.format.loads_in)))
        facts.append(("kept", ", ".join(output.kept) or "nothing but embeddings and norms"))
    quantize = plan.recipe.quantize
    spread = f" -g {quantize.group_size}"
    source = printable(plan.checkpoint.source)
    command = f"next: qtool quantize {source} -m {quantize.method} -b {quantize.bits}{spread}"
    return Group(_facts(facts), Text(), Text(f"{command} -o {_typed(paths[0])}"))


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


def run_result(result: QuantizeResult, warnings: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the JSON object of a finished run."""
    plan = result.plan
    artifacts = [
        {
            "format": output.format.name,
            "path": str(path),
            "bytes": output.shards.n_bytes,
            "sha256": dict(digests),
            "loads_in": list(output.format.loads_in),
            "verified": True,
        }
        for output, path, digests in zip(plan.outputs, result.paths, result.digests, strict=True)
    ]
    return {
        **_head(plan),
        "calibration": calibration_of(result),
        "artifacts": artifacts,
        "metrics": result.metrics[0] if result.metrics else {},
        "gates": [],
        "resources": resources_of(result),
        "environment": environment(),
        "warnings": [{"code": code, "message": message} for code, message in warnings],
        "error": None,
    }


def run_table(result: QuantizeResult, paths: list[Path]) -> RenderableType:
    """Return what a finished run shows a person: sizes, loss, the worst layers, the next command.

    Args:
        result: of the run.
        paths: its outputs as the user gave them.
    """
    plan = result.plan
    facts = []
    before = plan.checkpoint.total_bytes
    for output, path in zip(plan.outputs, paths, strict=True):
        size = output.shards.n_bytes
        facts.append(("wrote", _typed(path)))
        facts.append(
            ("size", f"{shown_size(size)}, was {shown_size(before)} ({before / size:.2f} x less)")
        )
    facts.append(("bits per weight", f"{plan.bits_per_weight:.3f} with scales"))
    for metrics in result.metrics[:1]:
        facts += _metric_facts(metrics)
    ram, vram = shown_size(result.peak_ram_bytes), shown_size(result.peak_vram_bytes)
    gpu = f", {vram} on the GPU" if result.peak_vram_bytes else ""
    seconds = f"{result.seconds:.{0 if result.seconds >= 10 else 1}f}"
    facts.append(("took", f"{seconds} s, peak memory {ram}{gpu}"))
    command = f"next: qtool eval {_typed(paths[0])} --ref {plan.checkpoint.source}"
    # Never wrapped: it is there to be copied.
    ending = Text(printable_line(command), no_wrap=True, overflow="ignore")
    return Group(_facts(facts), Text(), _worst(result), Text(), ending)


def _typed(path: Path) -> str:
    """Return a path as one types it: what lies here starts with a dot."""
    return str(path) if path.is_absolute() or path.parts[:1] == ("..",) else f"./{path}"


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
