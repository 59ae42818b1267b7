"""What `qtool eval` says: the JSON object of its contract, and the tables a person reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtool.checkpoint.untrusted import printable
from qtool.cli.comparison_table import ComparisonTable
from qtool.cli.task_table import task_notes, task_table
from qtool.evaluation.buckets import bucket_json
from qtool.evaluation.domains import domain_json
from qtool.evaluation.gates import GateOutcome, gate_error, gate_json, shown_outcome
from qtool.evaluation.metrics_json import divergence_json
from qtool.evaluation.report_facts import Figure
from qtool.evaluation.report_numbers import percent_with_error, with_error
from qtool.evaluation.task_json import tasks_json
from qtool.pipeline.evaluate import NOISE_DTYPE, metrics_of
from qtool.pipeline.layer_errors import layer_errors
from qtool.pipeline.tokenizer_check import TokenizerCheck, tokenizer_json
from qtool.recipe.sizes import shown_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from qtool.calibration.tokens import Windows
    from qtool.checkpoint.locate import Checkpoint
    from qtool.evaluation.divergence import ApproximationError
    from qtool.evaluation.perplexity import Estimate
    from qtool.pipeline.evaluate import Evaluated, Evaluation
    from qtool.pipeline.evaluate_tasks import ModelTasks


@dataclass(frozen=True)
class Report:
    """One finished run.

    Args:
        evaluation: its figures.
        original: the model that all were compared with.
        windows: of the text; None where none was run.
        data: the text as the command line names it.
        length: tokens of a window.
        metrics: what was asked for.
        checks: of each model's tokenizer, in order.
        tasks: what each model reached in tasks, in order; empty without tasks.
    """

    evaluation: Evaluation
    original: Checkpoint | None
    windows: Windows | None
    data: str
    length: int
    metrics: tuple[str, ...]
    checks: Sequence[TokenizerCheck | None]
    tasks: Sequence[ModelTasks] = ()

    def names(self, result: Evaluated) -> tuple[str, ...]:
        """Return the metrics of one result: a GGUF file always has llama.cpp's own figure."""
        if self.windows is None:
            return ()
        if result.checkpoint.gguf and "ppl_llama_cpp" not in self.metrics:
            return (*self.metrics, "ppl_llama_cpp")
        return self.metrics


# --- for programs --------------------------------------------------------------------------------


def results_of(report: Report) -> list[dict[str, Any]]:
    """Return the figures of every model in the terms of the JSON contract."""
    pairs = zip(report.evaluation.results, report.checks, strict=True)
    found = [_result(report, result, check) for result, check in pairs]
    for result, tasks in zip(found, report.tasks, strict=bool(report.tasks)):
        result["metrics"]["tasks"] = tasks_json(tasks.scores)
        result["seconds"] += tasks.seconds
    return found


