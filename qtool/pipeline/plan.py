"""Decide everything before the first weight is read: schemes, places, statistics; or refuse.

The plan is made from headers, a recipe and a family alone. Whatever is going to be impossible is
refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.shards import ShardPlan, StoredTensor, plan_shards
from qtool.errors import DamagedError, UnsupportedError, UsageError
from qtool.formats.protocol import FORMATS, Format, QuantizedModule
from qtool.grids.integer import IntegerGrid
from qtool.grids.protocol import Grid
from qtool.methods.protocol import ROUNDINGS, Method, Rounding, RoundingOptions, method_named
from qtool.model.family import Family, family_of
from qtool.recipe.rules import first_match, unmatched
from qtool.recipe.schema import Quantize, Recipe
from qtool.recipe.sizes import parse_size

STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class PlannedLinear:
    """One linear that will be quantized."""

    name: str  # full module path, without `.weight`
    path: str  # below its block
    block: int
    tap: str
    shape: tuple[int, int]
    grid: Grid


@dataclass(frozen=True)
class PlannedOutput:
    """One directory that will be written."""

    format: Format
    shards: ShardPlan
    quantization_config: Mapping[str, Any]
    kept: tuple[str, ...]  # linears left as they are


@dataclass(frozen=True)
class Plan:
    """What will be done, to the byte."""

    checkpoint: Checkpoint
    recipe: Recipe
    family: Family
    method: Method
    rounding: Rounding
    options: RoundingOptions
    dtype: torch.dtype  # of the stored weights
    n_blocks: int
    linears: tuple[PlannedLinear, ...]
    outputs: tuple[PlannedOutput, ...]
    by_block: Mapping[int, Mapping[str, tuple[PlannedLinear, ...]]] = field(repr=False)

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at calibration data at all."""
        return bool(self.rounding.needs) or self.method.transform is not None

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per quantized weight, scales included."""
        bits = sum(x.grid.bits_per_weight(*x.shape) * x.shape[0] * x.shape[1] for x in self.linears)
        return bits / sum(x.shape[0] * x.shape[1] for x in self.linears)


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Plan the quantization of a float checkpoint by a resolved recipe.

    Raises:
        UnsupportedError: the family, format or combination is not supported.
        UsageError: a rule matches nothing, a group size does not divide a row, fused linears
            would get different schemes.
        DamagedError: tensors that the configuration promises are missing.
    """
    family = family_of(checkpoint.config)
    if checkpoint.config.get("quantization_config"):
        raise UnsupportedError(
            f"{checkpoint.name} is already quantized", "quantize the original float model instead"
        )
    method = method_named(str(recipe.quantize.method))
    formats = [FORMATS[entry.format] for entry in recipe.export]
    modules = _block_linears(checkpoint, family)
    dtype = _stored_dtype(checkpoint, list(modules))
    linears = _schemes(recipe, family, modules, formats, dtype)
    outputs = tuple(_output(checkpoint, recipe, linears, list(modules), f) for f in formats)
    options = RoundingOptions(
        damp_percent=recipe.quantize.damp_percent, act_order=recipe.quantize.act_order
    )
    return Plan(
        checkpoint=checkpoint,
        recipe=recipe,
        family=family,
        method=method,
        rounding=ROUNDINGS[method.rounding],
        options=options,
        dtype=dtype,
        n_blocks=int(checkpoint.config["num_hidden_layers"]),
        linears=tuple(linears),
        outputs=outputs,
        by_block=_by_block(linears),
    )


@dataclass(frozen=True)
class _Found:
    path: str
    block: int
    tap: str
    shape: tuple[int, int]


def _block_linears(checkpoint: Checkpoint, family: Family) -> dict[str, _Found]:
    """Full module path -> where it stands, for every linear of every block, from headers."""
    found: dict[str, _Found] = {}
    _check_surplus(checkpoint, family)
    for block in range(int(checkpoint.config["num_hidden_layers"])):
        for tap in family.taps:
            for path in tap.linears:
                name = f"{family.blocks}.{block}.{path}"
                ref = checkpoint.refs.get(f"{name}.weight")
                if ref is None:
                    raise DamagedError(
                        f"tensor '{name}.weight' is missing from {checkpoint.path}",
                        f"config.json says {family.name} with "
                        f"{checkpoint.config['num_hidden_layers']} layers: the download is "
                        "incomplete, or config.json is another model's",
                    )
                if len(ref.shape) != 2:
                    raise DamagedError(
                        f"tensor '{name}.weight' in {ref.file} has shape {list(ref.shape)}, "
                        "not rows and columns",
                        "the file is not what config.json describes",
                    )
                found[name] = _Found(path, block, tap.name, (ref.shape[0], ref.shape[1]))
    return found


def _check_surplus(checkpoint: Checkpoint, family: Family) -> None:
    """Blocks that config.json does not count would be carried along as they are, unused."""
    prefix = f"{family.blocks}."
    below = [name.removeprefix(prefix) for name in checkpoint.refs if name.startswith(prefix)]
    indices = {name.partition(".")[0] for name in below}
    stored = max((int(index) for index in indices if index.isdecimal()), default=-1) + 1
    declared = int(checkpoint.config["num_hidden_layers"])
    if stored > declared:
        raise DamagedError(
            f"{checkpoint.path} holds {stored} blocks, its config.json says {declared}",
            "config.json and weights belong to different models",
        )


