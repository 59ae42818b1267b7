"""Stream hidden states through a model block by block, one block's weights in memory at a time.

Two streams can run side by side: the quantized model's hidden states, and the float model's
(its twin), so that each layer can be aimed at what the float model would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qtool import device as devices
from qtool.calibration.activations import HiddenStates
from qtool.calibration.moments import Moments, MomentSums, Statistic
from qtool.model.family import Tap
from qtool.model.skeleton import Skeleton, WeightSource
from qtool.model.trace import BlockCall, enter, run_block, run_watched

# Bytes of a batch's activations inside one block, in multiples of its widest intermediate.
LIVE_INTERMEDIATES = 4
LIVE_HIDDEN = 8
DEFAULT_BATCH_BYTES = 2 * 2**30


class Stream:
    """Hidden states of all windows in front of one block, and how blocks are called on them.

    Args:
        skeleton: its embeddings are materialised while the stream is made, then dropped.
        source: where they come from.
        windows: token ids [windows, length].
        spill: directory for hidden states that do not fit in memory.
        batch_bytes: budget for the activations of one batch inside a block.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        source: WeightSource,
        windows: Tensor,
        spill: Path,
        *,
        batch_bytes: int = DEFAULT_BATCH_BYTES,
    ) -> None:
        self._calls: dict[int, tuple[BlockCall, ...]] = {}
        self._sizes: list[int] = []
        device = skeleton.device
        self.hidden = HiddenStates(
            device,
            memory_bytes=devices.free_memory(torch.device("cpu")) // 4,
            device_bytes=devices.free_memory(device) // 4,
            spill=spill,
        )
        self._spill = spill
        self._device = device
        embeddings = embedding_path(skeleton)
        skeleton.load(embeddings, source)
        for ids in windows.split(windows_per_batch(skeleton, windows, batch_bytes)):
            entry = enter(skeleton, ids)
            self._calls.setdefault(len(ids), entry.calls)
            self._sizes.append(len(ids))
            self.hidden.append(entry.hidden)
        skeleton.drop(embeddings)

    def __len__(self) -> int:
        return len(self._sizes)

    def call(self, batch: int, block: int) -> BlockCall:
        """Return how the model calls block `block` on batch `batch`."""
        return self._calls[self._sizes[batch]][block]

    def copy_hidden(self) -> HiddenStates:
        """Return a second set of the same hidden states, for the twin."""
        twin = HiddenStates(
            self._device,
            memory_bytes=devices.free_memory(torch.device("cpu")) // 4,
            device_bytes=devices.free_memory(self._device) // 4,
            spill=self._spill,
        )
        for batch in self.hidden:
            twin.append(batch.clone())
        return twin


def embedding_path(skeleton: Skeleton) -> str:
    """Return the path of the input embeddings."""
    embeddings = skeleton.model.get_input_embeddings()
    return next(name for name, module in skeleton.model.named_modules() if module is embeddings)


