"""`qtool quantize`: the whole line, from a model to files that engines load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qtool.cli import options
from qtool.cli.session import session
from qtool.errors import UnsupportedError, UsageError

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
    device: options.Device = "auto",
    revision: options.Revision = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: options.Overwrite = False,
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
        }
        built = build_recipe(model, recipe, flags, settings or [])
        checkpoint = admitted_for(
            built,
            terminal,
            offline=offline,
            trust_remote_code=trust_remote_code,
            statistics=statistics,
            file=recipe,
        )
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
            max_ram=max_ram,
        )


# Flags whose names on the command line are not those of the parameters.
SPELLED = {"formats": "format", "datasets": "dataset", "evaluation": "eval"}
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
    max_ram: str | None,
    dry_run: bool,
) -> None:
    from qtool import device as devices
    from qtool.cli.quantize_report import plan_result, plan_table, run_result, run_table
    from qtool.cli.recipe_flags import destinations
    from qtool.pipeline.plan import make_plans
    from qtool.pipeline.quantize import RunSettings, check_outputs, run_plan
    from qtool.recipe.sizes import parse_size

    pinned = recipe.model.model_copy(update={"revision": checkpoint.revision})
    recipe = recipe.model_copy(update={"model": pinned})
    plans = make_plans(checkpoint, recipe, importance=statistics is not None)
    places = dict(zip(recipe.export, destinations(recipe, checkpoint, output), strict=True))
    jobs = [(plan, [places[entry] for entry in plan.recipe.export]) for plan in plans]
    settings = RunSettings(
        device=devices.resolve(device),
        overwrite=overwrite,
        held_bytes=None if max_ram is None else parse_size(max_ram),
    )
    check_outputs(list(places.values()), checkpoint, overwrite=overwrite, statistics=statistics)
    progress = terminal.progress()
    for plan, _ in jobs:
        for planned in plan.outputs:
            for code, message in planned.warnings:
                progress.warn(code, message)
    if dry_run:
        terminal.result(plan_result(jobs, progress.warnings), plan_table(jobs, again))
        return
    results: list[Any] = []
    data: dict[str, Any] = {}
    measure: Any = None
    for plan, paths in jobs:
        terminal.note(
            f"{checkpoint.name}: {plan.method.name}, {plan.scheme}, {len(plan.linears)} linears, "
            f"{plan.bits_per_weight:.2f} bits per weight, on {devices.describe(settings.device)}"
        )
        if not data:
            data = _calibration(plan, statistics, progress)
        if not results:  # the text is tokenized once for all passes
            measure = _measurement(checkpoint, recipe, settings, progress)
        result = run_plan(plan, paths, settings, progress, measure=measure, **data)
        results.append((result, paths))
    terminal.result(run_result(results, progress.warnings), run_table(results))


def _calibration(plan: Any, statistics: Path | None, progress: Any) -> dict[str, Any]:
    """Return the windows or statistics that a plan needs, as arguments of `run_plan`."""
    from qtool.cli.calibration_data import calibration_windows
    from qtool.pipeline.calibrate import statistics_for
    from qtool.pipeline.outputs import CalibrationNote

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
        return {"statistics": moments, "note": note, "importance": importance}
    if not plan.calibrated:
        return {}
    return {"windows": calibration_windows(plan.checkpoint, plan.recipe, progress)}


def _weights(directory: Path) -> Path:
    """Return what opens a result: its directory, or the GGUF file (the first part) in it."""
    return next(iter(sorted(directory.glob("*.gguf"))), directory)


def _measurement(checkpoint: Any, recipe: Recipe, settings: Any, progress: Any) -> Any:
    """Return a function that measures finished directories against the original, if asked to."""
    section = recipe.eval
    if not section.metrics:
        return None
    from qtool.calibration.datasets import parse_dataset
    from qtool.calibration.tokens import evaluation_windows
    from qtool.checkpoint.locate import locate
    from qtool.cli.calibration_data import load_tokenizer
    from qtool.evaluation.llama_cpp import check_installed
    from qtool.pipeline.evaluate import evaluate, metrics_of

    windows = evaluation_windows(
        load_tokenizer(checkpoint),
        parse_dataset(section.data),
        length=section.context,
        limit=section.windows,
    )

    def measure(directories: list[Path]) -> list[dict[str, Any]]:
        # Their directories still have hidden names.
        models = [
            replace(locate(str(_weights(path)), gguf=True), name="the result")
            for path in directories
        ]
        if any(model.gguf for model in models):
            try:
                check_installed()
            except UnsupportedError as error:
                progress.warn("not_measured", f"{error.message}; {error.hint}")
                return []
        found = evaluate(models, checkpoint, windows, settings.device, progress)
        return [metrics_of(result) for result in found]

    return measure
