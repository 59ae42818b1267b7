"""Stream hidden states through a model block by block, one block's weights in memory at a time.

Two streams can run side by side: the quantized model's hidden states, and the float model's
(its twin), so that each layer can be aimed at what the float model would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qtool import device as devices
from qtool.calibration.activations import HiddenStates
from qtool.calibration.moments import Moments, MomentSums, Statistic
from qtool.model.family import Tap
from qtool.model.pausing import HeldRun, PausableBlock
from qtool.model.skeleton import Skeleton, WeightSource
from qtool.model.trace import BlockCall, enter, run_block, run_watched

# Bytes of a batch's widest intermediate. On the CPU small enough for memory to be reused without
# the kernel mapping it anew each time, on a GPU large enough to fill it.
INTERMEDIATE_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
# Part of the free memory that activations held inside a block may take.
HELD_PART = 4
# Part of the device's free memory that hidden states may take. The float model's travel beside the
# quantized one's, and copying them once a tap takes far less time than a block: room on a small
# card is worth more to the weights that are being rounded.
ON_DEVICE_PART = 8


class Stream:
    """Hidden states of all windows in front of one block, and how blocks are called on them.

    Args:
        skeleton: its embeddings are materialised while the stream is made, then dropped.
        source: where they come from.
        windows: token ids [windows, length].
        spill: directory for hidden states that do not fit in memory.
        held_bytes: budget for activations held inside a block; None takes a part of what is free.
            It decides how a block is gone through, never what comes out.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: WeightSource,
        windows: Tensor,
        spill: Path,
        *,
        held_bytes: int | None = None,
    ) -> None:
        self._calls: dict[int, tuple[BlockCall, ...]] = {}
        self._sizes: list[int] = []
        self._device = skeleton.device
        self._spill = spill
        self.hidden = self._store()
        embeddings = embedding_path(skeleton)
        skeleton.load(embeddings, source)
        for ids in windows.split(windows_per_batch(skeleton, windows)):
            entry = enter(skeleton, ids)
            self._calls.setdefault(len(ids), entry.calls)
            self._sizes.append(len(ids))
            self.hidden.append(entry.hidden)
        skeleton.drop(embeddings)
        budget = devices.free_memory(self._device) // HELD_PART
        needed = windows.numel() * _held_per_token(skeleton)
        self.in_step = needed <= (budget if held_bytes is None else held_bytes)

    def _store(self) -> HiddenStates:
        return HiddenStates(
            self._device,
            memory_bytes=devices.free_memory(torch.device("cpu")) // HELD_PART,
            device_bytes=devices.free_memory(self._device) // ON_DEVICE_PART,
            spill=self._spill,
        )

    def __len__(self) -> int:
        return len(self._sizes)

    def call(self, batch: int, block: int) -> BlockCall:
        """Return how the model calls block `block` on batch `batch`."""
        return self._calls[self._sizes[batch]][block]

    def copy_hidden(self) -> HiddenStates:
        """Return a second set of the same hidden states, for the twin."""
        twin = self._store()
        for batch in self.hidden:
            twin.append(batch.clone())
        return twin


def embedding_path(skeleton: Skeleton) -> str:
    """Return the path of the input embeddings."""
    embeddings = skeleton.model.get_input_embeddings()
    return next(name for name, module in skeleton.model.named_modules() if module is embeddings)


def windows_per_batch(skeleton: Skeleton, windows: Tensor) -> int:
    """Return how many windows run through a block at once; depends on sizes and device alone."""
    per_token = skeleton.config.intermediate_size * skeleton.dtype.itemsize
    wanted = INTERMEDIATE_BYTES[skeleton.device.type] // (windows.shape[1] * per_token)
    return max(1, min(len(windows), wanted))


def _held_per_token(skeleton: Skeleton) -> int:
    """Bytes of one token's activations while all batches wait: residual and widest input, twice."""
    config = skeleton.config
    widest = config.hidden_size + config.intermediate_size
    everything = 3 * config.hidden_size + config.intermediate_size  # a transform keeps all inputs
    return int((widest + everything) * skeleton.dtype.itemsize)


def advance(stream: Stream, hidden: HiddenStates, block: nn.Module, index: int) -> None:
    """Replace hidden states in front of a block by those behind it."""
    for batch in range(len(stream)):
        hidden.put(batch, run_block(block, hidden.get(batch), stream.call(batch, index)))


# Tap name -> the inputs [tokens, C] that it read, batch by batch.
TapInputs = dict[str, list[Tensor]]


