"""`qtool quantize --ladder`: try ways from the largest on, keep the smallest that passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qtool.errors import GateError, InterruptionError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qtool.checkpoint.locate import Checkpoint
    from qtool.checkpoint.output import OutputDirectory
    from qtool.checkpoint.work_directory import WorkDirectory
    from qtool.console import Terminal
    from qtool.pipeline.ladder import Rung, RungPlan
    from qtool.pipeline.quantize import RunSettings
    from qtool.recipe.schema import Recipe


def climb(
    terminal: Terminal,
    checkpoint: Checkpoint,
    recipe: Recipe,
    settings: RunSettings,
    *,
    output: Path | None,
    statistics: Path | None,
    keep_all: bool,
    dry_run: bool,
    again: str,
) -> None:
    """Carry a ladder out and print what came of it.

    Raises:
        typer.Exit: no rung passed, exit code 3.
        QtoolError: as quantizing raises.
    """
    from qtool.pipeline.ladder import winner

    if statistics is not None:
        raise UsageError(
            "a ladder calibrates on text, since some of its rungs need a Hessian",
            "leave --statistics away",
        )
    pinned = recipe.model.model_copy(update={"revision": checkpoint.revision})
    recipe = recipe.model_copy(update={"model": pinned})
    rungs = _planned(checkpoint, recipe, output)
    finals = {rung.name: _final(rung, recipe, checkpoint, output, keep_all) for rung in rungs}
    work = _work(checkpoint, recipe, output, next(iter(finals.values())))
    work.sweep()  # whatever is refused now, what a killed run was removing goes
    places = {name: _place(path, checkpoint, settings) for name, path in finals.items()}
    if dry_run:
        _show_plan(terminal, checkpoint, rungs, again)
        return
    progress = terminal.progress()
    _check_runs(rungs)
    found, kept = _climbed(
        checkpoint, recipe, rungs, settings, work, places, progress, keep_all=keep_all
    )
    best = winner(found)
    from qtool.cli.quantize_ladder_report import ladder_object, ladder_table

    failure = None if best is not None else _none_passed(found, again)
    value = ladder_object(checkpoint, found, best, kept, failure, progress.warnings)
    terminal.result(value, ladder_table(checkpoint, found, best, kept))
    if failure is not None:
        terminal.error(failure)
        raise typer.Exit(failure.exit_code)


def _planned(checkpoint: Checkpoint, recipe: Recipe, output: Path | None) -> list[RungPlan]:
    """Plan every rung; whatever is impossible is refused before the first is tried."""
    from qtool.pipeline.ladder import RungPlan, named
    from qtool.pipeline.plan import make_plan
    from qtool.recipe.ladder import steps_of

    found = []
    for step in steps_of(recipe):
        plan = make_plan(checkpoint, step.recipe)
        if output is not None and output.suffix == ".gguf":
            plan = named(plan, output.stem)
        found.append(RungPlan(step.name, plan))
    return found


def _final(
    rung: RungPlan, recipe: Recipe, checkpoint: Checkpoint, output: Path | None, keep_all: bool
) -> Path:
    """Return what a rung's output is called if it is kept."""
    from qtool.cli.recipe_flags import destinations

    given = output if output is not None else Path(recipe.output) if recipe.output else None
    if given is not None and keep_all:
        return given / rung.name
    return destinations(rung.plan.recipe, checkpoint, given)[0]


def _work(
    checkpoint: Checkpoint, recipe: Recipe, output: Path | None, first: Path
) -> WorkDirectory:
    """Return where rungs are tried: beside the output, and named after it where it has a name."""
    from qtool.checkpoint.work_directory import WorkDirectory

    given = output if output is not None else Path(recipe.output) if recipe.output else None
    name = checkpoint.name if given is None else given.resolve().name
    return WorkDirectory(first.parent.resolve() / f"{name}-ladder")


def _place(final: Path, checkpoint: Checkpoint, settings: RunSettings) -> OutputDirectory:
    from qtool.checkpoint.output import output_place

    return output_place(final, overwrite=settings.overwrite, sources=[checkpoint.path])


def _check_runs(rungs: Sequence[RungPlan]) -> None:
    """Refuse GGUF rungs that could not be measured here."""
    if any(rung.plan.outputs[0].name.startswith("gguf:") for rung in rungs):
        from qtool.evaluation.llama_cpp import check_installed

        check_installed()


