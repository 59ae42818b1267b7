"""Decide everything before the first weight is read: schemes, places, statistics; or refuse.

The plan is made from headers, a recipe and a family alone. Whatever is going to be impossible is
refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qtool.checkpoint.locate import Checkpoint
from qtool.errors import UnsupportedError, UsageError
from qtool.formats.protocol import FORMATS
from qtool.methods.protocol import ROUNDINGS, Method, Rounding, RoundingOptions, method_named
from qtool.model.family import Family, family_of
from qtool.pipeline.found_linears import block_linears, check_rules
from qtool.pipeline.gguf_plan import gguf_output
from qtool.pipeline.integer_plan import directory_output, integer_linears
from qtool.pipeline.linears import PlannedLinear, stored_dtype
from qtool.pipeline.outputs import PlannedOutput
from qtool.recipe.schema import Export, Recipe


@dataclass(frozen=True)
class Plan:
    """What will be done, to the byte, by one pass through the model."""

    checkpoint: Checkpoint
    recipe: Recipe
    family: Family
    method: Method
    rounding: Rounding
    options: RoundingOptions
    dtype: torch.dtype  # of the stored weights
    n_blocks: int
    linears: tuple[PlannedLinear, ...]  # those that become codes on a grid
    outputs: tuple[PlannedOutput, ...]
    by_block: Mapping[int, Mapping[str, tuple[PlannedLinear, ...]]] = field(repr=False)

    @property
    def calibrated(self) -> bool:
        """Whether calibration data is looked at at all."""
        wanted = bool(self.rounding.needs) or self.method.transform is not None
        return wanted and bool(self.linears)

    @property
    def scheme(self) -> str:
        """What the linears become, in a word: their grid, or the GGUF file type."""
        gguf = [x.name.partition(":")[2] for x in self.outputs if x.name.startswith("gguf:")]
        return gguf[0] if gguf else self.linears[0].grid.name

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per quantized weight of the blocks, scales included; 0 if there is none."""
        bits = sum(x.grid.bits_per_weight(*x.shape) * x.shape[0] * x.shape[1] for x in self.linears)
        weights = sum(x.shape[0] * x.shape[1] for x in self.linears)
        return bits / weights if weights else 0.0


def make_plan(checkpoint: Checkpoint, recipe: Recipe, *, importance: bool = False) -> Plan:
    """Plan the quantization of a float checkpoint by a resolved recipe whose formats share a grid.

    Raises:
        UnsupportedError: the family, format or combination is not supported.
        UsageError: a rule matches nothing, a group size does not divide a row, fused linears
            would get different schemes, the formats need several grids.
        DamagedError: tensors that the configuration promises are missing.
    """
    plans = make_plans(checkpoint, recipe, importance=importance)
    if len(plans) > 1:
        names = ", ".join(export.format for export in recipe.export)
        raise UsageError(f"{names} do not share one grid", "plan them one by one")
    return plans[0]


def make_plans(
    checkpoint: Checkpoint, recipe: Recipe, *, importance: bool = False
) -> tuple[Plan, ...]:
    """Plan one pass for all formats that share a grid; errors propagate in each by its own.

    Args:
        checkpoint: the float model.
        recipe: resolved.
        importance: whether there will be statistics even for a method that needs none.

    Raises:
        UnsupportedError, UsageError, DamagedError: as `make_plan`.
    """
    family = family_of(checkpoint.config)
    if checkpoint.config.get("quantization_config"):
        raise UnsupportedError(
            f"{checkpoint.name} is already quantized", "quantize the original float model instead"
        )
    modules = block_linears(checkpoint, family)
    dtype = stored_dtype(checkpoint, list(modules))
    check_rules(recipe, checkpoint, family, list(modules))
    method = method_named(str(recipe.quantize.method))
    rounding = ROUNDINGS[method.rounding]
    options = RoundingOptions(
        damp_percent=recipe.quantize.damp_percent,
        act_order=recipe.quantize.act_order,
        sweeps=recipe.quantize.sweeps,
    )
    wanted = importance or bool(rounding.needs) or method.transform is not None
    plans = []
    for group in _groups(recipe.export, dtype):
        part = recipe.model_copy(update={"export": group})
        outputs: list[PlannedOutput]
        if group[0].gguf_type is None:
            formats = [FORMATS[entry.format] for entry in group]
            linears = integer_linears(part, modules, formats, dtype)
            outputs = [
                directory_output(checkpoint, part, linears, list(modules), f) for f in formats
            ]
        else:
            linears, output = gguf_output(checkpoint, part, family, modules, importance=wanted)
            outputs = [output]
        plans.append(
            Plan(
                checkpoint=checkpoint,
                recipe=part,
                family=family,
                method=method,
                rounding=rounding,
                options=options,
                dtype=dtype,
                n_blocks=int(checkpoint.config["num_hidden_layers"]),
                linears=tuple(linears),
                outputs=tuple(outputs),
                by_block=_by_block(linears),
            )
        )
    return tuple(plans)


def _groups(exports: Sequence[Export], dtype: torch.dtype) -> list[tuple[Export, ...]]:
    """Put formats together that can hold the same codes and scales."""
    groups: dict[object, tuple[Export, ...]] = {}
    for number, export in enumerate(exports):
        # Each GGUF has its own mixture of grids.
        key = number if export.gguf_type else FORMATS[export.format].scale_dtype(dtype)
        groups[key] = (*groups.get(key, ()), export)
    return list(groups.values())


def _by_block(
    linears: Sequence[PlannedLinear],
) -> dict[int, dict[str, tuple[PlannedLinear, ...]]]:
    blocks: dict[int, dict[str, tuple[PlannedLinear, ...]]] = {}
    for linear in linears:
        taps = blocks.setdefault(linear.block, {})
        taps[linear.tap] = (*taps.get(linear.tap, ()), linear)
    return blocks
