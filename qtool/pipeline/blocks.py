"""Quantize one block: float statistics, transform, then tap after tap on quantized inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtool import device as devices
from qtool.calibration.activations import HiddenStates
from qtool.calibration.moments import Moments
from qtool.checkpoint.reader import check_finite
from qtool.grids.protocol import QuantizedTensor
from qtool.model.family import Tap
from qtool.model.skeleton import Skeleton, WeightSource, release
from qtool.model.streaming import (
    Stream,
    Twin,
    advance,
    observe,
    visit_in_stages,
    visit_in_step,
)
from qtool.pipeline.linears import PlannedLinear
from qtool.pipeline.plan import Plan
from qtool.pipeline.progress import LayerReport
from qtool.pipeline.rounding import round_tap
from qtool.pipeline.transform import Transformed, transform_block


@dataclass(frozen=True)
class BlockResult:
    """What became of one block besides its quantized linears, which went to the sink at once."""

    changed: Mapping[str, Tensor]  # full name -> norms and biases that a transform rewrote


@dataclass(frozen=True)
class Sinks:
    """Where finished linears and their reports go."""

    tensor: Callable[[str, QuantizedTensor], None]
    report: Callable[[LayerReport], None]


class BlockQuantizer:
    """Quantizes the blocks of a calibrated plan, first to last.

    Args:
        plan: what to do.
        skeleton: the model; holds one block's weights at a time.
        source: the float checkpoint.
        stream: hidden states in front of the first block.
        sinks: get finished linears and their reports.
    """

    def __init__(
        self,
        plan: Plan,
        skeleton: Skeleton,
        source: WeightSource,
        stream: Stream,
        sinks: Sinks,
    ) -> None:
        self._plan = plan
        self._skeleton = skeleton
        self._source = source
        self._stream = stream
        self._sinks = sinks
        self._propagate = plan.recipe.quantize.error_propagation > 0
        self._twin: HiddenStates | None = stream.copy_hidden() if self._propagate else None

    def quantize(self, index: int) -> BlockResult:
        """Quantize block `index`; must be called in order.

        Raises:
            NumericalError: weights or activations are not finite; names the tensor.
        """
        skeleton, prefix = self._skeleton, self._skeleton.block_prefix(index)
        working = copy.deepcopy(skeleton.blocks[index])
        stored = skeleton.load(prefix.removesuffix("."), self._source)
        reference = skeleton.blocks[index]
        skeleton.assign(working, stored)
        by_tap = self._plan.by_block.get(index, {})
        taps = tuple(tap for tap in self._plan.family.taps if tap.name in by_tap)
        moments, twin = self._float_statistics(reference, index, taps)
        transformed = Transformed(stored)
        if self._plan.method.transform is not None:
            transformed = transform_block(
                self._plan, skeleton.config, by_tap, stored, moments, skeleton.device
            )
            skeleton.assign(
                working, {name: transformed.tensors[name] for name in transformed.changed}
            )
        del moments
        self._round(working, index, taps, transformed, twin)
        skeleton.drop(prefix.removesuffix("."))
        release(working)
        devices.return_free_memory()
        linear_weights = {f"{x.path}.weight" for x in sum(by_tap.values(), ())}
        kept = transformed.changed - linear_weights
        return BlockResult({prefix + name: transformed.tensors[name] for name in kept})

    @property
    def streams(self) -> Mapping[str, HiddenStates]:
        """The hidden states behind the last block, by name."""
        found = {"hidden": self._stream.hidden}
        return found if self._twin is None else {**found, "twin": self._twin}

    def replay(self, index: int, replaced: Mapping[str, Tensor]) -> None:
        """Lead the streams through a block that is quantized already, to the same bits.

        Args:
            index: of the block; in order, like `quantize`.
            replaced: full name -> those of its tensors that differ from the checkpoint's.
        """
        skeleton, prefix = self._skeleton, self._skeleton.block_prefix(index)
        working = copy.deepcopy(skeleton.blocks[index])
        stored = skeleton.load(prefix.removesuffix("."), self._source)
        own = {name.removeprefix(prefix): tensor for name, tensor in replaced.items()}
        skeleton.assign(working, {**stored, **own})
        advance(self._stream, self._stream.hidden, working, index)
        if self._twin is not None:
            advance(self._stream, self._twin, skeleton.blocks[index], index)
        skeleton.drop(prefix.removesuffix("."))
        release(working)
        devices.return_free_memory()

    def _float_statistics(
        self, reference: nn.Module, index: int, taps: tuple[Tap, ...]
    ) -> tuple[dict[str, Moments], Twin | None]:
        """Look at the float block's inputs if a transform needs that; say where the twin's are."""
        stream, hidden = self._stream, self._twin
        twin = None if hidden is None else Twin(reference, hidden)
        if self._plan.method.transform is None or not taps:
            return {}, twin
        keep = hidden is not None and stream.in_step
        moments, inputs = observe(
            stream,
            stream.hidden if hidden is None else hidden,
            reference,
            index,
            taps,
            statistics="hessian",
            keep_inputs=keep,
            move_on=keep,
        )
        return moments, Twin(reference, inputs=inputs) if keep else twin

    def _round(
        self,
        working: nn.Module,
        index: int,
        taps: tuple[Tap, ...],
        transformed: Transformed,
        twin: Twin | None,
    ) -> None:
        """Round tap after tap; afterwards the streams stand behind the block."""
        by_tap = self._plan.by_block.get(index, {})

        def visit(tap: Tap, moments: Moments) -> None:
            scale = transformed.scales.get(tap.name)
            if scale is not None and moments.cross is not None:
                # The twin saw the float block; the working block's inputs are divided by `scale`.
                cross = moments.cross / scale.to(moments.cross.device)
                moments = replace(moments, cross=cross)
            fallback = transformed.fallbacks.get(tap.name, "")
            self._finish_tap(working, by_tap[tap.name], transformed.tensors, moments, fallback)

        go_through = visit_in_step if self._stream.in_step else visit_in_stages
        go_through(self._stream, working, index, taps, visit, twin)

    def _finish_tap(
        self,
        working: nn.Module,
        linears: tuple[PlannedLinear, ...],
        tensors: Mapping[str, Tensor],
        moments: Moments,
        fallback: str,
    ) -> None:
        weights = {x.path: tensors[f"{x.path}.weight"] for x in linears}
        rounded = round_tap(
            self._plan, linears, weights, moments, self._skeleton.device, fallback=fallback
        )
        for linear in linears:
            quantized = rounded.tensors[linear.name]
            self._skeleton.assign(working, {f"{linear.path}.weight": quantized.dequantize()})
            self._sinks.tensor(linear.name, quantized)
        for report in rounded.reports:
            self._sinks.report(report)


def quantize_block_without_data(
    plan: Plan,
    source: WeightSource,
    index: int,
    device: torch.device,
    sinks: Sinks,
    *,
    config: Any = None,
    statistics: Mapping[str, Moments] | None = None,
) -> BlockResult:
    """Quantize a block from its weights, and from statistics of a file if there are any.

    Args:
        plan: what to do; its rounding must not need a Hessian.
        source: the float checkpoint.
        index: of the block.
        device: where to compute.
        sinks: get finished linears and their reports.
        config: transformers' configuration; only for a transform.
        statistics: tap name -> moments of this block.

    Raises:
        NumericalError: weights are not finite; names the tensor.
    """
    taps = plan.by_block.get(index, {})
    prefix = f"{plan.family.blocks}.{index}."
    names = [n for n in plan.checkpoint.refs if n.startswith(prefix)]
    if plan.method.transform is None:
        names = [f"{x.name}.weight" for linears in taps.values() for x in linears]
    tensors = {name.removeprefix(prefix): source.read(name) for name in names}
    for name, tensor in tensors.items():
        check_finite(prefix + name, tensor, source.file(prefix + name))
    transformed = Transformed(tensors)
    if plan.method.transform is not None:
        transformed = transform_block(plan, config, taps, tensors, statistics or {}, device)
    for tap, linears in taps.items():
        moments = None if statistics is None else statistics.get(tap)
        if moments is not None:
            # A file's statistics come in host memory, of inputs before they were scaled.
            scale = transformed.scales.get(tap, torch.ones(()))
            moments = replace(
                moments,
                mean_abs=(moments.mean_abs / scale).to(device),
                diagonal=(moments.diagonal / scale**2).to(device),
            )
        rounded = round_tap(
            plan,
            linears,
            {x.path: transformed.tensors[f"{x.path}.weight"] for x in linears},
            moments,
            device,
            fallback=transformed.fallbacks.get(tap, ""),
        )
        for name, quantized in rounded.tensors.items():
            sinks.tensor(name, quantized)
        for report in rounded.reports:
            sinks.report(report)
    linear_weights = {f"{x.path}.weight" for linears in taps.values() for x in linears}
    kept = transformed.changed - linear_weights
    return BlockResult({prefix + name: transformed.tensors[name] for name in kept})