def _stored_dtype(checkpoint: Checkpoint, names: list[str]) -> torch.dtype:
    dtypes = {checkpoint.refs[f"{name}.weight"].dtype for name in names}
    unknown = sorted(dtypes - set(STORED_DTYPES))
    if unknown:
        raise UnsupportedError(
            f"weights are stored as {', '.join(unknown)}",
            f"qtool quantizes {', '.join(STORED_DTYPES)}; use the original float checkpoint",
        )
    if not dtypes:
        raise UnsupportedError("the model has no decoder blocks", "choose another model")
    order = list(STORED_DTYPES)
    return STORED_DTYPES[max(dtypes, key=order.index)]


def _schemes(
    recipe: Recipe,
    family: Family,
    modules: Mapping[str, _Found],
    formats: list[Format],
    dtype: torch.dtype,
) -> list[PlannedLinear]:
    rules = recipe.rules
    # A rule may name the head or the embeddings too: they are kept in any case.
    outside = [family.head, "model.embed_tokens"]
    silent = unmatched(rules, [*modules, *outside])
    if silent:
        raise UsageError(
            f"rule '{silent[0].match}' matches no linear of the model",
            f"names look like {next(iter(modules))}",
        )
    linears = []
    for name, found in modules.items():
        rule = first_match(rules, name)
        if rule is not None and rule.keep:
            continue
        changes = {} if rule is None else rule.changes
        grid = _grid(recipe.quantize.model_copy(update=changes), formats, dtype)
        grid.check_row(found.shape[1])
        for output in formats:
            output.check(QuantizedModule(name, grid, found.shape))
        linears.append(PlannedLinear(name, found.path, found.block, found.tap, found.shape, grid))
    if not linears:
        raise UsageError("the rules keep every linear: nothing is left to quantize", "keep fewer")
    _check_fused(modules, linears)
    return linears


def _grid(section: Quantize, formats: list[Format], dtype: torch.dtype) -> IntegerGrid:
    scale_dtypes = {f.scale_dtype(dtype) for f in formats}
    if len(scale_dtypes) > 1:
        names = " and ".join(f.name for f in formats)
        raise UnsupportedError(
            f"{names} store scales in different dtypes for this model, so they cannot share "
            "one rounding",
            "run qtool once for each format",
        )
    size = section.group_size
    return IntegerGrid(
        bits=int(section.bits),
        group_size=size if size > 0 else 128,
        symmetric=bool(section.symmetric),
        granularity="group" if size > 0 else "channel" if size == -1 else "tensor",
        search=bool(section.clip),
        scale_dtype=scale_dtypes.pop(),
        lowest_zero=max(f.lowest_zero() for f in formats),
    )


def _check_fused(modules: Mapping[str, _Found], linears: list[PlannedLinear]) -> None:
    """Engines load q, k, v (and gate, up) as one matrix: they must be quantized alike."""
    grids = {x.name: x.grid for x in linears}
    groups: dict[tuple[int, str], list[str]] = {}
    for name, found in modules.items():
        groups.setdefault((found.block, found.tap), []).append(name)
    for names in groups.values():
        schemes = {grids[n].name if n in grids else "kept" for n in names}
        if len(schemes) > 1:
            members = ", ".join(n.rpartition(".")[2] for n in names)
            raise UsageError(
                f"{members} of {names[0].rpartition('.')[0]} would be quantized differently "
                f"({', '.join(sorted(schemes))}), but engines load them as one matrix",
                "write the rule so that it matches all of them, or none",
            )


def _output(
    checkpoint: Checkpoint,
    recipe: Recipe,
    linears: list[PlannedLinear],
    names: list[str],
    output: Format,
) -> PlannedOutput:
    planned = {x.name: QuantizedModule(x.name, x.grid, x.shape) for x in linears}
    stored: list[StoredTensor] = []
    for ref in checkpoint.refs.values():
        module, _, leaf = ref.name.rpartition(".")
        if leaf == "weight" and module in planned:
            layouts = output.layout(planned[module])
            stored += [StoredTensor(n, x.dtype, x.shape) for n, x in layouts.items()]
        else:
            stored.append(StoredTensor(ref.name, ref.dtype, tuple(ref.shape)))
    kept = [name for name in names if name not in planned]
    if "lm_head.weight" in checkpoint.refs or checkpoint.config.get("tie_word_embeddings"):
        kept.append("lm_head")
    shards = plan_shards(stored, parse_size(recipe.max_shard_size))
    config = output.config(list(planned.values()), kept)
    return PlannedOutput(output, shards, config, tuple(kept))


def _by_block(
    linears: list[PlannedLinear],
) -> dict[int, dict[str, tuple[PlannedLinear, ...]]]:
    blocks: dict[int, dict[str, tuple[PlannedLinear, ...]]] = {}
    for linear in linears:
        taps = blocks.setdefault(linear.block, {})
        taps[linear.tap] = (*taps.get(linear.tap, ()), linear)
    return blocks
