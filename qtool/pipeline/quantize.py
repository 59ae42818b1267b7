"""The whole line: plan -> stream blocks -> pack each linear at its place -> metadata -> verify."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import device as devices
from qtool.calibration.moments import Moments
from qtool.calibration.tokens import Windows
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.output import OutputDirectory, output_place
from qtool.checkpoint.reader import TensorReader, check_finite
from qtool.errors import UsageError
from qtool.formats.reading import DenseSource
from qtool.grids.protocol import QuantizedTensor
from qtool.model.skeleton import Skeleton
from qtool.model.streaming import Stream
from qtool.pipeline.artifact import write_records
from qtool.pipeline.blocks import (
    BlockQuantizer,
    Sinks,
    quantize_block_without_data,
)
from qtool.pipeline.calibrate import OUTPUT, head_inputs
from qtool.pipeline.gguf_output import PlannedGguf
from qtool.pipeline.linears import STORED_DTYPES
from qtool.pipeline.measurement import Measurement, Measurer
from qtool.pipeline.outputs import CalibrationNote, OutputWriter
from qtool.pipeline.plan import Plan
from qtool.pipeline.progress import LayerReport, Progress


@dataclass(frozen=True)
class QuantizeResult:
    """What a run made, and what it took."""

    plan: Plan
    paths: tuple[Path, ...]
    digests: tuple[Mapping[str, str], ...]  # per output, file name -> SHA-256
    layers: tuple[LayerReport, ...]
    windows: Windows | None
    seconds: float
    peak_ram_bytes: int
    peak_vram_bytes: int
    device: str
    from_statistics: bool = False  # instead of windows
    measured: tuple[Measurement, ...] = ()  # per output, where it was asked for

    @property
    def metrics(self) -> tuple[Mapping[str, Any], ...]:
        """The figures of each output; empty where none were measured."""
        return tuple(found.metrics for found in self.measured if found.metrics)


# What stands for a file where statistics never were in one.
INLINE_STATISTICS = "(taken while quantizing)"


@dataclass(frozen=True)
class RunSettings:
    """How to run a plan; nothing here changes the result but the kind of device.

    Args:
        device: where to compute.
        overwrite: replace an existing model directory once the new one is complete.
        held_bytes: budget for activations held inside a block; None: a part of what is free.
    """

    device: torch.device
    overwrite: bool = False
    held_bytes: int | None = None


def run_plan(
    plan: Plan,
    destinations: Sequence[Path],  # one per planned output
    settings: RunSettings,
    progress: Progress,
    *,
    windows: Windows | None = None,
    statistics: Mapping[int, Mapping[str, Moments]] | None = None,
    measurer: Measurer | None = None,
    note: CalibrationNote | None = None,
    importance: Mapping[str, Tensor] | None = None,
) -> QuantizeResult:
    """Carry a plan out and give each output directory its name when it is complete.

    Args:
        plan: from `make_plan`.
        destinations: final directories; must not exist, or be empty, unless `overwrite`.
        settings: device and limits.
        progress: told what happens.
        windows: calibration tokens; needed by a calibrated plan without statistics.
        statistics: block -> tap -> moments from a file, for methods without a Hessian.
        measurer: asked about the complete outputs before they get their names.
        note: what a file says of the statistics; made from the windows where there are some.
        importance: llama.cpp's tensor name -> [C], of matrices outside of blocks.

    Raises:
        UsageError: an output is in the way, or calibration data is missing.
        NumericalError: weights or activations are not finite.
        CapacityError: the disk is full.
        DamagedError: the input is damaged, or what was written does not read back.
    """
    if plan.calibrated and windows is None and statistics is None:
        raise UsageError(f"{plan.method.name} needs calibration data", "give --dataset")
    started = time.perf_counter()
    if windows is not None and plan.calibrated:
        note = _note(plan, windows)
    plan = _named_after(plan, destinations)
    plan = replace(plan, outputs=tuple(output.noted(note) for output in plan.outputs))
    layers: list[LayerReport] = []
    with contextlib.ExitStack() as stack:
        sources = [plan.checkpoint.path]
        directories = [
            output_place(path, overwrite=settings.overwrite, sources=sources)
            for path in destinations
        ]
        partials = [stack.enter_context(directory) for directory in directories]
        spill = partials[0] / ".activations"
        spill.mkdir()
        writers = [
            output.writer(plan, path) for output, path in zip(plan.outputs, partials, strict=True)
        ]
        sinks = _sinks(writers, layers, progress)
        with TensorReader(plan.checkpoint.refs) as reader:
            source = DenseSource(plan.checkpoint, reader)
            _check_kept(plan, reader)
            found = _run_blocks(
                plan, source, settings, progress, sinks, writers, spill, windows, statistics
            )
        spill.rmdir()
        digests = [writer.finish({**(importance or {}), **found}) for writer in writers]
        progress.finish()
        for output, partial in zip(plan.outputs, partials, strict=True):
            for warning in output.write_companions(plan, partial):
                progress.warn("companion_file", warning)
            output.verify(plan, partial)
        result = _result(plan, directories, digests, layers, windows, started, settings)
        result = replace(result, from_statistics=statistics is not None)
        if measurer is not None:
            result = replace(result, measured=_measured(plan, measurer, partials, destinations))
        for index, partial in enumerate(partials):
            write_records(result, index, partial, digests[index])
        for directory in directories:
            directory.commit()
    return result


def _measured(
    plan: Plan, measurer: Measurer, partials: Sequence[Path], destinations: Sequence[Path]
) -> tuple[Measurement, ...]:
    return measurer.measure(
        [x.opened_at(path) for x, path in zip(plan.outputs, partials, strict=True)],
        [x.opened_at(path) for x, path in zip(plan.outputs, destinations, strict=True)],
    )


def _result(
    plan: Plan,
    directories: Sequence[OutputDirectory],
    digests: Sequence[Mapping[str, str]],
    layers: Sequence[LayerReport],
    windows: Windows | None,
    started: float,
    settings: RunSettings,
) -> QuantizeResult:
    ram, vram = devices.peak_memory(settings.device)
    return QuantizeResult(
        plan=plan,
        paths=tuple(d.final for d in directories),
        digests=tuple(digests),
        layers=tuple(layers),
        windows=windows,
        seconds=time.perf_counter() - started,
        peak_ram_bytes=ram,
        peak_vram_bytes=vram,
        device=devices.describe(settings.device),
    )


def _named_after(plan: Plan, destinations: Sequence[Path]) -> Plan:
    """Return the plan with GGUF files called what the user called them."""
    outputs = tuple(
        replace(output, stem=path.stem)
        if isinstance(output, PlannedGguf) and path.suffix == ".gguf"
        else output
        for output, path in zip(plan.outputs, destinations, strict=True)
    )
    return replace(plan, outputs=outputs)


def check_outputs(
    destinations: Sequence[Path],
    checkpoint: Checkpoint,
    *,
    overwrite: bool,
    statistics: Path | None = None,
) -> None:
    """Refuse places that are taken, before any work is done.

    Raises:
        UsageError: says which, and why.
    """
    sources = [checkpoint.path] if statistics is None else [checkpoint.path, statistics]
    for path in destinations:
        output_place(path, overwrite=overwrite, sources=sources)


def _note(plan: Plan, windows: Windows) -> CalibrationNote:
    """Say what the importance of weights is taken from."""
    names = tuple(Path(source.name).name for source in windows.sources)
    return CalibrationNote(INLINE_STATISTICS, names, len(windows.ids), len(plan.linears))


def _sinks(writers: Sequence[OutputWriter], layers: list[LayerReport], progress: Progress) -> Sinks:
    def keep(name: str, quantized: QuantizedTensor) -> None:
        held = quantized.cpu()
        for writer in writers:
            writer.write(name, held)

    def note(report: LayerReport) -> None:
        layers.append(report)
        if report.damp_percent is not None and report.damp_raised:
            progress.warn(
                "damping_raised",
                f"{report.name}: the Hessian needed damping {report.damp_percent:g}; "
                "more calibration windows would help",
            )
        progress.layer(report)

    return Sinks(keep, note)


def _check_kept(plan: Plan, reader: TensorReader) -> None:
    """Refuse values that are not finite in what no block looks at: embeddings, norms, the head.

    Raises:
        NumericalError: names the tensor.
    """
    rounded = {f"{x.name}.weight" for x in plan.linears}
    for name, ref in plan.checkpoint.refs.items():
        if name in rounded or ref.dtype not in STORED_DTYPES:
            continue
        for piece in reader.chunks(name):
            values = torch.frombuffer(piece, dtype=STORED_DTYPES[ref.dtype])
            if not bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
                check_finite(name, reader.read(name))  # says where in the tensor


@torch.no_grad()
def _run_blocks(
    plan: Plan,
    source: DenseSource,
    settings: RunSettings,
    progress: Progress,
    sinks: Sinks,
    writers: Sequence[OutputWriter],
    spill: Path,
    windows: Windows | None,
    statistics: Mapping[int, Mapping[str, Moments]] | None,
) -> dict[str, Tensor]:
    """Quantize block after block; return what the head reads, if that was seen and is wanted."""
    streamed = plan.calibrated and statistics is None
    skeleton = _skeleton(plan, settings.device) if plan.calibrated else None
    quantizer: BlockQuantizer | None = None
    progress.start("quantizing", plan.n_blocks)
    if streamed and skeleton is not None and windows is not None:
        stream = Stream(skeleton, source, windows.ids, spill, held_bytes=settings.held_bytes)
        quantizer = BlockQuantizer(plan, skeleton, source, stream, sinks)
    config: Any = None if skeleton is None else skeleton.config
    for index in range(plan.n_blocks):
        if quantizer is not None:
            result = quantizer.quantize(index)
        else:
            result = quantize_block_without_data(
                plan,
                source,
                index,
                settings.device,
                sinks,
                config=config,
                statistics=None if statistics is None else statistics[index],
            )
        for writer in writers:
            for name, tensor in result.changed.items():
                writer.write_changed(name, tensor)
        progress.advance(f"block {index + 1} of {plan.n_blocks}")
    if quantizer is None or skeleton is None or not any(x.weighs_head for x in plan.outputs):
        return {}
    return {OUTPUT: head_inputs(skeleton, source, stream).diagonal.cpu()}


def _skeleton(plan: Plan, device: torch.device) -> Skeleton:
    return Skeleton(
        plan.checkpoint.config,
        plan.family,
        dtype=devices.compute_dtype(plan.dtype, device),
        device=device,
    )
