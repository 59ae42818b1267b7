"""Hold a block's forward still at each tap, so that many batches can be led through it in step.

All batches stop in front of a tap, its weights become final, and all go on with the new ones:
nothing is computed twice, and no batch needs more than its own live activations. A forward cannot
be left and entered again, so each batch's is a greenlet: a stack of its own in the same thread,
which runs until it hands back control.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qtool.model.family import Tap
from qtool.model.trace import BlockCall, run_block


class PausableBlock:
    """A block whose runs stop before the first linear of each tap; a context manager.

    Leaving it ends the runs that are still held and takes the hooks off again.

    Args:
        block: materialised; its weights may be replaced while runs are held.
        taps: where to stop, in execution order.
    """

    def __init__(self, block: nn.Module, taps: tuple[Tap, ...]) -> None:
        self._block = block
        self._taps = taps
        self._handles: list[Any] = []
        self._runs: list[HeldRun] = []

    def __enter__(self) -> Self:
        for tap in self._taps:
            linear = self._block.get_submodule(tap.linears[0])
            self._handles.append(linear.register_forward_pre_hook(_hand_over))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for run in self._runs:
            run.cancel()
        for handle in self._handles:
            handle.remove()
        # Runs and block refer to each other: the weights would stay until the next collection.
        self._runs.clear()
        self._handles.clear()

    def start(self, hidden: Callable[[], Tensor], call: BlockCall) -> HeldRun:
        """Return a run on hidden states that are asked for when it first advances."""
        block = self._block
        run = HeldRun(lambda: run_block(block, hidden(), call))
        self._runs.append(run)
        return run


def _hand_over(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Give a linear's input [tokens, C] to whoever advanced this run, and wait."""
    del module
    seen = arguments[0].reshape(-1, arguments[0].shape[-1])
    getcurrent().parent.switch(seen)


class HeldRun:
    """One batch on its way through a block; `forward` computes the block's output."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self._greenlet = greenlet(forward)
        self._output: Tensor | None = None

    def advance(self) -> Tensor | None:
        """Run to the next tap and return its input [tokens, C]; None once the block is left.

        Whatever the forward raises is raised here.
        """
        got: Tensor = self._greenlet.switch()
        if not self._greenlet.dead:
            return got
        self._output = got
        return None

    def output(self) -> Tensor:
        """Return what left the block, once `advance` has given None."""
        if self._output is None:
            raise RuntimeError("the block has not been left yet")
        return self._output

    def cancel(self) -> None:
        """End the run wherever it is held."""
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw()
