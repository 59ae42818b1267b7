"""What a run has finished, verified and put where: the journal, the states and the outputs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qtool.calibration.activations import HiddenStates
from qtool.errors import DamagedError
from qtool.grids.protocol import QuantizedTensor
from qtool.pipeline.blocks import BlockQuantizer, Sinks
from qtool.pipeline.journal import FinishedBlock, Journal
from qtool.pipeline.linears import PlannedLinear
from qtool.pipeline.outputs import OutputWriter
from qtool.pipeline.plan import Plan
from qtool.pipeline.progress import LayerReport, Progress
from qtool.pipeline.states import States


class Ledger:
    """Takes finished linears, and notes each block once all of it is written.

    Args:
        plan: of the run.
        journal: of the run, perhaps with blocks of an earlier process.
        states: directory for hidden states.
        writers: one per output.
        progress: told what happens.
    """

    def __init__(
        self,
        plan: Plan,
        journal: Journal,
        states: Path,
        writers: Sequence[OutputWriter],
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._journal = journal
        self._states = States(states)
        self._writers = writers
        self._progress = progress
        self._earlier: dict[int, FinishedBlock] = {}
        self._noted: set[int] = set()  # by this process
        self._layers: list[LayerReport] = []
        self._warnings: list[tuple[str, str]] = []
        earlier = max((block.seconds for block in journal.blocks.values()), default=0.0)
        self._started = time.perf_counter() - earlier

    # --- what an earlier process left -------------------------------------------------------

    def verify(self) -> None:
        """Hold the outputs to the journal: take over the blocks that are as they were written."""
        known = range(self._plan.n_blocks)
        damaged = [
            block
            for block in self._journal.blocks.values()
            if block.index not in known or not self._intact(block)
        ]
        for block in damaged:
            self._journal.forget(block.index)
        if damaged or self._journal.damaged:
            lost = len(damaged) + self._journal.damaged
            self._progress.warn(
                "damaged_state", f"{lost} of what an earlier run finished is damaged: done again"
            )
        self._earlier = dict(self._journal.blocks)
        for _, block in sorted(self._earlier.items()):
            for code, message in block.warnings:
                self._progress.warn(code, message)

    def _intact(self, block: FinishedBlock) -> bool:
        linears = [linear.name for linear in self._linears(block.index)]
        try:
            for writer, names in zip(self._writers, block.tensors, strict=True):
                told = set(names)
                if len(told) != len(names) or not all(writer.holds(x, told) for x in linears):
                    return False
            found = [
                writer.tensors.digest(names)
                for writer, names in zip(self._writers, block.tensors, strict=True)
            ]
        except (DamagedError, KeyError, ValueError):
            return False
        return tuple(found) == block.digests

    @property
    def missing(self) -> list[int]:
        """The blocks that are still to be done."""
        return [i for i in range(self._plan.n_blocks) if i not in self._journal.blocks]

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """One line for each linear of the finished blocks, in order."""
        blocks = sorted(self._journal.blocks.items())
        return tuple(layer for _, block in blocks for layer in block.layers)

    @property
    def seconds(self) -> float:
        """How long the run has taken, in all its processes."""
        return time.perf_counter() - self._started

    def skip(self, index: int, streams: Mapping[str, HiddenStates]) -> int:
        """Move streams in front of block `index` as far as is known; return the block in front.

        That is behind the last finished block, if all up to it are finished and its hidden states
        are whole, and where they are otherwise.
        """
        last = self._saved()
        if last is None or last.index < index:
            return index
        if any(i in range(index, last.index) for i in self.missing):
            return index
        # Both are looked at before either is loaded: they belong together.
        if set(last.hidden) != set(streams) or not all(
            self._states.whole(last.hidden[name], hidden) for name, hidden in streams.items()
        ):
            self._drop_states()
            return index
        for name, hidden in streams.items():
            if not self._states.load_hidden(last.hidden[name], hidden):
                raise DamagedError(
                    "the hidden states of an earlier run changed while they were read",
                    "start over with --no-resume",
                )
        return last.index + 1

    def _saved(self) -> FinishedBlock | None:
        """Return the last block, if its hidden states were kept."""
        blocks = [block for block in self._journal.blocks.values() if block.hidden]
        return max(blocks, key=lambda block: block.index, default=None)

    def _drop_states(self) -> None:
        self._progress.warn(
            "damaged_state",
            "hidden states of an earlier run are damaged: computed again from its blocks",
        )
        self._journal.forget_states()

    def replaced(self, index: int) -> Mapping[str, Tensor] | None:
        """Return the tensors of a finished block that differ from the checkpoint's, by full name.

        None where they cannot be had, so that the block has to be done again.
        """
        block = self._journal.blocks.get(index)
        if block is None:
            return None
        changed = self._states.load_tensors(block.kept)
        if changed is None or not all(map(self._fits, changed, changed.values())):
            self._journal.forget(index)
            return None
        found = dict(changed)
        for linear in self._linears(index):
            name = f"{linear.name}.weight"
            stored = self._writers[0].stored(name, frozenset(block.tensors[0]))
            if stored is None:
                self._journal.forget(index)
                return None
            found[name] = stored
        return found

    def _fits(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor may stand for the checkpoint's of that name."""
        ref = self._plan.checkpoint.refs.get(name)
        finite = tensor.is_floating_point() and bool(tensor.isfinite().all())
        return finite and ref is not None and tuple(tensor.shape) == tuple(ref.shape)

    def _linears(self, index: int) -> list[PlannedLinear]:
        taps = self._plan.by_block.get(index, {})
        return [linear for linears in taps.values() for linear in linears]

    def adopt(self) -> None:
        """Count what an earlier process finished, and this one did not do again, as written."""
        for index, block in self._earlier.items():
            if index not in self._noted:
                for writer, names in zip(self._writers, block.tensors, strict=True):
                    writer.tensors.adopt(names)

    # --- what this process does -------------------------------------------------------------

    @property
    def sinks(self) -> Sinks:
        """Where finished linears and their reports go."""
        return Sinks(self._write, self._report)

    def _write(self, name: str, quantized: QuantizedTensor) -> None:
        held = quantized.cpu()
        for writer in self._writers:
            writer.write(name, held)

    def _report(self, report: LayerReport) -> None:
        self._layers.append(report)
        if report.damp_percent is not None and report.damp_raised:
            message = (
                f"{report.name}: the Hessian needed damping {report.damp_percent:g}; "
                "more calibration windows would help"
            )
            self._warnings.append(("damping_raised", message))
            self._progress.warn("damping_raised", message)
        self._progress.layer(report)

    def note(
        self, index: int, changed: Mapping[str, Tensor], quantizer: BlockQuantizer | None
    ) -> None:
        """Write what else changed in a block, keep the streams behind it, and note it finished.

        Raises:
            CapacityError, DamagedError: the disk is full or failed, or the model was changed.
        """
        self._plan.checkpoint.check_unchanged()  # no later run is to believe what two models gave
        for writer in self._writers:
            for name, tensor in changed.items():
                writer.write_changed(name, tensor)
        tensors = tuple(writer.tensors.recent() for writer in self._writers)
        digests = tuple(
            w.tensors.digest(names) for w, names in zip(self._writers, tensors, strict=True)
        )
        last = self._saved()
        hidden = {}
        # A hole that was mended lies behind what is kept already.
        if quantizer is not None and (last is None or last.index < index):
            hidden = {
                name: self._states.save_hidden(name, index, states)
                for name, states in quantizer.streams.items()
            }
        block = FinishedBlock(
            index=index,
            tensors=tensors,
            digests=digests,
            layers=tuple(self._layers),
            warnings=tuple(self._warnings),
            seconds=self.seconds,
            # Only a replay of the streams asks for them.
            kept=None
            if quantizer is None
            else self._states.save_tensors("changed", index, changed),
            hidden=hidden,
        )
        self._journal.note(block)
        self._noted.add(index)
        if hidden:
            self._states.remove_hidden(but=hidden)
        self._layers, self._warnings = [], []
