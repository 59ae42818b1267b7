"""Apply AWQ to one block: search a scale for each tap, fold its inverse into the op before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.moments import Moments
from qtool.methods.awq import search_scale, untie_repeated
from qtool.model.folding import fold, head_layout
from qtool.pipeline.linears import PlannedLinear
from qtool.pipeline.plan import Plan


@dataclass(frozen=True)
class Transformed:
    """A block after its scales were folded.

    Args:
        tensors: the block's, by name below it; changed ones replaced.
        changed: names of those that differ from the checkpoint's.
        scales: tap name -> what its inputs are now divided by, [C] float32.
        fallbacks: tap name -> why it was left alone.
    """

    tensors: Mapping[str, Tensor]
    changed: frozenset[str] = frozenset()
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    fallbacks: Mapping[str, str] = field(default_factory=dict)


def transform_block(
    plan: Plan,
    config: Any,  # transformers' configuration object
    taps: Mapping[str, tuple[PlannedLinear, ...]],
    tensors: Mapping[str, Tensor],  # as stored, on the CPU
    moments: Mapping[str, Moments],  # of the float block's inputs, by tap
    device: torch.device,
) -> Transformed:
    """Scale what matters up, wherever the family has a place for the inverse and it helps."""
    current = dict(tensors)
    changed: set[str] = set()
    scales: dict[str, Tensor] = {}
    fallbacks: dict[str, str] = {}
    rounded = {x.path for linears in taps.values() for x in linears}
    for pair in plan.family.pairs:
        linears = taps.get(pair.tap, ())
        if not linears:
            continue
        if pair.kind == "linear" and pair.previous not in rounded:
            fallbacks[pair.tap] = f"{pair.previous} is kept as it is"
            continue
        observed = moments[pair.tap]
        head, repeats = head_layout(config, pair)
        found = search_scale(
            [(current[f"{x.path}.weight"].to(device, torch.float32), x.grid) for x in linears],
            observed.mean_abs.to(device),
            observed.second.to(device),
            shared=head,
            repeats=repeats,
        )
        if not found.helped:
            fallbacks[pair.tap] = "no scale lowered the error"
            continue
        scale = found.scale.cpu()
        replaced, effective = fold(
            current, plan.family, pair, scale, untie_repeated(scale, head, repeats)
        )
        current.update(replaced)
        changed.update(replaced)
        scales[pair.tap] = effective
    return Transformed(current, frozenset(changed), scales, fallbacks)