def _climbed(
    checkpoint: Checkpoint,
    recipe: Recipe,
    rungs: Sequence[RungPlan],
    settings: RunSettings,
    work: WorkDirectory,
    places: dict[str, OutputDirectory],
    progress: Any,
    *,
    keep_all: bool,
) -> tuple[list[Rung], dict[str, Path]]:
    """Try the rungs and give what is kept its name; return both."""
    from qtool.cli.calibration_data import calibration_windows
    from qtool.cli.quantize_measure import measurer_of
    from qtool.evaluation.gates import parse_gates
    from qtool.pipeline.ladder import Ladder, winner
    from qtool.pipeline.quantize import Calibration

    cached: list[Calibration] = []

    def calibration(plan: Any) -> Calibration:
        if not plan.calibrated:
            return Calibration()
        if not cached:  # the same text for every rung
            cached.append(Calibration(calibration_windows(checkpoint, recipe, progress)))
        return cached[0]

    keep = True
    work.open()
    try:
        work.check(plain=settings.resume)
        if not settings.resume:
            work.empty()
        measurer = measurer_of(
            checkpoint, recipe, parse_gates(recipe.gates), settings.device, progress
        )
        if measurer is None:
            raise RuntimeError("a ladder without gates was let through")
        measurer = replace(measurer, cache=work.path / "logits")
        _make_places(work.path / "rungs", rungs)
        ladder = Ladder(
            rungs, work.path, settings, progress, calibration, measurer, keep_all=keep_all
        )
        found = ladder.climb()
        best = winner(found)
        wanted = [r for r in found if r.directory and (keep_all or r is best)]
        kept = _named(wanted, places)
        keep = best is None  # with other gates the nearest may do
    except KeyboardInterrupt as error:
        raise InterruptionError(
            "interrupted",
            f"run the same command to go on: rungs that were tried are kept in {work.path}",
            resumable=True,
        ) from error
    finally:
        work.close(keep=keep)
    return found, kept


def _make_places(directory: Path, rungs: Sequence[RungPlan]) -> None:
    """Make a directory for each rung.

    Raises:
        CapacityError, DamagedError: something is in the way, or the disk is full.
    """
    from qtool.checkpoint.disk_errors import write_error

    try:
        directory.mkdir(exist_ok=True)
        for rung in rungs:
            (directory / rung.name).mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(Path(error.filename or directory), error) from error


def _named(rungs: Sequence[Rung], places: dict[str, OutputDirectory]) -> dict[str, Path]:
    """Give outputs their names, all together; return rung -> what opens it."""
    import contextlib

    from qtool.checkpoint.disk_errors import write_error
    from qtool.checkpoint.output import commit_all

    if not rungs:
        return {}
    with contextlib.ExitStack() as stack:
        for rung in rungs:
            partial = stack.enter_context(places[rung.name])
            if rung.directory is None:
                continue
            try:
                rung.directory.rename(partial)  # an empty directory
            except OSError as error:
                raise write_error(places[rung.name].final, error) from error
        opened = commit_all([places[rung.name] for rung in rungs])
    return {rung.name: path for rung, path in zip(rungs, opened, strict=True)}


def _none_passed(found: Sequence[Rung], again: str) -> GateError:
    from qtool.evaluation.gates import shown_outcome
    from qtool.pipeline.ladder import nearest

    best = nearest(found)
    if best is None:
        return GateError("no rung of the ladder was tried", "loosen the gates")
    failed = "; ".join(shown_outcome(o) for o in best.outcomes if not o.passed)
    return GateError(
        f"no rung of the ladder passes; {best.name} comes nearest: {failed}",
        "loosen the gate and run again: what was tried is known, and the nearest is kept hidden "
        f"beside the output; qtool quantize {again}",
    )


def _show_plan(
    terminal: Terminal, checkpoint: Checkpoint, rungs: Sequence[RungPlan], again: str
) -> None:
    from qtool.cli.quantize_ladder_report import ladder_object, ladder_table
    from qtool.pipeline.ladder import Rung

    planned = [Rung(rung.name, rung.plan, "skipped", "planned") for rung in rungs]
    value = ladder_object(checkpoint, planned, None, {}, None, [])
    shown: RenderableType = ladder_table(checkpoint, planned, None, {}, again=again)
    terminal.result({**value, "dry_run": True}, shown)
