"""The whole line: plan -> stream blocks -> pack each linear at its place -> metadata -> verify."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import device as devices
from qtool.calibration.moments import Moments
from qtool.calibration.tokens import Windows
from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.output import OutputDirectory, commit_all, output_place
from qtool.checkpoint.reader import TensorReader, check_finite
from qtool.errors import UsageError
from qtool.formats.reading import DenseSource
from qtool.model.skeleton import Skeleton, skeleton_of
from qtool.model.streaming import Stream
from qtool.pipeline.artifact import write_records
from qtool.pipeline.blocks import BlockQuantizer, quantize_block_without_data
from qtool.pipeline.calibrate import OUTPUT, head_inputs
from qtool.pipeline.gguf_output import PlannedGguf
from qtool.pipeline.identity import identity_of
from qtool.pipeline.journal import JOURNAL
from qtool.pipeline.ledger import Ledger
from qtool.pipeline.linears import STORED_DTYPES
from qtool.pipeline.measurement import Measurement, Measurer
from qtool.pipeline.outputs import CalibrationNote, OutputWriter
from qtool.pipeline.plan import Plan
from qtool.pipeline.progress import LayerReport, Progress
from qtool.pipeline.resuming import (
    LeftForALaterRun,
    check_space,
    clear,
    closing_writer,
    opened_journal,
)


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
        resume: go on with what an interrupted run of the same plan finished.
    """

    device: torch.device
    overwrite: bool = False
    held_bytes: int | None = None
    resume: bool = True


