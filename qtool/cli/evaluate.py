"""`qtool eval`: perplexity, and what was lost against the original."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qtool.cli import options
from qtool.cli.session import session

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qtool.calibration.datasets import DatasetSpec
    from qtool.calibration.tokens import Windows
    from qtool.checkpoint.locate import Checkpoint
    from qtool.evaluation.perplexity import Estimate
    from qtool.pipeline.evaluate import Evaluated


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Directories, float or packed, and .gguf files."),
    ],
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ref", metavar="ORIGINAL", help="The model they were made from."),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="builtin, FILE.txt|jsonl|parquet, or hf:ID.")
    ] = "builtin",
    context: Annotated[int, typer.Option("-l", "--ctx", help="Tokens of a window.", min=2)] = 2048,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-n", "--windows", help="Most windows.", min=1),
    ] = 16,
    every: Annotated[bool, typer.Option("--all", help="All windows of the data.")] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="To compute in: float32, bfloat16, float16.")
    ] = "float32",
    device: options.Device = "auto",
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity, and KL divergence from the original model."""
    with session(
        "eval", as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress
    ) as terminal:
        from qtool import device as devices
        from qtool.calibration.datasets import parse_dataset
        from qtool.checkpoint.locate import locate
        from qtool.pipeline.evaluate import evaluate as run

        target = devices.resolve(device)
        original = None if reference is None else locate(reference, revision, offline, gguf=True)
        # --revision is that of the original, or without one of the models themselves.
        own = revision if reference is None else None
        found = [locate(name, own, offline, gguf=True) for name in models]
        limit = None if every else windows
        tokens = _windows(original, found, parse_dataset(data), context, limit)
        results = run(found, original, tokens, target, terminal.progress(), dtype=dtype)
        terminal.result(
            _result(results, tokens, data, context), _table(results, reference, data, context)
        )


def _windows(
    original: Checkpoint | None,
    models: list[Checkpoint],
    text: DatasetSpec,
    context: int,
    limit: int | None,
) -> Windows:
    """Tokenize the text as the original does, or else a directory, or else the first model."""
    from qtool.calibration.tokens import evaluation_windows

    directories = (model for model in models if not model.gguf)
    chosen = original or next(directories, models[0])
    if chosen.gguf:
        from qtool.evaluation.gguf_model import GgufTokenizer

        with GgufTokenizer(chosen) as tokenizer:
            return evaluation_windows(tokenizer, text, length=context, limit=limit)
    from qtool.cli.calibration_data import load_tokenizer

    return evaluation_windows(load_tokenizer(chosen), text, length=context, limit=limit)


def _result(results: list[Evaluated], windows: Any, data: str, context: int) -> dict[str, Any]:
    from qtool.pipeline.evaluate import metrics_of

    return {
        "schema": "qtool.eval/1",
        "ok": True,
        "exit_code": 0,
        "data": {
            "name": data,
            "context": context,
            "windows": len(windows.ids),
            "sha256": windows.sha256,
        },
        "results": [
            {
                "model": r.checkpoint.source,
                "format": _format_name(r),
                "bytes": r.n_bytes,
                "metrics": metrics_of(r),
                "seconds": r.seconds,
            }
            for r in results
        ],
        "warnings": [],
        "error": None,
    }


def _format_name(result: Evaluated) -> str:
    if result.checkpoint.gguf:
        from qtool.formats.gguf_file_types import FILE_TYPES

        kind = result.checkpoint.gguf[0].metadata.get("general.file_type")
        number = None if kind is None else kind.content
        name = next((t.name for t in FILE_TYPES.values() if t.number == number), None)
        return "gguf" if name is None else f"gguf:{name}"
    declared = result.checkpoint.config.get("quantization_config") or {}
    return str(declared.get("quant_method", "float"))


def _table(
    results: list[Evaluated], reference: str | None, data: str, context: int
) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from qtool.checkpoint.untrusted import printable
    from qtool.recipe.sizes import shown_size

    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("format", "size", "perplexity"):
        table.add_column(title, justify="right", no_wrap=True)
    compared = reference is not None
    for title in ("ratio", "KL divergence", "same top") if compared else ():
        table.add_column(title, justify="right", no_wrap=True)
    for r in sorted(results, key=lambda r: r.n_bytes):
        ppl = _with_error(r.perplexity, 2)
        row = [printable(r.checkpoint.source), _format_name(r), shown_size(r.n_bytes), ppl]
        if r.comparison is not None:
            kl = r.comparison.divergence
            row += [
                f"{r.perplexity.value / r.comparison.reference_perplexity.value:.4f}",
                _with_error(kl, 4),
                f"{100 * r.comparison.top1.value:.1f} %",
            ]
        table.add_row(*row)
    tokens = results[0].perplexity.tokens
    notes = f"{tokens} tokens of {data}, windows of {context} that do not overlap"
    original = results[0].comparison
    if original is not None:
        notes += f"; original's perplexity {original.reference_perplexity.value:.3f}"
    first = printable(results[0].checkpoint.source)
    ending = f"next: qtool inspect {first}" if compared else f"next: qtool quantize {first}"
    if not compared and _format_name(results[0]) != "float":
        ending = f"next: qtool eval {first} --ref ORIGINAL"
    # Never wrapped: it is there to be copied.
    shown = Text(ending, no_wrap=True, overflow="ignore")
    return Group(table, Text(), Text(printable(notes)), Text(), shown)


def _with_error(estimate: Estimate, digits: int) -> str:
    """Return a mean with its standard error, which one window alone does not give."""
    value = f"{estimate.value:.{digits}f}"
    error = estimate.standard_error
    return value if math.isnan(error) else f"{value} ± {error:.{digits}f}"
