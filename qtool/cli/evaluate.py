"""`qtool eval`: perplexity, what was lost against the original, and gates on both."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qtool.cli import options, task_options
from qtool.cli.session import session
from qtool.errors import InterruptionError
from qtool.recipe.sizes import MOST

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qtool.calibration.datasets import DatasetSpec
    from qtool.calibration.tokens import Windows
    from qtool.checkpoint.locate import Checkpoint
    from qtool.console import Terminal
    from qtool.evaluation.domains import DomainWindows
    from qtool.evaluation.gates import Gate
    from qtool.pipeline.progress import Progress
    from qtool.pipeline.tokenizer_check import TokenizerCheck

DEFAULT_CONTEXT = 2048
# Text that papers name without saying where it lies -> the dataset.
NAMED_DATA = {"wikitext-2": "hf:Salesforce/wikitext/wikitext-2-raw-v1:test:text"}


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Directories, float or packed, and .gguf files."),
    ],
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ref", metavar="ORIGINAL", help="The model they were made from."),
    ] = None,
    metrics: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--metrics",
            help="Of ppl, ppl_llama_cpp (second halves only), kld, top1, flips (fraction "
            "of tokens where one of MODEL and ORIGINAL finds the right next token likeliest and "
            "the other does not), all, or none to run no text.",
            show_default="ppl,kld,top1",
        ),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="builtin, wikitext-2, FILE.txt|jsonl|parquet, or hf:ID.")
    ] = "builtin",
    context: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "-l", "--ctx", help="Tokens of a window.", min=2, max=MOST, show_default="2048"
        ),
    ] = None,
    long_context: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--long-ctx",
            metavar="LENGTHS",
            help="Such as 4k,8k,16k: windows of the last length, and loss between each two.",
        ),
    ] = None,
    windows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-n", "--windows", help="Most windows.", min=1, max=MOST),
    ] = 16,
    every: Annotated[bool, typer.Option("--all", help="All windows of the data.")] = False,
    domains: Annotated[
        bool,
        typer.Option("--domains", help="Also by domain: prose, code, digits, other scripts."),
    ] = False,
    task_files: task_options.TaskFiles = None,
    tasks: task_options.Tasks = None,
    task_path: task_options.TaskPath = None,
    limit: task_options.Limit = None,
    fewshot: task_options.Fewshot = None,
    chat: task_options.ChatTemplate = False,
    gates: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--gate",
            metavar="EXPR",
            help="Fail with exit code 3 unless it holds: kld<=0.05, ppl_ratio<=1.03, loss<=3% "
            "(rise of perplexity), top1>=0.9, size<=5GB, template==same, task:NAME>=60%, "
            "task_drop:NAME<=1%. Repeatable.",
        ),
    ] = None,
    noise_floor: Annotated[
        bool,
        typer.Option("--noise-floor", help="Also compare ORIGINAL with itself in bfloat16."),
    ] = False,
    logits_cache: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--logits-cache",
            metavar="DIR",
            help="Keep what is needed of ORIGINAL's logits, and answers to tasks, for other models "
            "and after Ctrl-C.",
            envvar="QTOOL_LOGITS_CACHE",
        ),
    ] = None,
    report_directory: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--report",
            metavar="DIR",
            help="Write a page to look at: index.html, REPORT.md, plots and report.json.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="To compute in: float32, bfloat16, float16.")
    ] = "float32",
    device: options.Device = "auto",
    revision: options.Revision = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustTaskCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure perplexity and KL divergence from the original model, and hold them to gates."""
    with session(
        "eval", as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress
    ) as terminal:
        from qtool.evaluation.gates import check_gates, gate_error, parse_gates

        limits = parse_gates(gates)
        _check_report(report_directory, ())
        from functools import partial

        from qtool.calibration.datasets import parse_dataset
        from qtool.cli.admission import admitted, check_files

        text = parse_dataset(NAMED_DATA.get(data, data))
        _check_domains(text, data, wanted=domains)
        admit = partial(
            admitted,
            terminal=terminal,
            offline=offline,
            gguf=True,
            trust_remote_code=trust_remote_code,
            datasets=[text],
            needs_tokenizer=True,
        )
        original = None if reference is None else admit(reference, revision=revision)
        # --revision is that of the original, or without one of the models themselves.
        own = revision if reference is None else None
        found = [admit(name, revision=own) for name in models]
        read = [*found, *([original] if original else [])]
        check_files(read)
        _check_report(report_directory, read)

        asked = task_options.TaskRequest(
            task_files,
            tasks,
            task_path,
            limit,
            fewshot,
            chat=chat,
            offline=offline,
            trusted=trust_remote_code,
        )
        names = _names(metrics, limits, asked.names, has_reference=reference is not None)
        ends, length = _lengths(context, long_context)
        _check_text_wanted(names, domains=domains, noise_floor=noise_floor, positions=bool(ends))

        from qtool import device as devices
        from qtool.cli.evaluate_report import Report, render, result_object, results_of
        from qtool.pipeline.evaluate import Extent, dtype_of, evaluate_fully, without_text

        target = devices.resolve(device)
        dtype_of(dtype)  # refused before anything is run
        progress = terminal.progress()
        checks = _checked_tokenizers(found, original, progress)
        suite = asked.suite()
        tokens, evaluation = None, without_text(found)
        with _saying_what_is_kept(logits_cache if original or suite else None):
            if names:
                most = None if every else windows
                tokens, apart = _windows(original, found, text, length, most, domains=domains)
                _warn_of_length([*found, *([original] if original else [])], length, progress)
                cache = logits_cache if original is not None else None
                extent = Extent(ends, apart, cache, noise_floor)
                evaluation = evaluate_fully(
                    found, original, tokens, target, progress, extent, dtype=dtype
                )
            scores = task_options.scored(
                suite, found, original, target, progress, dtype, logits_cache
            )
        report = Report(evaluation, original, tokens, data, length, names, checks, scores)
        results = results_of(report)
        outcomes = check_gates(limits, results)
        value = result_object(report, results, outcomes, progress.warnings)
        terminal.result(value, render(report, outcomes))
        if report_directory is not None:
            _write_report(value, found, report_directory, terminal)
        failure = gate_error(outcomes)
        if failure is not None:
            terminal.error(failure)
            raise typer.Exit(failure.exit_code)