@dataclass(frozen=True)
class Calibration:
    """What stands in for the model's inputs; at most one of the first two.

    Args:
        windows: tokens to run the model on.
        statistics: block -> tap -> moments from a file, for methods without a Hessian.
        file: that they come from.
        note: what a GGUF says of them; made from the windows where there are some.
        importance: llama.cpp's tensor name -> [C], of matrices outside of blocks.
    """

    windows: Windows | None = None
    statistics: Mapping[int, Mapping[str, Moments]] | None = None
    file: Path | None = None
    note: CalibrationNote | None = None
    importance: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing is known of the inputs."""
        return self.windows is None and self.statistics is None


@dataclass(frozen=True)
class Completed:
    """A finished, verified and measured run whose outputs have hidden names still."""

    result: QuantizeResult
    places: tuple[OutputDirectory, ...]


def run_plan(
    plan: Plan,
    destinations: Sequence[Path],  # one per planned output
    settings: RunSettings,
    progress: Progress,
    calibration: Calibration = Calibration(),
    *,
    measurer: Measurer | None = None,
) -> QuantizeResult:
    """Carry a plan out and give each output directory its name when it is complete.

    Raises:
        As `completed`.
    """
    with completed(plan, destinations, settings, progress, calibration, measurer) as done:
        commit_all(done.places)
    return done.result


@contextlib.contextmanager
def completed(
    plan: Plan,
    destinations: Sequence[Path],
    settings: RunSettings,
    progress: Progress,
    calibration: Calibration,
    measurer: Measurer | None = None,
) -> Iterator[Completed]:
    """Carry a plan out; the outputs are to be given their names before the context is left.

    Finished blocks are noted in a journal. What interrupts a run leaves them, and the same plan
    goes on with them to the same bytes.

    Args:
        plan: from `make_plan`.
        destinations: final directories; must not exist, or be empty, unless `overwrite`.
        settings: device and limits.
        progress: told what happens.
        calibration: needed by a calibrated plan.
        measurer: asked about the complete outputs before they get their names.

    Raises:
        UsageError: an output is in the way, calibration data is missing, or an interrupted run with
            other settings is there to be continued.
        NumericalError: weights or activations are not finite.
        CapacityError: the disk is full, or will be.
        DamagedError: the input is damaged, or what was written does not read back.
        InterruptionError: by a signal, with finished blocks to go on with.
    """
    windows = calibration.windows
    if plan.calibrated and calibration.empty:
        raise UsageError(f"{plan.method.name} needs calibration data", "give --dataset")
    note = calibration.note
    if windows is not None and plan.calibrated:
        note = _note(plan, windows)
    plan = _named_after(plan, destinations)
    plan = replace(plan, outputs=tuple(output.noted(note) for output in plan.outputs))
    places = [
        output_place(
            path,
            overwrite=settings.overwrite,
            sources=[plan.checkpoint.path],
            resume=settings.resume,
        )
        for path in destinations
    ]
    with contextlib.ExitStack() as stack:
        partials = [stack.enter_context(place) for place in places]
        work = places[0].work.path
        with LeftForALaterRun(places, work / JOURNAL, plan.n_blocks) as held:
            identity = partial(identity_of, plan, settings.device, windows, calibration.file)
            held.journal = opened_journal(work / JOURNAL, settings.device, identity)
            for output, directory in zip(plan.outputs, partials, strict=True):
                # A run that finished no block was perhaps another; what is not weights is redone.
                clear(directory, but=output.working_files if held.journal.blocks else ())
            states = work / "states"
            room = partial(check_space, plan, partials, states, windows, settings.device)
            room()
            writers = [
                stack.enter_context(closing_writer(output.writer(plan, path, resume=True)))
                for output, path in zip(plan.outputs, partials, strict=True)
            ]
            ledger = Ledger(plan, held.journal, states, writers, progress)
            run = _Run(plan, settings, progress, calibration, ledger, work, room)
            result = run.finished(partials, writers, places)
            if measurer is not None:
                found = _measured(plan, measurer, partials, destinations)
                result = replace(result, measured=found)
            for index, directory in enumerate(partials):
                write_records(result, index, directory, result.digests[index])
            held.complete = True
            yield Completed(result, tuple(places))


def _measured(
    plan: Plan, measurer: Measurer, partials: Sequence[Path], destinations: Sequence[Path]
) -> tuple[Measurement, ...]:
    return measurer.measure(
        [x.opened_at(path) for x, path in zip(plan.outputs, partials, strict=True)],
        [x.opened_at(path) for x, path in zip(plan.outputs, destinations, strict=True)],
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
    refused: UsageError | None = None
    for path in destinations:  # each is looked at: what a finished run left beside it goes
        try:
            output_place(path, overwrite=overwrite, sources=sources)
        except UsageError as error:
            refused = refused or error
    if refused is not None:
        raise refused


def _note(plan: Plan, windows: Windows) -> CalibrationNote:
    """Say what the importance of weights is taken from."""
    names = tuple(Path(source.name).name for source in windows.sources)
    return CalibrationNote(INLINE_STATISTICS, names, len(windows.ids), len(plan.linears))


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
                check_finite(name, reader.read(name), ref.file)  # says where in the tensor


@dataclass(frozen=True)
class _Run:
    """One plan being carried out."""

    plan: Plan
    settings: RunSettings
    progress: Progress
    calibration: Calibration
    ledger: Ledger
    work: Path
    room: Callable[[], None]  # refuses to go on with too little on the disk

    def finished(
        self,
        partials: Sequence[Path],
        writers: Sequence[OutputWriter],
        places: Sequence[OutputDirectory],
    ) -> QuantizeResult:
        """Do everything that is not done yet, and read all of it back."""
        plan, progress = self.plan, self.progress
        with TensorReader(plan.checkpoint.refs) as reader:
            _check_kept(plan, reader)
            self.ledger.verify()
            done = plan.n_blocks - len(self.ledger.missing)
            if done:
                progress.note(f"continuing: {done} of {plan.n_blocks} blocks are finished")
            progress.start("quantizing", plan.n_blocks, done=done)
            with torch.no_grad(), devices.repeatable(self.settings.device):
                found = self._blocks(DenseSource(plan.checkpoint, reader))
        self.ledger.adopt()
        digests = [writer.finish({**self.calibration.importance, **found}) for writer in writers]
        progress.finish()
        for output, directory in zip(plan.outputs, partials, strict=True):
            for warning in output.write_companions(plan, directory):
                progress.warn("companion_file", warning)
            output.verify(plan, directory)
        plan.checkpoint.check_unchanged()
        ram, vram = devices.peak_memory(self.settings.device)
        return QuantizeResult(
            plan=plan,
            paths=tuple(place.final for place in places),
            digests=tuple(digests),
            layers=self.ledger.layers,
            windows=self.calibration.windows,
            seconds=self.ledger.seconds,
            peak_ram_bytes=ram,
            peak_vram_bytes=vram,
            device=devices.describe(self.settings.device),
            from_statistics=self.calibration.statistics is not None,
        )

    def _blocks(self, source: DenseSource) -> dict[str, Tensor]:
        """Quantize block after block; return what the head reads, if that is seen and wanted."""
        plan, windows = self.plan, self.calibration.windows
        streamed = plan.calibrated and self.calibration.statistics is None
        weighs_head = streamed and any(output.weighs_head for output in plan.outputs)
        if not self.ledger.missing and not weighs_head:
            return {}
        skeleton = _skeleton(plan, self.settings.device) if plan.calibrated else None
        if not streamed or skeleton is None or windows is None:
            self._blocks_by_themselves(source, None if skeleton is None else skeleton.config)
            return {}
        spill = self.work / "spill"
        try:
            spill.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(spill, error) from error
        held = self.settings.held_bytes
        stream = Stream(skeleton, source, windows.ids, spill, held_bytes=held)
        quantizer = BlockQuantizer(plan, skeleton, source, stream, self.ledger.sinks)
        index = 0
        while self.ledger.missing or weighs_head:
            index = self.ledger.skip(index, quantizer.streams)
            if index == plan.n_blocks:
                break
            replaced = self.ledger.replaced(index)
            if replaced is not None:
                quantizer.replay(index, replaced)
            else:
                self.room()
                result = quantizer.quantize(index)
                self.ledger.note(index, result.changed, quantizer)
                self.progress.advance(f"block {index + 1} of {plan.n_blocks}")
            index += 1
        return {OUTPUT: head_inputs(skeleton, source, stream).diagonal.cpu()} if weighs_head else {}

    def _blocks_by_themselves(self, source: DenseSource, config: Any) -> None:
        """Quantize the blocks that are missing, each from its weights and a file's statistics."""
        statistics = self.calibration.statistics
        for index in self.ledger.missing:
            self.room()
            result = quantize_block_without_data(
                self.plan,
                source,
                index,
                self.settings.device,
                self.ledger.sinks,
                config=config,
                statistics=None if statistics is None else statistics[index],
            )
            self.ledger.note(index, result.changed, None)
            self.progress.advance(f"block {index + 1} of {self.plan.n_blocks}")


def _skeleton(plan: Plan, device: torch.device) -> Skeleton:
    return skeleton_of(
        plan.checkpoint,
        dtype=devices.compute_dtype(plan.dtype, device),
        device=device,
    )