def observe(
    stream: Stream,
    hidden: HiddenStates,
    block: nn.Module,
    index: int,
    taps: tuple[Tap, ...],
    *,
    statistics: Statistic,
    keep_inputs: bool = False,
    move_on: bool = False,
) -> tuple[dict[str, Moments], TapInputs]:
    """Run a block on all batches and sum up what its taps read.

    Args:
        stream: gives the calls.
        hidden: what enters the block; replaced by what leaves it if `move_on`.
        block: materialised.
        index: of the block.
        taps: those to look at.
        statistics: whether to sum Hessians, or diagonals only.
        keep_inputs: also return the inputs of taps that are corrected.
        move_on: see `hidden`.

    Returns:
        Tap name -> moments, and the inputs if they were to be kept.
    """
    sums: dict[str, MomentSums] = {}
    inputs: TapInputs = {}

    def watch(tap: Tap, seen: Tensor) -> None:
        if tap.name not in sums:
            hessian = statistics == "hessian"
            sums[tap.name] = MomentSums(seen.shape[1], seen.device, hessian=hessian)
        sums[tap.name].add(seen)
        if keep_inputs and tap.corrected:
            inputs.setdefault(tap.name, []).append(seen)

    for batch in range(len(stream)):
        call = stream.call(batch, index)
        output = run_watched(block, taps, hidden.get(batch), call, watch)
        if move_on and output is not None:
            hidden.put(batch, output)
    return {name: total.result() for name, total in sums.items()}, inputs


# Called with a tap and the moments of its inputs; gives the tap's linears their final weights.
TapVisitor = Callable[[Tap, Moments], None]


@dataclass(frozen=True)
class Twin:
    """Where the float model's inputs come from: kept from before, or a second stream."""

    block: nn.Module  # the float block
    hidden: HiddenStates | None = None  # in front of it; None if `inputs` are given
    inputs: TapInputs = field(default_factory=dict)


def visit_in_step(
    stream: Stream,
    working: nn.Module,
    index: int,
    taps: tuple[Tap, ...],
    visit: TapVisitor,
    twin: Twin | None,
) -> None:
    """Visit the taps of a block in order while all batches go through it in step, once.

    Each tap's weights are final before its output is computed, so every tap sees inputs from
    quantized layers only. Afterwards the streams stand behind the block.
    """
    with PausableBlock(working, taps) as held, ExitStack() as stack:
        runs = _start(stream, held, stream.hidden, index)
        twins: list[HeldRun] = []
        if twin is not None and twin.hidden is not None:
            wanted = tuple(tap for tap in taps if tap.corrected)
            reference = stack.enter_context(PausableBlock(twin.block, wanted))
            twins = _start(stream, reference, twin.hidden, index)
        for tap in taps:
            visit(tap, _summed(_held_inputs(runs, twin, twins, tap)))
        _leave(runs, stream.hidden)
        if twin is not None and twin.hidden is not None:
            _leave(twins, twin.hidden)


def _leave(runs: list[HeldRun], hidden: HiddenStates) -> None:
    """Lead every batch to the end of the block and keep what comes out."""
    for batch, run in enumerate(runs):
        run.advance()
        hidden.put(batch, run.output())


def _start(stream: Stream, held: PausableBlock, hidden: HiddenStates, index: int) -> list[HeldRun]:
    return [
        held.start(partial(hidden.get, batch), stream.call(batch, index))
        for batch in range(len(stream))
    ]


def _held_inputs(
    runs: list[HeldRun], twin: Twin | None, twins: list[HeldRun], tap: Tap
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Lead every batch to a tap and yield what it reads there, and what its twin does."""
    for batch, run in enumerate(runs):
        other: Tensor | None = None
        if not tap.corrected:
            pass
        elif twins:
            other = twins[batch].advance()
        elif twin is not None:
            other = twin.inputs[tap.name][batch]
        yield run.advance(), other


def _summed(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> Moments:
    """Sum up (input, twin's input) of all batches: what a rounding needs, so no mean |x|."""
    sums: MomentSums | None = None
    for seen, other in pairs:
        if seen is None:
            raise RuntimeError("the block was left before the tap was reached")
        if sums is None:
            cross = other is not None
            columns = seen.shape[1]
            sums = MomentSums(columns, seen.device, hessian=True, cross=cross, absolute=False)
        sums.add(seen, other)
    if sums is None:
        raise RuntimeError("there are no batches")
    return sums.result()


def visit_in_stages(
    stream: Stream,
    working: nn.Module,
    index: int,
    taps: tuple[Tap, ...],
    visit: TapVisitor,
    twin: Twin | None,
) -> None:
    """Visit the taps of a block in order where held activations would not fit in memory.

    For each tap every batch runs as far as that tap, then its weights become final. The result
    is the same to the bit; only the beginning of the block is computed again.
    """
    for tap in taps:
        visit(tap, _summed(_inputs(stream, working, index, tap, twin)))
    advance(stream, stream.hidden, working, index)
    if twin is not None and twin.hidden is not None:
        advance(stream, twin.hidden, twin.block, index)


def _inputs(
    stream: Stream, working: nn.Module, index: int, tap: Tap, twin: Twin | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield, batch by batch, what a tap reads in the working block and in the float one."""
    for batch in range(len(stream)):
        call = stream.call(batch, index)
        seen: list[Tensor] = []

        def watch(_: Tap, inputs: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(inputs)

        run_watched(working, (tap,), stream.hidden.get(batch), call, watch, stop_at=tap)
        if twin is not None and twin.hidden is not None and tap.corrected:
            run_watched(twin.block, (tap,), twin.hidden.get(batch), call, watch, stop_at=tap)
        yield seen[0], seen[1] if len(seen) > 1 else None
