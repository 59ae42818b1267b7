"""`qtool estimate-memory`: what a model takes in every format, before anything is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qtool.cli import options
from qtool.cli.session import session
from qtool.errors import CapacityError, UsageError

if TYPE_CHECKING:
    from qtool.pipeline.estimate import Estimate

PHASES = ("infer", "quantize", "qlora")
SOLUTIONS = ("ctx", "format")
MOST_SEQUENCES = 1 << 16


def estimate_memory(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A size such as 8b or 30b-a3b, a model's name, a directory with config.json, a "
            "GGUF file or a hub id.",
            show_default=False,
        ),
    ],
    gpu: Annotated[
        Optional[str],  # noqa: UP045 - typer reads this at run time
        typer.Option("--gpu", help="rtx4090, h100, 24GB, 24GiB, 2x24GB, m3max-64gb."),
    ] = None,
    ram: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ram", help="Main memory for what the GPU does not hold: 64GB."),
    ] = None,
    ctx: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--ctx",
            "-c",
            help="Tokens of each sequence.",
            show_default="8192, or the model's if that is less",
            min=1,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", help="Sequences at the same time.", min=1, max=MOST_SEQUENCES)
    ] = 1,
    kv_dtype: Annotated[
        str,
        typer.Option("--kv-dtype", help="f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, fp8 or f32."),
    ] = "f16",
    formats: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "-f",
            "--format",
            help="bf16, fp8, int8, gptq:4:128, awq, compressed-tensors, nf4, gguf:Q4_K_M. "
            "Repeatable.",
            show_default="the usual ones",
        ),
    ] = None,
    phase: Annotated[
        str, typer.Option("--phase", help="infer, quantize (qtool itself) or qlora.")
    ] = "infer",
    solve: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--solve", help="ctx: largest context that fits; format: best that fits."),
    ] = None,
    explain: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--explain", metavar="FORMAT", help="The arithmetic of one row."),
    ] = None,
    fail_if_not_fit: Annotated[
        bool, typer.Option("--fail-if-not-fit", help="Exit with 4 if it does not fit.")
    ] = False,
    windows: options.Windows = None,
    seqlen: options.SequenceLength = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Say how much memory a model takes in every format, and which of them fit."""
    with session("estimate-memory", as_json=as_json, quiet=quiet, verbose=verbose) as terminal:
        _check(phase, PHASES, "--phase")
        _check(solve, (*SOLUTIONS, None), "--solve")
        from qtool.cli.estimate_report import shown
        from qtool.cli.estimate_result import result_of
        from qtool.memory.answers import Machine
        from qtool.memory.cache import CacheSettings, cache_type_named, check_context
        from qtool.memory.devices import devices_named
        from qtool.pipeline.estimate import Wanted, estimate, usual_context
        from qtool.pipeline.found_model import find_model
        from qtool.recipe.sizes import parse_size

        machine = Machine(
            None if gpu is None else devices_named(gpu), None if ram is None else parse_size(ram)
        )
        if not machine.named and (fail_if_not_fit or solve):
            flag = "--fail-if-not-fit" if fail_if_not_fit else f"--solve {solve}"
            raise UsageError(f"{flag} needs something to fit into", "add --gpu 24GB or --ram 64GB")
        if ctx is not None:
            check_context(ctx)
        kind = cache_type_named(kv_dtype)
        names = list(formats or [])
        if explain is not None and names and explain not in names:
            names.append(explain)
        found = find_model(model, revision=revision, offline=offline, thorough=explain is not None)
        context = usual_context(found.shape) if ctx is None else ctx
        wanted = Wanted(
            phase=phase,
            formats=tuple(names or ([explain] if explain and phase != "qlora" else [])),
            settings=CacheSettings(context, batch, kind, kind),
            machine=machine,
            length=ctx,
            windows=windows,
            window_length=seqlen,
        )
        result = estimate(found, wanted)
        for _, message in result.warnings:
            terminal.warn(message)
        missed = _missed(result, formats or []) if fail_if_not_fit else None
        value: dict[str, Any] = result_of(result, missed)
        terminal.result(value, shown(result, solve=solve, explain=explain))
        if missed is not None:
            terminal.error(missed)
            raise typer.Exit(missed.exit_code)


def _check(value: str | None, choices: tuple[str | None, ...], flag: str) -> None:
    if value not in choices:
        named = " or ".join(str(choice) for choice in choices if choice is not None)
        raise UsageError(f"unknown {flag} '{value}'", f"choose {named}")


def _missed(result: Estimate, formats: list[str]) -> CapacityError | None:
    """Return what --fail-if-not-fit complains of: every named format has to fit, or one of all."""
    rows, phase = result.rows, result.wanted.phase
    missing = [row.name for row in rows if not row.fits]
    if not missing or (not formats and len(missing) < len(rows)):
        return None
    if phase == "infer":
        what = ", ".join(missing) if formats else f"none of {len(rows)} formats"
        hint = f"a smaller format or --ctx, --kv-dtype q8_0; {rows[-1].name} is the smallest row"
    else:
        what = f"{result.model.shape.name} ({phase}: {', '.join(missing)})"
        hint = "fewer or shorter texts (--ctx, -n, -l), or a larger machine"
    verb = "fits" if not formats and phase == "infer" else "does not fit"
    return CapacityError(f"{what} {verb} into {result.machine.shown}", hint)
