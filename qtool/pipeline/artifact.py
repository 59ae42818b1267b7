"""All files of an output besides weights: config, tokenizer, recipe, report, card, sums."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from qtool import __version__
from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.shards import file_digest
from qtool.checkpoint.untrusted import printable
from qtool.evaluation.gates import gate_json
from qtool.json_text import json_text
from qtool.pipeline.card import model_card
from qtool.pipeline.outputs import PlannedOutput
from qtool.pipeline.plan import Plan
from qtool.recipe.load import dump_recipe

if TYPE_CHECKING:
    from qtool.pipeline.quantize import QuantizeResult

RECIPE_FILE = "qtool-recipe.yaml"
REPORT_FILE = "qtool-report.json"
SUMS_FILE = "SHA256SUMS"


def write_records(
    result: QuantizeResult, index: int, directory: Path, digests: Mapping[str, str]
) -> None:
    """Write the resolved recipe, the report, the model card and the checksums of output `index`.

    Raises:
        CapacityError: the disk is full.
    """
    plan, output = result.plan, result.plan.outputs[index]
    report = report_of(result, index, digests)
    from_statistics = result.from_statistics
    recipe = resolved_recipe(plan, output, from_statistics=from_statistics)
    try:
        _write(
            directory / RECIPE_FILE,
            recipe,
        )
        _write(directory / REPORT_FILE, json_text(report, indent=1) + "\n")
        _write(directory / "README.md", model_card(result, index))
        write_sums(directory, digests)
    except OSError as error:
        raise write_error(Path(error.filename or directory), error) from error


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def resolved_recipe(plan: Plan, output: PlannedOutput, *, from_statistics: bool = False) -> str:
    """Return the recipe with every default, which makes the same bytes again.

    Names only the one format of this directory, and no place on this machine: MODEL and the
    output are the command line's.
    """
    checkpoint = plan.checkpoint
    model = plan.recipe.model
    if checkpoint.revision is None:
        model = model.model_copy(update={"id": checkpoint.name})
    export = plan.recipe.export[plan.outputs.index(output)]
    recipe = plan.recipe.model_copy(update={"model": model, "export": (export,), "output": None})
    head = f"# Written by qtool {__version__}. Make the same bytes again with:\n"
    # A name is data: it must end neither this comment nor, pasted, the command.
    place = "" if checkpoint.revision else f" {quote(f'PATH/TO/{printable(checkpoint.name)}')}"
    statistics = " --statistics THE_SAME_FILE" if from_statistics else ""
    command = f"#   qtool quantize{place} --recipe {RECIPE_FILE}{statistics}\n"
    return head + command + dump_recipe(recipe)


def report_of(result: QuantizeResult, index: int, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return qtool-report.json: what was done to each linear, what it cost and what it took."""
    plan, windows, output = result.plan, result.windows, result.plan.outputs[index]
    return {
        "schema": "qtool.report/1",
        "model": {
            "id": plan.checkpoint.name,
            "revision": plan.checkpoint.revision,
            "family": plan.family.name,
        },
        "quantization": {
            "method": plan.method.name,
            "format": output.name,
            "bits_per_weight": plan.bits_per_weight,
            "kept": list(output.kept),
        },
        "calibration": calibration_of(result) if windows is not None else None,
        "metrics": dict(result.metrics[index]) if result.metrics else None,
        "gates": gates_of(result, index),
        "layers": [asdict(layer) for layer in result.layers],
        "resources": resources_of(result),
        "environment": environment(),
        "files": dict(digests),
    }


def gates_of(result: QuantizeResult, index: int) -> list[dict[str, Any]]:
    """Return what became of the gates on output `index`, in the terms of the JSON contract."""
    if not result.measured:
        return []
    return [gate_json(outcome) for outcome in result.measured[index].outcomes]


def calibration_of(result: QuantizeResult) -> dict[str, Any]:
    """Return what the calibration data was, in the terms of the JSON contract."""
    windows = result.windows
    if windows is None:
        return {"datasets": [], "tokens": 0}
    return {
        "datasets": [asdict(source) for source in windows.sources],
        "tokens": int(windows.ids.numel()),
        "windows": len(windows.ids),
        "sequence_length": windows.ids.shape[1],
        "sha256": windows.sha256,
    }


def resources_of(result: QuantizeResult) -> dict[str, Any]:
    """Return what a run took, in the terms of the JSON contract."""
    return {
        "peak_ram_bytes": result.peak_ram_bytes,
        "peak_vram_bytes": result.peak_vram_bytes,
        "seconds": result.seconds,
        "device": result.device,
    }


def environment() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"qtool": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def write_sums(directory: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS over all files that a rerun makes again, as `sha256sum -c` reads it."""
    lines = []
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(directory).as_posix()
        # The report holds times; without it, equal sums mean an equal result.
        if name not in {SUMS_FILE, REPORT_FILE}:
            lines.append(_sum(known.get(name) or file_digest(path), name))
    _write(directory / SUMS_FILE, "".join(lines))


def _sum(digest: str, name: str) -> str:
    """Return a line as coreutils writes it, which escapes what would end or begin another."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"
