"""`qtool quantize`: the whole line, from a model to files that engines load."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qtool.cli import options
from qtool.cli.session import session
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.checkpoint.locate import Checkpoint
    from qtool.console import Terminal
    from qtool.recipe.schema import Recipe

EVALUATIONS = ("quick", "none")


def quantize(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="MODEL", help="A model directory or hub id.", show_default="the recipe's"
        ),
    ] = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "-m", "--method", help="rtn, gptq, awq or awq+gptq.", show_default="awq; rtn at 8 bits"
        ),
    ] = None,
    bits: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-b", "--bits", help="2, 3, 4 or 8.", show_default="4"),
    ] = None,
    group_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "-g",
            "--group-size",
            help="Inputs that share one scale; -1: one scale per row, 0: per matrix.",
            show_default="128",
        ),
    ] = None,
    symmetric: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--sym/--asym", help="Zero points or none.", show_default="asym for awq"),
    ] = None,
    output_format: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "-f",
            "--format",
            help="gptq, awq, compressed-tensors or gguf:TYPE such as gguf:Q4_K_M. Repeatable: one "
            "calibration for all.",
            show_default="the method's own",
        ),
    ] = None,
    output: options.Output = None,
    dataset: options.Datasets = None,
    windows: options.Windows = None,
    seqlen: options.SequenceLength = None,
    chat_template: options.ChatTemplate = None,
    statistics: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--statistics",
            help="From qtool calibrate or llama-imatrix, instead of a dataset (rtn to GGUF, awq).",
        ),
    ] = None,
    act_order: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--act-order/--no-act-order",
            help="gptq: columns with the largest inputs first; costs nothing at inference.",
            show_default="on",
        ),
    ] = None,
    damp_percent: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--damp-percent", help="gptq: fraction of mean(diag H).", show_default="0.05"),
    ] = None,
    error_propagation: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--error-propagation",
            help="0 to 1: how far a layer repairs what those before it lost.",
            show_default="0.5",
        ),
    ] = None,
    clip: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--clip/--no-clip", help="Search scales for least error.", show_default="off for rtn"
        ),
    ] = None,
    ignore: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--ignore", metavar="PATTERN", help="Leave linears as they are. Repeatable."),
    ] = None,
    override: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--override",
            metavar="PATTERN=bits:8",
            help="Another scheme for some; for GGUF PATTERN=Q6_K. Repeatable.",
        ),
    ] = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--recipe", help="A YAML recipe; flags override it.", envvar="QTOOL_RECIPE"),
    ] = None,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key. Repeatable."),
    ] = None,
    seed: options.Seed = None,
    max_shard_size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--max-shard-size", help="Largest weight file.", show_default="5GB"),
    ] = None,
    output_type: options.OutputType = None,
    embed_type: options.EmbedType = None,
    pre: options.Pre = None,
    strict: options.Strict = False,
    split_max_size: options.SplitMaxSize = None,
    modelfile: options.Modelfile = False,
    max_ram: options.MaxRam = None,
    evaluation: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--eval",
            help="quick: measure the loss on 8 windows of 512 tokens; none.",
            show_default="the recipe's, or quick",
        ),
    ] = None,
    ladder: Annotated[
        bool,
        typer.Option(
            "--ladder",
            help="Try 8 bits by rtn, then 4 by rtn, awq, gptq and awq+gptq, and keep the smallest "
            "that passes every --gate. With -f gguf, the types from Q8_0 to Q4_K_M.",
        ),
    ] = False,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="With --ladder: keep every result that was made.")
    ] = False,
    gates: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--gate",
            metavar="EXPR",
            help="Exit code 3 unless the result meets it: kld<=0.05, loss<=3%, size<=5GB, any that "
            "eval knows. Repeatable.",
        ),
    ] = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; read no weights, write nothing.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize a model and write it for vLLM, GPTQModel, transformers, llama.cpp or Ollama."""
    with session(
        "quantize", as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress
    ) as terminal:
        if evaluation not in {*EVALUATIONS, None}:
            raise UsageError(f"unknown --eval '{evaluation}'", "choose quick or none")
        from qtool.cli.admission import admitted_for
        from qtool.cli.recipe_flags import build_recipe
        from qtool.recipe.ladder import steps_of

        flags = {
            "method": method,
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "formats": output_format,
            "datasets": dataset,
            "windows": windows,
            "sequence_length": seqlen,
            "chat_template": chat_template,
            "act_order": act_order,
            "damp_percent": damp_percent,
            "error_propagation": error_propagation,
            "clip": clip,
            "ignore": ignore,
            "override": override,
            "seed": seed,
            "revision": revision,
            "max_shard_size": max_shard_size,
            "evaluation": evaluation,
            "output_type": output_type,
            "embed_type": embed_type,
            "pre": pre,
            "strict": strict,
            "split_max_size": split_max_size,
            "modelfile": modelfile,
            "gates": gates,
            "ladder": ladder,
            "keep_all": keep_all,
        }
        built = build_recipe(model, recipe, flags, settings or [])
        checkpoint = admitted_for(
            steps_of(built)[-1].recipe if built.ladder else built,
            terminal,
            offline=offline,
            trust_remote_code=trust_remote_code,
            statistics=statistics,
            file=recipe,
        )
        if built.ladder:
            from qtool.cli.quantize_ladder import climb

            wanted = _run_settings(device, overwrite=overwrite, resume=resume, max_ram=max_ram)
            again = _again(model, flags, recipe=recipe, settings=settings, statistics=statistics)
            climb(
                terminal,
                checkpoint,
                built,
                wanted,
                output=output,
                statistics=statistics,
                keep_all=keep_all,
                dry_run=dry_run,
                again=again,
            )
            return
        if keep_all:
            raise UsageError("--keep-all is for a ladder", "add --ladder")
        _plan_and_run(
            terminal,
            checkpoint,
            built,
            again=_again(model, flags, recipe=recipe, settings=settings, statistics=statistics),
            dry_run=dry_run,
            output=output,
            statistics=statistics,
            device=device,
            overwrite=overwrite,
            resume=resume,
            max_ram=max_ram,
        )


