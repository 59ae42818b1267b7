"""`qtool calibrate`: what the linears of a model read, as an importance-matrix GGUF."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from qtool.cli import options
from qtool.cli.session import session
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.calibration.statistics_file import Statistics
    from qtool.checkpoint.locate import Checkpoint
    from qtool.pipeline.progress import Progress


def calibrate(
    model: options.Model,
    output: options.Output = None,
    dataset: options.Datasets = None,
    windows: options.Windows = None,
    seqlen: options.SequenceLength = None,
    chat_template: options.ChatTemplate = None,
    seed: options.Seed = None,
    max_ram: options.MaxRam = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    merge: Annotated[
        Optional[list[Path]],  # noqa: UP045 - typer reads this at run time
        typer.Option("--merge", metavar="OTHER", help="Statistics to add. Repeatable."),
    ] = None,
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    no_progress: options.NoProgress = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure what the linears of a model read, for quantize --statistics and llama.cpp."""
    with session(
        "calibrate", as_json=as_json, quiet=quiet, verbose=verbose, no_progress=no_progress
    ) as terminal:
        if output is None:
            raise UsageError("no output given", "name one: -o stats.gguf")
        from qtool.calibration.datasets import from_recipe
        from qtool.checkpoint.output import PlainFile
        from qtool.cli.admission import admitted
        from qtool.cli.recipe_flags import build_recipe

        PlainFile(output, overwrite=overwrite)  # refused before any work is done
        flags: dict[str, Any] = {
            "datasets": dataset,
            "windows": windows,
            "sequence_length": seqlen,
            "chat_template": chat_template,
            "seed": seed,
        }
        recipe = build_recipe(model, None, flags, [])
        checkpoint = admitted(
            model,
            terminal,
            revision=revision,
            offline=offline,
            trust_remote_code=trust_remote_code,
            statistics=merge or (),
            datasets=[from_recipe(entry) for entry in recipe.calibration.datasets],
            needs_tokenizer=True,
        )
        PlainFile(output, overwrite=overwrite, sources=[checkpoint.path])
        from rich.text import Text

        from qtool import device as devices
        from qtool.calibration.merging import merged
        from qtool.checkpoint.untrusted import printable
        from qtool.cli.calibration_data import calibration_windows
        from qtool.pipeline.calibration_run import CalibrationSettings, calibrate_to
        from qtool.recipe.sizes import parse_size

        progress = terminal.progress()
        others = _others(merge or [], checkpoint, progress)
        data = calibration_windows(checkpoint, recipe, progress)
        budget = None if max_ram is None else parse_size(max_ram)
        settings = CalibrationSettings(devices.resolve(device), overwrite, resume, budget)
        found = calibrate_to(
            output,
            checkpoint,
            data,
            settings,
            progress,
            lambda statistics: reduce(merged, others, statistics),
        )
        result = {
            "schema": "qtool.calibrate/1",
            "ok": True,
            "exit_code": 0,
            "model": {"id": checkpoint.source, "revision": checkpoint.revision},
            "calibration": {
                "datasets": [vars(source) for source in data.sources],
                "tokens": int(data.ids.numel()),
                "sha256": data.sha256,
            },
            "artifacts": [
                {"format": "imatrix", "path": str(output.absolute()), "tensors": len(found.moments)}
            ],
            "warnings": [{"code": c, "message": m} for c, m in progress.warnings],
            "error": None,
        }
        beside = f", beside {len(others)} merged" if others else ""
        shown = (
            f"wrote {output}: {len(found.moments)} linears, {data.ids.numel()} tokens{beside}\n\n"
            f"next: qtool quantize {model} --method awq --statistics {output}"
        )
        lines = "\n".join(printable(line) for line in shown.split("\n"))
        terminal.result(result, Text(lines, no_wrap=True, overflow="ignore"))


def _others(paths: list[Path], checkpoint: Checkpoint, progress: Progress) -> list[Statistics]:
    """Read the statistics to be merged before anything is computed, and warn of their faults."""
    from qtool.pipeline.calibrate import statistics_for

    found = []
    for path in paths:
        _, statistics = statistics_for(path, checkpoint, complete=False)
        for message in statistics.warnings:
            progress.warn("statistics", message)
        found.append(statistics)
    return found