@contextmanager
def _saying_what_is_kept(cache: Path | None) -> Iterator[None]:
    """Tell who interrupts an evaluation what it need not compute again."""
    try:
        yield
    except KeyboardInterrupt as error:
        if cache is None:
            raise
        raise InterruptionError(
            "interrupted",
            f"run the same command to go on: what is known so far is kept in {cache}",
            resumable=True,
        ) from error


def _check_report(directory: Path | None, models: Sequence[Checkpoint]) -> None:
    """Refuse a place for the report, before and when it is known which models are read."""
    if directory is not None:
        from qtool.evaluation.report import check_report

        # A GGUF file lies where people work: its directory is no model.
        check_report(directory, [x.path for x in models if x.path.is_dir() and not x.gguf])


def _write_report(
    value: dict[str, Any], models: list[Checkpoint], directory: Path, terminal: Terminal
) -> None:
    """Write the report, with the layers' errors that quantize noted beside a model."""
    from qtool.evaluation.report import write_report
    from qtool.evaluation.report_layers import with_layers
    from qtool.evaluation.report_png import EXTRA, can_draw

    places = [m.gguf[0].path if m.gguf else m.path for m in models]
    written = write_report(with_layers(value, places), directory)
    terminal.note(f"report: {written[0]}")
    if not can_draw() and any(path.suffix == ".svg" for path in written):
        terminal.note(f"PNG files of the plots need: {EXTRA}")


def _names(
    metrics: str | None, gates: Sequence[Gate], tasks: Sequence[str], *, has_reference: bool
) -> tuple[str, ...]:
    """Return the metrics that flags and gates ask for; none where no text is to be run.

    Raises:
        UsageError: an unknown one, or one that needs an original where there is none.
    """
    from qtool.errors import UsageError
    from qtool.evaluation.gates import check_measurable, needed_metrics
    from qtool.evaluation.metrics_json import METRICS, NEED_REFERENCE, parse_metrics

    chosen = parse_metrics(metrics)
    check_measurable(gates, has_reference=has_reference, tasks=tasks)
    alone = [name for name in chosen if name in NEED_REFERENCE]
    if metrics is not None and metrics.strip() != "all" and alone and not has_reference:
        raise UsageError(
            f"--metrics {alone[0]} compares with an original, and none is given",
            "give it with --ref ORIGINAL",
        )
    needed = needed_metrics(gates)
    wanted = {*chosen, *needed, *(("ppl",) if chosen or needed else ())}
    return tuple(name for name in METRICS if name in wanted)