def windows_per_batch(skeleton: Skeleton, windows: Tensor, batch_bytes: int) -> int:
    """Return how many windows run through a block at once within a budget of bytes."""
    config = skeleton.config
    widest = LIVE_INTERMEDIATES * config.intermediate_size + LIVE_HIDDEN * config.hidden_size
    per_window = windows.shape[1] * widest * skeleton.dtype.itemsize
    return max(1, min(len(windows), batch_bytes // per_window))


def advance(stream: Stream, hidden: HiddenStates, block: nn.Module, index: int) -> None:
    """Replace hidden states in front of a block by those behind it."""
    for batch in range(len(stream)):
        hidden.put(batch, run_block(block, hidden.get(batch), stream.call(batch, index)))


def observe(
    stream: Stream,
    hidden: HiddenStates,
    block: nn.Module,
    index: int,
    taps: tuple[Tap, ...],
    *,
    statistics: Statistic | None,
    keep_inputs: bool = False,
    move_on: bool = False,
) -> tuple[dict[str, Moments], dict[str, Tensor]]:
    """Run a block on all batches and sum up what its taps read.

    Args:
        stream: gives the calls.
        hidden: what enters the block; replaced by what leaves it if `move_on`.
        block: materialised.
        index: of the block.
        taps: those to look at.
        statistics: whether to sum Hessians, diagonals only, or nothing.
        keep_inputs: also return the inputs [tokens, C] themselves (one batch only).
        move_on: see `hidden`.

    Returns:
        Tap name -> moments, and tap name -> inputs if they were to be kept.
    """
    sums: dict[str, MomentSums] = {}
    inputs: dict[str, Tensor] = {}

    def watch(tap: Tap, seen: Tensor) -> None:
        if statistics is not None:
            if tap.name not in sums:
                full = statistics == "hessian"
                sums[tap.name] = MomentSums(seen.shape[1], seen.device, hessian=full)
            sums[tap.name].add(seen)
        if keep_inputs:
            # A tap that reads the residual stream itself (OLMo 2) sees memory that `put` reuses.
            inputs[tap.name] = seen.clone() if seen.data_ptr() == entering.data_ptr() else seen

    for batch in range(len(stream)):
        call = stream.call(batch, index)
        entering = hidden.get(batch)
        output = run_watched(block, taps, entering, call, watch)
        if move_on and output is not None:
            hidden.put(batch, output)
    return {name: total.result() for name, total in sums.items()}, inputs


# Called with a tap and the moments of its inputs; gives the tap's linears their final weights.
TapVisitor = Callable[[Tap, Moments], None]


def visit_in_one_pass(
    stream: Stream,
    working: nn.Module,
    index: int,
    taps: tuple[Tap, ...],
    visit: TapVisitor,
    twin_inputs: Mapping[str, Tensor],
) -> None:
    """Visit the taps of a block in order while its only batch runs through it once.

    Each tap's weights are final before its output is computed, so every tap sees inputs from
    quantized layers only, and nothing is computed twice.
    """

    def watch(tap: Tap, seen: Tensor) -> None:
        twin = twin_inputs.get(tap.name)
        sums = _sums(seen, twin)
        sums.add(seen, twin)
        visit(tap, sums.result())

    call = stream.call(0, index)
    output = run_watched(working, taps, stream.hidden.get(0), call, watch)
    if output is not None:
        stream.hidden.put(0, output)


def _sums(seen: Tensor, twin: Tensor | None) -> MomentSums:
    """Return empty sums of what a rounding needs of inputs like `seen`: no mean |x|."""
    cross = twin is not None
    return MomentSums(seen.shape[1], seen.device, hessian=True, cross=cross, absolute=False)


def visit_in_stages(
    stream: Stream,
    working: nn.Module,
    index: int,
    taps: tuple[Tap, ...],
    visit: TapVisitor,
    reference: nn.Module,
    twin: HiddenStates | None,
) -> None:
    """Visit the taps of a block in order where several batches are needed to bound memory.

    For each tap every batch runs as far as that tap, then its weights become final. The result
    is the same as that of one pass; only the beginning of the block is computed again.
    """
    for tap in taps:
        sums: MomentSums | None = None
        for seen, other in _inputs(stream, working, index, tap, reference, twin):
            sums = sums or _sums(seen, other)
            sums.add(seen, other)
        if sums is not None:
            visit(tap, sums.result())
    advance(stream, stream.hidden, working, index)
    if twin is not None:
        advance(stream, twin, reference, index)


def _inputs(
    stream: Stream,
    working: nn.Module,
    index: int,
    tap: Tap,
    reference: nn.Module,
    twin: HiddenStates | None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield, batch by batch, what a tap reads in the working block and in the float one."""
    for batch in range(len(stream)):
        call = stream.call(batch, index)
        seen: list[Tensor] = []

        def watch(_: Tap, inputs: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(inputs)

        run_watched(working, (tap,), stream.hidden.get(batch), call, watch, stop_at=tap)
        if twin is not None:
            run_watched(reference, (tap,), twin.get(batch), call, watch, stop_at=tap)
        yield seen[0], seen[1] if twin is not None else None
