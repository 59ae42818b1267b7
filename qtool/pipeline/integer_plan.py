"""Plan safetensors outputs: one integer grid for every linear, one directory for every format."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.shards import StoredTensor, plan_shards
from qtool.errors import UsageError
from qtool.formats.protocol import Format, QuantizedModule
from qtool.grids.integer import IntegerGrid
from qtool.pipeline.directory_output import PlannedDirectory
from qtool.pipeline.found_linears import FoundLinear
from qtool.pipeline.linears import PlannedLinear
from qtool.recipe.rules import first_match
from qtool.recipe.schema import Quantize, Recipe
from qtool.recipe.sizes import parse_size


def integer_linears(
    recipe: Recipe,
    modules: Mapping[str, FoundLinear],
    formats: list[Format],
    dtype: torch.dtype,
) -> list[PlannedLinear]:
    """Give every linear that no rule keeps its integer grid.

    Raises:
        UsageError: a group size does not divide a row, fused linears would get different
            schemes, or nothing is left to quantize.
        UnsupportedError: a format cannot hold the grid.
    """
    rules = [rule for rule in recipe.rules if rule.keep or rule.changes]
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
    size = section.group_size
    return IntegerGrid(
        bits=int(section.bits),
        group_size=size if size > 0 else 128,
        symmetric=bool(section.symmetric),
        granularity="group" if size > 0 else "channel" if size == -1 else "tensor",
        search=bool(section.clip),
        scale_dtype=formats[0].scale_dtype(dtype),
        lowest_zero=max(f.lowest_zero() for f in formats),
    )


def _check_fused(modules: Mapping[str, FoundLinear], linears: list[PlannedLinear]) -> None:
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


def directory_output(
    checkpoint: Checkpoint,
    recipe: Recipe,
    linears: list[PlannedLinear],
    names: list[str],
    output: Format,
) -> PlannedDirectory:
    """Lay out the directory of one format."""
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
    return PlannedDirectory(output, shards, config, tuple(kept))
