"""`qtool calibrate` from start to file, in one process or several.

Each block's moments are kept once it is done, with the hidden states behind the last one, so an
interrupted calibration goes on from the same bits, as `quantize` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qtool import device as devices
from qtool.calibration.activations import HiddenStates
from qtool.calibration.moments import Moments
from qtool.calibration.statistics_file import Statistics, write_statistics
from qtool.calibration.tokens import Windows
from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.output import PlainFile
from qtool.errors import DamagedError
from qtool.model.family import family_of
from qtool.pipeline.calibrate import calibrate, stored_dtype
from qtool.pipeline.identity import calibration_identity
from qtool.pipeline.journal import JOURNAL, FinishedBlock, Journal
from qtool.pipeline.progress import Progress
from qtool.pipeline.resuming import (
    LeftForALaterRun,
    check_state_space,
    clear,
    opened_journal,
    state_bytes,
)
from qtool.pipeline.states import States

STREAM = "float"
KIND = "moments"


@dataclass(frozen=True)
class CalibrationSettings:
    """Where and how a calibration runs.

    Args:
        device: to compute on.
        overwrite: replace a file of the output's name.
        resume: go on with what an interrupted run left.
        held_bytes: most bytes of hidden states in memory; None for what there is.
    """

    device: torch.device
    overwrite: bool = False
    resume: bool = True
    held_bytes: int | None = None


def calibrate_to(
    output: Path,
    checkpoint: Checkpoint,
    windows: Windows,
    settings: CalibrationSettings,
    progress: Progress,
    finish: Callable[[Statistics], Statistics] = lambda found: found,
) -> Statistics:
    """Measure what the linears of a model read, and write it to a file; return what was written.

    Args:
        output: the file; it has its name only when it is complete.
        checkpoint: the model.
        windows: what it reads.
        settings: device and limits.
        progress: told what happens.
        finish: may change the statistics before they are written.

    Raises:
        UsageError: the output is in the way, or an interrupted run with other settings is there.
        UnsupportedError: the model's family is not supported.
        NumericalError: weights or activations are not finite.
        CapacityError: the disk is full, or will be.
        InterruptionError: by a signal, with finished blocks to go on with.
    """
    architecture = family_of(checkpoint.config).gguf_architecture
    n_blocks = int(checkpoint.config["num_hidden_layers"])
    place = PlainFile(
        output,
        overwrite=settings.overwrite,
        sources=[checkpoint.path],
        resume=settings.resume,
    )
    with place as directory, contextlib.ExitStack() as stack:
        work = place.work.path
        held = stack.enter_context(LeftForALaterRun([place], work / JOURNAL, n_blocks))
        identity = partial(calibration_identity, checkpoint, settings.device, windows)
        held.journal = opened_journal(work / JOURNAL, settings.device, identity)
        clear(directory)
        dtype = devices.compute_dtype(stored_dtype(checkpoint), settings.device)
        needed = state_bytes(checkpoint.config, windows, dtype)
        states, spill = work / "states", work / "spill"
        finished = FinishedMoments(
            checkpoint,
            held.journal,
            States(states),
            progress,
            partial(check_state_space, directory, states, needed),
        )
        try:
            spill.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(spill, error) from error
        found = finish(
            calibrate(
                checkpoint,
                windows,
                settings.device,
                progress,
                spill=spill,
                held_bytes=settings.held_bytes,
                finished=finished,
            )
        )
        try:
            write_statistics(directory / place.final.name, found, architecture)
        except OSError as error:
            raise write_error(output, error) from error
        checkpoint.check_unchanged()
        held.complete = True
        place.commit()
    return found


class FinishedMoments:
    """What is known of the blocks that a calibration is done with.

    Args:
        checkpoint: the model.
        journal: of the run, perhaps with blocks of an earlier process.
        states: of the run.
        progress: told what happens.
        room: refuses to go on with too little on the disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        journal: Journal,
        states: States,
        progress: Progress,
        room: Callable[[], None],
    ) -> None:
        self._checkpoint, self._family = checkpoint, family_of(checkpoint.config)
        self._journal, self._states, self._progress = journal, states, progress
        self._room = room
        self.blocks: dict[int, Mapping[str, Moments]] = {}  # tap name -> moments
        self._take_over()
        room()

    def _take_over(self) -> None:
        lost = self._journal.damaged
        n_blocks = int(self._checkpoint.config["num_hidden_layers"])
        for index, block in list(self._journal.blocks.items()):
            tensors = self._states.load_tensors(block.kept) or {}
            moments = None if index >= n_blocks else self._moments(index, tensors)
            if moments is None:
                self._journal.forget(index)
                lost += 1
            else:
                self.blocks[index] = moments
        if lost:
            self._progress.warn(
                "damaged_state", f"{lost} of what an earlier run finished is damaged: done again"
            )
        if self.blocks:
            count = f"{len(self.blocks)} of {n_blocks}"
            self._progress.note(f"continuing: {count} blocks are finished")

    def _moments(self, index: int, tensors: Mapping[str, Tensor]) -> Mapping[str, Moments] | None:
        """Return the moments that a file holds; None where it is not what `note` wrote."""
        found = {}
        for tap in self._family.taps:
            weight = f"{self._family.blocks}.{index}.{tap.linears[0]}.weight"
            columns = self._checkpoint.refs[weight].shape[1]
            means = [tensors.get(f"{tap.name}.{kind}") for kind in ("mean_abs", "diagonal")]
            tokens = tensors.get(f"{tap.name}.tokens")
            if tokens is None or tokens.dtype != torch.int64 or tokens.shape != ():
                return None
            for mean in means:
                if mean is None or mean.dtype != torch.float32 or mean.shape != (columns,):
                    return None
                if not bool(mean.isfinite().all()):
                    return None
            absolute, diagonal = (mean for mean in means if mean is not None)
            found[tap.name] = Moments(int(tokens), absolute, diagonal)
        return found

    def skip(self, index: int, hidden: HiddenStates) -> int:
        """Move a stream in front of block `index` as far as is known; return the block in front."""
        kept = [block for block in self._journal.blocks.values() if block.hidden]
        last = max(kept, key=lambda block: block.index, default=None)
        if last is None or last.index < index:
            return index
        if any(i not in self.blocks for i in range(index, last.index)):
            return index
        file = last.hidden.get(STREAM)
        if file is None or not self._states.whole(file, hidden):
            self._progress.warn(
                "damaged_state", "hidden states of an earlier run are damaged: computed again"
            )
            self._journal.forget_states()
            return index
        if not self._states.load_hidden(file, hidden):
            raise DamagedError(
                "the hidden states of an earlier run changed while they were read",
                "start over with --no-resume",
            )
        return last.index + 1

    def note(self, index: int, moments: Mapping[str, Moments], hidden: HiddenStates) -> None:
        """Keep what a block's taps read, and the stream behind it.

        Raises:
            CapacityError, DamagedError: the disk is full or failed, or the model was changed.
        """
        self._checkpoint.check_unchanged()  # no later run is to believe what two models gave
        self._room()
        last = max((b.index for b in self._journal.blocks.values() if b.hidden), default=-1)
        # A hole that was mended lies behind what is kept already.
        streams = {STREAM: self._states.save_hidden(STREAM, index, hidden)} if last < index else {}
        earlier = self._journal.blocks.get(index)
        tensors = {
            f"{tap}.{kind}": tensor.cpu()
            for tap, found in moments.items()
            for kind, tensor in (
                ("mean_abs", found.mean_abs),
                ("diagonal", found.diagonal),
                ("tokens", torch.tensor(found.tokens)),
            )
        }
        block = FinishedBlock(
            index=index,
            tensors=(),
            digests=(),
            layers=(),
            warnings=(),
            seconds=0.0,
            kept=self._states.save_tensors(KIND, index, tensors),
            hidden=streams if earlier is None else {**earlier.hidden, **streams},
        )
        self._journal.note(block)
        self.blocks[index] = moments
        if streams:
            self._states.remove_hidden(but=streams)
