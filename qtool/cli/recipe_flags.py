"""Build the recipe of a run: flags over `QTOOL_*` variables over the recipe file over defaults."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from qtool.calibration.datasets import to_recipe
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import naming
from qtool.cli.calibration_data import dataset_specs
from qtool.errors import UsageError
from qtool.evaluation.gates import check_measurable, parse_gates
from qtool.recipe.ladder import GGUF, INTEGERS
from qtool.recipe.load import apply_overrides, parse_recipe, read_mapping
from qtool.recipe.rules import parse_ignore, parse_override
from qtool.recipe.schema import Recipe, resolved

# Flag -> key of the recipe's `quantize` section.
QUANTIZE_KEYS = {
    "method": "method",
    "bits": "bits",
    "group_size": "group_size",
    "symmetric": "symmetric",
    "clip": "clip",
    "act_order": "act_order",
    "damp_percent": "damp_percent",
    "error_propagation": "error_propagation",
}
CALIBRATION_KEYS = {
    "windows": "windows",
    "sequence_length": "sequence_length",
    "chat_template": "chat_template",
}

# Flag -> key of every gguf entry of the recipe's `export` section.
GGUF_KEYS = ("output_type", "embed_type", "pre", "strict", "split_max_size", "modelfile")

# What `--eval quick` measures: enough to see a broken result, not to rank good ones.
QUICK_EVALUATION = {"data": "builtin", "context": 512, "windows": 8}
# What decides between the rungs of a ladder.
LADDER_EVALUATION = {"data": "builtin", "context": 512, "windows": 32}


def build_recipe(
    model: str | None, file: Path | None, flags: Mapping[str, Any], settings: list[str]
) -> Recipe:
    """Return the recipe of a run: resolved, but with a ladder, whose rungs are to be resolved.

    Args:
        model: the MODEL argument; None takes the recipe's.
        file: --recipe.
        flags: flag -> value; None where the flag was not given.
        settings: of --set.

    Raises:
        UsageError: no model, or something that does not fit the schema.
    """
    data: dict[str, Any] = {"version": 1} if file is None else read_mapping(file)
    if model is not None:
        section = data.get("model")
        if section is not None:  # what is wrong in it is wrong, though another takes its place
            stated = {"id": model, **section} if isinstance(section, dict) else section
            parse_recipe({**data, "model": stated}, str(file))
        data["model"] = {**section, "id": model} if isinstance(section, dict) else {"id": model}
        if flags.get("revision") is None and isinstance(section, dict) and file is not None:
            # The recipe's revision belongs to the recipe's model.
            data["model"] = {"id": model} if section.get("id") != model else data["model"]
    elif "model" not in data:
        raise UsageError("no model given", "qtool quantize MODEL, or a recipe with model: {id: }")
    if file is not None:
        parse_recipe(data, str(file))  # what is wrong in the file is said of the file
    if flags.get("ladder") or data.get("ladder"):
        flags = _apply_ladder(data, flags)
    _apply_flags(data, flags)
    data = apply_overrides(data, settings)
    recipe = parse_recipe(data, "command line")
    ours = file is not None and not flags.get("gates") and not settings
    with naming(file) if file is not None and ours else nullcontext():
        _check_gates(recipe)
    return recipe if recipe.ladder else resolved(recipe)


# Flags that a rung decides.
RUNG_FLAGS = ("method", "bits")


def _apply_ladder(data: dict[str, Any], flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write a ladder into the recipe, unless it has one; return the flags that are left.

    `-f gguf` stands for the ladder of GGUF types; any other format is that of every rung.
    """
    given = next((name for name in RUNG_FLAGS if flags.get(name) is not None), None)
    if given is not None:
        raise UsageError(
            f"--{given} is decided by each rung of the ladder",
            "leave it away, or write the rungs into a recipe: recipes/ladder.yaml",
        )
    formats = flags.get("formats") or []
    if len(formats) > 1:
        raise UsageError("a ladder has one format", "give --format once")
    ladder = GGUF if formats and is_gguf(formats[0]) else INTEGERS
    if formats and is_gguf(formats[0]) and formats[0].lower() != "gguf":
        raise UsageError(
            f"--format {formats[0]} is decided by each rung of the ladder",
            "write -f gguf for the types from Q8_0 to Q4_K_M, or the rungs into a recipe",
        )
    if not data.get("ladder") or ladder is GGUF:
        data["ladder"] = [rung.model_dump(exclude_none=True) for rung in ladder]
    if ladder is GGUF:
        flags = {**flags, "formats": ["gguf:Q8_0"]}  # every rung puts its own type in its place
    if flags.get("evaluation") is None and "eval" not in data:
        data["eval"] = dict(LADDER_EVALUATION)
    return flags


def _check_gates(recipe: Recipe) -> None:
    """Refuse gates that nothing could be held against."""
    gates = parse_gates(recipe.gates)
    if recipe.ladder and not any(gate.measure.kind == "number" for gate in gates):
        raise UsageError(
            "a ladder needs a gate on what is lost",
            "for example --gate 'loss<=3%', or gates: ['kld<=0.05'] in the recipe",
        )
    check_measurable(gates, has_reference=True)
    for gate in gates:
        if gate.measure.metric and not recipe.eval.metrics:
            raise UsageError(
                f"gate '{gate.expression}' needs a figure, but nothing is to be measured",
                "leave out --eval none, or eval.metrics: [] in the recipe",
            )