def result_object(
    report: Report,
    results: Sequence[Mapping[str, Any]],
    outcomes: Sequence[GateOutcome],
    warnings: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Return the JSON object `qtool.eval/1`; a failed gate is in it beside the figures."""
    failure = gate_error(outcomes)
    floor, original = report.evaluation.noise_floor, report.original
    value: dict[str, Any] = {
        "schema": "qtool.eval/1",
        "ok": failure is None,
        "exit_code": 0 if failure is None else failure.exit_code,
        "results": list(results),
        "gates": [gate_json(outcome) for outcome in outcomes],
        "warnings": [{"code": code, "message": message} for code, message in warnings],
        "error": None if failure is None else failure.as_json(),
    }
    if report.windows is not None:
        value["data"] = {
            "name": report.data,
            "context": report.length,
            "windows": len(report.windows.ids),
            "sha256": report.windows.sha256,
        }
    if original is not None:
        value["reference"] = {
            "model": original.source,
            "format": format_name(original),
            "bytes": original.file_bytes,
        }
    if floor is not None:
        value["noise_floor"] = {"dtype": NOISE_DTYPE, "kld": divergence_json(floor)}
    return value


def _result(report: Report, result: Evaluated, check: TokenizerCheck | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": result.checkpoint.source,
        "format": format_name(result.checkpoint),
        "bytes": result.n_bytes,
        "metrics": metrics_of(result, report.names(result)),
        "seconds": result.seconds,
    }
    if result.positions:
        found["positions"] = [bucket_json(bucket) for bucket in result.positions]
    if result.domains:
        found["domains"] = domain_json(result.domains)
    if check is not None:
        found["tokenizer"] = tokenizer_json(check)
    layers = layer_errors(result.checkpoint)
    if layers:
        found["layers"] = layers
    return found


def format_name(checkpoint: Checkpoint) -> str:
    """Return the format of a model: `float`, a quantization method, or `gguf:TYPE`."""
    if checkpoint.gguf:
        from qtool.formats.gguf_file_types import FILE_TYPES

        kind = checkpoint.gguf[0].metadata.get("general.file_type")
        number = None if kind is None else kind.content
        name = next((t.name for t in FILE_TYPES.values() if t.number == number), None)
        return "gguf" if name is None else f"gguf:{name}"
    declared = checkpoint.config.get("quantization_config") or {}
    return str(declared.get("quant_method", "float"))


# --- for people ----------------------------------------------------------------------------------


def render(report: Report, outcomes: Sequence[GateOutcome] = ()) -> RenderableType:
    """Return the tables, what there is to say about them, and the next command."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_table(report)]
    for result, _ in _by_size(report):
        parts += [p for t in (_positions(result), _domains(result)) if t for p in (Text(), t)]
    tasks = task_table(_tasks_by_size(report))
    parts += [Text(), tasks] if tasks is not None else []
    notes = [Text(printable_whole(note)) for note in _notes(report)]
    parts += [Text(), *notes] if notes else []
    parts += [Text(f"gate {shown_outcome(outcome)}") for outcome in outcomes]
    # Never wrapped: it is there to be copied.
    return Group(*parts, Text(), Text(_next(report), no_wrap=True, overflow="ignore"))


def printable_whole(text: str) -> str:
    """Return text of any length with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _plain_table(first: str, titles: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _table(report: Report) -> ComparisonTable:
    results = report.evaluation.results
    asked = {name for result in results for name in report.names(result)}
    compared = report.original is not None
    titles = ["model", "format", "size", *(["perplexity"] if report.windows is not None else [])]
    titles += ["llama.cpp's"] if "ppl_llama_cpp" in asked else []
    titles += ["ratio"] if compared and report.windows is not None else []
    titles += ["KL divergence", "99 % below"] if compared and "kld" in asked else []
    titles += ["same top"] if compared and "top1" in asked else []
    titles += ["flips"] if compared and "flips" in asked else []
    return ComparisonTable(titles, [_row(result, asked) for result, _ in _by_size(report)])


def _by_size(report: Report) -> list[tuple[Evaluated, TokenizerCheck | None]]:
    """Return results with what was found about their tokenizers, the smallest first."""
    both = zip(report.evaluation.results, report.checks, strict=True)
    return sorted(both, key=lambda pair: pair[0].n_bytes)


def _row(result: Evaluated, asked: set[str]) -> list[str]:
    name = printable(result.checkpoint.source)
    row = [name, format_name(result.checkpoint), shown_size(result.n_bytes)]
    if result.perplexity is None:
        return row
    row.append(_with_error(result.perplexity, 2))
    if "ppl_llama_cpp" in asked:
        row.append("" if result.llama_cpp is None else _with_error(result.llama_cpp, 2))
    comparison = result.comparison
    if comparison is None:
        return row
    row.append(with_error(_figure(comparison.ratio), 5))
    if "kld" in asked:
        row.append(with_error(_figure(comparison.divergence)))
        row.append(with_error(_figure(comparison.divergence_p99)))
    row += [percent_with_error(_figure(comparison.top1))] if "top1" in asked else []
    row += [percent_with_error(_figure(comparison.flips))] if "flips" in asked else []
    return row


def _positions(result: Evaluated) -> Table | None:
    if not result.positions:
        return None
    compared = result.positions[0].divergence is not None
    titles = ["loss", *(["original's", "KL divergence"] if compared else []), "tokens"]
    table = _plain_table(f"{printable(result.checkpoint.source)}, position", titles)
    for bucket in result.positions:
        row = [f"{bucket.start} to {bucket.stop}", _with_error(bucket.loss, 4)]
        if bucket.reference_loss is not None and bucket.divergence is not None:
            row.append(_with_error(bucket.reference_loss, 4))
            row.append(with_error(_figure(bucket.divergence)))
        table.add_row(*row, str(bucket.loss.tokens))
    return table


def _domains(result: Evaluated) -> Table | None:
    if not result.domains:
        return None
    compared = any(scores.divergence is not None for scores in result.domains.values())
    titles = ["perplexity", *(["original's", "KL divergence", "same top"] if compared else [])]
    table = _plain_table(f"{printable(result.checkpoint.source)}, domain", [*titles, "tokens"])
    for name, scores in result.domains.items():
        row = [name, f"{scores.perplexity.value:.2f}"]
        if scores.reference_perplexity is not None and scores.divergence is not None:
            row.append(f"{scores.reference_perplexity.value:.2f}")
            row.append(with_error(_figure(scores.divergence)))
        if scores.top1 is not None:
            row.append(percent_with_error(_figure(scores.top1)))
        table.add_row(*row, str(scores.perplexity.tokens))
    return table


def _notes(report: Report) -> list[str]:
    notes = [*_text_notes(report), *task_notes(report.tasks)]
    for result, check in _by_size(report):
        if check is not None and check.differences:
            source = result.checkpoint.source
            notes.append(f"TOKENIZER OF {source} DIFFERS: {'; '.join(check.differences)}")
        error = None if result.comparison is None else result.comparison.approximation
        if error is not None:
            off = with_error(_figure(error), 2)
            notes.append(
                f"{result.checkpoint.source}: divergence from the cache is off by "
                f"{off} (measured on {error.tokens} tokens)"
            )
    floor = report.evaluation.noise_floor
    if floor is not None:
        notes.append(
            f"noise floor: the original in {NOISE_DTYPE} diverges from itself by "
            f"{with_error(_figure(floor.divergence))}"
        )
    return notes


def _tasks_by_size(report: Report) -> list[tuple[str, ModelTasks]]:
    """Return every model's name and what it reached in tasks, the smallest first."""
    if not report.tasks:
        return []
    pairs = zip(report.evaluation.results, report.tasks, strict=True)
    ordered = sorted(pairs, key=lambda pair: pair[0].n_bytes)
    return [(result.checkpoint.source, tasks) for result, tasks in ordered]


def _text_notes(report: Report) -> list[str]:
    first = report.evaluation.results[0]
    if first.perplexity is None:
        return []
    note = (
        f"{first.perplexity.tokens} tokens of {report.data}, windows of {report.length} that do "
        "not overlap"
    )
    if first.comparison is not None:
        note += f"; original's perplexity {first.comparison.reference_perplexity.value:.3f}"
        half = first.comparison.second_half
        if half is not None and "ppl_llama_cpp" in report.names(first):
            note += f", {half[1].value:.3f} by llama.cpp's rule (second halves only)"
    return [note]


def _next(report: Report) -> str:
    first = report.evaluation.results[0].checkpoint
    source = printable(first.source)
    if report.original is not None:
        return f"next: qtool inspect {source}"
    if format_name(first) != "float":
        return f"next: qtool eval {source} --ref ORIGINAL"
    return f"next: qtool quantize {source}"


def _figure(estimate: Estimate | ApproximationError) -> Figure:
    """Return a mean as reports show it: to the digits that its standard error supports."""
    error = estimate.standard_error
    # Windows that are all alike say nothing about their spread.
    return Figure(estimate.value, error if error > 0 else None)


def _with_error(estimate: Estimate, digits: int) -> str:
    """Return a mean with its standard error, which one window alone does not give."""
    value = f"{estimate.value:.{digits}f}"
    error = estimate.standard_error
    return value if math.isnan(error) else f"{value} ± {error:.{digits}f}"