def _check_text_wanted(
    names: Sequence[str], *, domains: bool, noise_floor: bool, positions: bool
) -> None:
    """Refuse to leave the text out where other flags are about it."""
    from qtool.errors import UsageError

    flags = (("--domains", domains), ("--noise-floor", noise_floor), ("--long-ctx", positions))
    about = next((flag for flag, given in flags if given), None)
    if not names and about is not None:
        raise UsageError(f"{about} is about the text that --metrics none leaves out", "drop one")


def _lengths(context: int | None, long_context: str | None) -> tuple[tuple[int, ...], int]:
    """Return the ends of position buckets, if any, and the length of a window.

    Raises:
        UsageError: lengths that are none, or two flags that contradict each other.
    """
    from qtool.errors import UsageError
    from qtool.evaluation.buckets import parse_long_context

    if long_context is None:
        return (), context or DEFAULT_CONTEXT
    ends = parse_long_context(long_context)
    if context not in {None, ends[-1]}:
        raise UsageError(
            f"--ctx {context} and --long-ctx {long_context} want windows of different lengths",
            "leave --ctx out: windows are as long as the last of --long-ctx",
        )
    return ends, ends[-1]


def _check_domains(text: DatasetSpec, data: str, *, wanted: bool) -> None:
    from qtool.errors import UsageError

    if wanted and text.kind != "builtin":
        raise UsageError(
            f"--domains is about the builtin texts, not about {data}", "leave --data out"
        )


def _warn_of_length(models: list[Checkpoint], length: int, progress: Progress) -> None:
    """Warn where windows are longer than a model was made for."""
    for model in models:
        if model.gguf:
            metadata = model.gguf[0].metadata
            architecture = metadata.get("general.architecture")
            key = f"{architecture.content if architecture else ''}.context_length"
            value = metadata.get(key)
            most = value.content if value else None
        else:
            most = model.config.get("max_position_embeddings")
        if isinstance(most, int) and length > most > 0:
            progress.warn(
                "beyond_context",
                f"{model.name} was made for {most} tokens, windows have {length}: "
                "the loss beyond says nothing about its quantization",
            )


def _checked_tokenizers(
    models: list[Checkpoint], original: Checkpoint | None, progress: Progress
) -> list[TokenizerCheck | None]:
    """Compare every model's tokenizer with the original's and warn loudly of differences."""
    from qtool.pipeline.tokenizer_check import check_tokenizer

    if original is None:
        return [None for _ in models]
    checks = []
    for model in models:
        check = check_tokenizer(model, original)
        checks.append(check)
        if check is None:
            progress.warn(
                "tokenizer_not_compared",
                f"the tokenizers of {model.name} and {original.name} cannot be compared: "
                "llama.cpp has none like that of the directory",
            )
            continue
        message = check.warning(model.name, original.name)
        if message is not None:
            progress.warn("tokenizer_differs", message)
    return checks


def _windows(
    original: Checkpoint | None,
    models: list[Checkpoint],
    text: DatasetSpec,
    length: int,
    limit: int | None,
    *,
    domains: bool,
) -> tuple[Windows, DomainWindows | None]:
    """Tokenize the text."""
    from qtool.calibration.tokens import evaluation_windows
    from qtool.cli.calibration_data import check_ids
    from qtool.cli.text_tokenizer import text_tokenizer

    with text_tokenizer(original, models) as tokenizer:
        found = evaluation_windows(tokenizer, text, length=length, limit=limit)
        chosen = original or next((model for model in models if not model.gguf), models[0])
        check_ids(chosen, found)
        if not domains:
            return found, None
        from qtool.evaluation.domains import domain_windows

        return found, domain_windows(tokenizer, length)