def _apply_flags(data: dict[str, Any], flags: Mapping[str, Any]) -> None:
    for section, keys in (("quantize", QUANTIZE_KEYS), ("calibration", CALIBRATION_KEYS)):
        given = {key: flags[flag] for flag, key in keys.items() if flags.get(flag) is not None}
        if given:
            data[section] = {**(data.get(section) or {}), **given}
    if flags.get("datasets"):
        entries = [to_recipe(spec) for spec in dataset_specs(flags["datasets"])]
        data["calibration"] = {**(data.get("calibration") or {}), "datasets": entries}
    if flags.get("formats"):
        data["export"] = [{"format": name} for name in flags["formats"]]
    _apply_gguf_flags(data, flags)
    if flags.get("seed") is not None:
        data["seed"] = flags["seed"]
    if flags.get("revision") is not None:
        data["model"]["revision"] = flags["revision"]
    if flags.get("gates"):
        data["gates"] = [*flags["gates"], *(data.get("gates") or [])]
    if flags.get("max_shard_size") is not None:
        data["max_shard_size"] = flags["max_shard_size"]
    _apply_evaluation(data, flags.get("evaluation"))
    rules = [parse_ignore(pattern) for pattern in flags.get("ignore") or []]
    rules += [parse_override(text) for text in flags.get("override") or []]
    if rules:
        # Flags come before the recipe's own rules: the first match wins.
        written = [rule.model_dump(exclude_none=True, exclude_defaults=True) for rule in rules]
        data["rules"] = [*written, *(data.get("rules") or [])]


def _apply_gguf_flags(data: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Give the flags for GGUF to the GGUF outputs, and refuse them where there is none."""
    given = {key: flags[key] for key in GGUF_KEYS if flags.get(key)}
    entries = data.get("export") or []
    gguf = [e for e in entries if isinstance(e, dict) and is_gguf(e.get("format"))]
    if given and not gguf:
        name = next(iter(given)).replace("_", "-")
        raise UsageError(f"--{name} is for GGUF, but no output is one", "add -f gguf:Q4_K_M")
    for entry in gguf:
        entry.update(given)
    fixed = [key for key in ("bits", "group_size", "symmetric") if flags.get(key) is not None]
    if fixed and gguf and len(gguf) == len(entries):
        name = {"group_size": "group-size", "symmetric": "sym/--asym"}.get(fixed[0], fixed[0])
        raise UsageError(
            f"--{name} is not for GGUF: {gguf[0]['format']} has its own bits and blocks",
            "leave it away, or choose another type, such as gguf:Q5_K_M",
        )


def is_gguf(name: object) -> bool:
    """Return whether a format, as one types it, is GGUF."""
    return isinstance(name, str) and name.partition(":")[0].lower() == "gguf"


def _apply_evaluation(data: dict[str, Any], wanted: str | None) -> None:
    """Write --eval into the recipe, so that the resolved one measures the same again."""
    if wanted == "none":
        data["eval"] = {**(data.get("eval") or {}), "metrics": []}
    elif wanted == "quick" or "eval" not in data:
        data["eval"] = dict(QUICK_EVALUATION)


def destinations(recipe: Recipe, checkpoint: Checkpoint, output: Path | None) -> list[Path]:
    """Return the directory of each output: -o, the recipe's, or ./<name>-<tag>.

    Several formats get a directory each below one that is given.
    """
    formats = [entry.format.lower() for entry in recipe.export]
    twice = next((name for name in formats if formats.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"the format {twice} is asked for twice", "name each format once")
    given = output if output is not None else Path(recipe.output) if recipe.output else None
    if given is not None and len(recipe.export) == 1:
        if given.suffix == ".gguf" and recipe.export[0].gguf_type is None:
            raise UsageError(
                f"the output {given} ends in .gguf, but {recipe.export[0].format} is a directory",
                "choose another --output, or -f gguf:Q4_K_M",
            )
        return [given]
    if given is not None and given.suffix == ".gguf":
        raise UsageError(
            f"the output {given} is one file, but {len(recipe.export)} formats are asked for",
            "give a directory, which gets one for each format",
        )
    if given is not None:
        return [given / entry.format.replace(":", "-") for entry in recipe.export]
    return [Path(f"{checkpoint.name}-{tag(recipe, entry.format)}") for entry in recipe.export]


def tag(recipe: Recipe, output_format: str) -> str:
    """Return a short name of a scheme, such as `gptq-w4g128` or `rtn-w8-compressed-tensors`."""
    quantize = recipe.quantize
    method = str(quantize.method).replace("+", "-")
    if is_gguf(output_format):
        return f"{method}-{output_format.partition(':')[2]}-gguf"
    spread = {-1: "", 0: "-tensor"}.get(quantize.group_size, f"g{quantize.group_size}")
    suffix = "" if output_format == method else f"-{output_format}"
    return f"{method}-w{quantize.bits}{spread}{suffix}"