# Flags whose names on the command line are not those of the parameters.
SPELLED = {"formats": "format", "datasets": "dataset", "evaluation": "eval", "gates": "gate"}
SWITCHES = {
    "symmetric": ("--sym", "--asym"),
    "act_order": ("--act-order", "--no-act-order"),
    "clip": ("--clip", "--no-clip"),
}


def _again(model: str | None, flags: dict[str, Any], **files: Any) -> str:
    """Return the arguments of this command line but for --output and --dry-run."""
    named = {SPELLED.get(k, k): v for k, v in flags.items() if k not in SWITCHES}
    named["set"] = files.pop("settings")
    switches = [SWITCHES[key][0 if flags[key] else 1] for key in SWITCHES if flags[key] is not None]
    words = [model or "", options.written({**named, **files}), *switches]
    return " ".join(word for word in words if word)


def _run_settings(device: str, *, overwrite: bool, resume: bool, max_ram: str | None) -> Any:
    from qtool import device as devices
    from qtool.pipeline.quantize import RunSettings
    from qtool.recipe.sizes import parse_size

    return RunSettings(
        device=devices.resolve(device),
        overwrite=overwrite,
        held_bytes=None if max_ram is None else parse_size(max_ram),
        resume=resume,
    )


def _plan_and_run(
    terminal: Terminal,
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    again: str,
    output: Path | None,
    statistics: Path | None,
    device: str,
    overwrite: bool,
    resume: bool,
    max_ram: str | None,
    dry_run: bool,
) -> None:
    from qtool import device as devices
    from qtool.checkpoint.output import commit_all
    from qtool.cli.quantize_measure import measurer_of
    from qtool.cli.quantize_report import plan_result, plan_table, run_result, run_table
    from qtool.cli.recipe_flags import destinations
    from qtool.evaluation.gates import gate_error, parse_gates
    from qtool.pipeline.measurement import check_gates_can_decide
    from qtool.pipeline.plan import make_plans
    from qtool.pipeline.quantize import (
        Calibration,
        Completed,
        check_outputs,
        completed,
    )

    pinned = recipe.model.model_copy(update={"revision": checkpoint.revision})
    recipe = recipe.model_copy(update={"model": pinned})
    plans = make_plans(checkpoint, recipe, importance=statistics is not None)
    places = dict(zip(recipe.export, destinations(recipe, checkpoint, output), strict=True))
    jobs = [(plan, [places[entry] for entry in plan.recipe.export]) for plan in plans]
    settings = _run_settings(device, overwrite=overwrite, resume=resume, max_ram=max_ram)
    check_outputs(list(places.values()), checkpoint, overwrite=overwrite, statistics=statistics)
    progress = terminal.progress()
    for plan, _ in jobs:
        for planned in plan.outputs:
            for code, message in planned.warnings:
                progress.warn(code, message)
    gates = parse_gates(recipe.gates)
    check_gates_can_decide(plans, gates)
    if dry_run:
        terminal.result(plan_result(jobs, progress.warnings), plan_table(jobs, again))
        return
    calibration = Calibration()
    measurer: Any = None
    with contextlib.ExitStack() as stack:
        finished: list[Completed] = []
        for plan, paths in jobs:
            terminal.note(
                f"{checkpoint.name}: {plan.method.name}, {plan.scheme}, {len(plan.linears)} "
                f"linears, {plan.bits_per_weight:.2f} bits per weight, on "
                f"{devices.describe(settings.device)}"
            )
            if calibration.empty:
                calibration = _calibration(plan, statistics, progress)
            if not finished:  # the text is tokenized once for all passes
                measurer = measurer_of(checkpoint, recipe, gates, settings.device, progress)
            run = completed(plan, paths, settings, progress, calibration, measurer)
            finished.append(stack.enter_context(run))
        # All at once: until then every part of the work can be gone on with.
        commit_all([place for done in finished for place in done.places])
    results = [(done.result, paths) for done, (_, paths) in zip(finished, jobs, strict=True)]
    terminal.result(run_result(results, progress.warnings), run_table(results))
    failure = gate_error([x for result, _ in results for m in result.measured for x in m.outcomes])
    if failure is not None:
        terminal.error(failure)
        raise typer.Exit(failure.exit_code)


def _calibration(plan: Any, statistics: Path | None, progress: Any) -> Any:
    """Return the windows or statistics that a plan needs."""
    from qtool.cli.calibration_data import calibration_windows
    from qtool.pipeline.calibrate import statistics_for
    from qtool.pipeline.outputs import CalibrationNote
    from qtool.pipeline.quantize import Calibration

    if statistics is not None:
        if plan.rounding.needs:
            raise UsageError(
                f"{plan.method.name} needs a Hessian, which a statistics file does not hold",
                "use --method awq or rtn with --statistics, or give a --dataset",
            )
        complete = plan.method.transform is not None
        moments, found = statistics_for(statistics, plan.checkpoint, complete=complete)
        for warning in found.warnings:
            progress.warn("statistics", warning)
        note = CalibrationNote(statistics.name, found.datasets, found.windows, len(found.moments))
        head = found.importance("output.weight")
        importance = {} if head is None else {"output.weight": head}
        return Calibration(statistics=moments, file=statistics, note=note, importance=importance)
    if not plan.calibrated:
        return Calibration()
    return Calibration(calibration_windows(plan.checkpoint, plan.recipe, progress))
