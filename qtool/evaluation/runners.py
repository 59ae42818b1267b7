"""Run anything that qtool evaluates on token windows.

Directories - float or packed - go through block by block; GGUF files are llama.cpp's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qtool import device as devices
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import TensorReader
from qtool.errors import NumericalError
from qtool.evaluation.rows import PIECE_ROWS
from qtool.formats.reading import DenseSource
from qtool.model.skeleton import Skeleton, WeightSource, skeleton_of
from qtool.model.streaming import Stream, advance, embedding_path
from qtool.model.trace import final_norm, head_logits


class Runner(Protocol):
    """A model that has been given its windows."""

    @property
    def vocabulary(self) -> int:
        """How many tokens it predicts."""

    def logits(self) -> Iterator[Tensor]:
        """Yield the logits [length, vocabulary] float32 of one window after the other."""

    def pieces(self) -> Iterator[Tensor]:
        """Yield the same in pieces of PIECE_ROWS rows, the last of a window shorter, unchecked."""

    def close(self) -> None:
        """Free what it holds."""


class StreamedModel:
    """A model run on windows with one block's weights in memory at a time.

    Args:
        checkpoint: float, or of any format qtool writes.
        windows: token ids [windows, length].
        device: where to compute.
        dtype: in which to compute.
        spill: directory for hidden states that do not fit in memory.
        tick: called after each block.

    Raises:
        UnsupportedError: the family or the quantization is not one that qtool reads.
        NumericalError: weights are not finite.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        spill: Path,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = checkpoint.name
        self._skeleton = skeleton_of(checkpoint, dtype=dtype, device=device)
        with torch.no_grad(), TensorReader(checkpoint.refs) as reader:
            source = DenseSource(checkpoint, reader)
            self._run_blocks(source, windows, spill, tick)
            load_head(self._skeleton, source)

    def _run_blocks(
        self, source: DenseSource, windows: Tensor, spill: Path, tick: Callable[[], None]
    ) -> None:
        skeleton = self._skeleton
        self._stream = Stream(skeleton, source, windows, spill)
        for index, block in enumerate(skeleton.blocks):
            path = skeleton.block_prefix(index).removesuffix(".")
            skeleton.load(path, source)
            advance(self._stream, self._stream.hidden, block, index)
            skeleton.drop(path)
            devices.return_free_memory()
            tick()

    @property
    def vocabulary(self) -> int:
        """How many tokens it predicts."""
        skeleton = self._skeleton
        return int(skeleton.model.get_submodule(skeleton.family.head).weight.shape[0])

    def close(self) -> None:
        """Free the head; the hidden states go with the object."""
        self._skeleton.drop(self._skeleton.family.head)

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """Yield the logits [length, vocabulary] float32 of one window after the other.

        Raises:
            NumericalError: they are not finite.
        """
        for batch in self._stream.hidden:
            for window in batch:
                logits = head_logits(self._skeleton, window[None])[0].to(torch.float32)
                if not bool(torch.isfinite(logits).all()):
                    raise NumericalError(
                        f"{self._name} gives logits that are not finite",
                        "the model overflows; try another --dtype, or quantize with more bits",
                    )
                yield logits

    @torch.no_grad()
    def pieces(self) -> Iterator[Tensor]:
        """Yield logits [PIECE_ROWS or fewer, vocabulary] float32; no piece spans two windows.

        Nothing looks for values that are not finite: whoever sums them up will notice.
        """
        for batch in self._stream.hidden:
            for window in batch:
                for rows in window.split(PIECE_ROWS):
                    yield head_logits(self._skeleton, rows[None])[0].to(torch.float32)


def load_head(skeleton: Skeleton, source: WeightSource) -> None:
    """Materialise the norm behind the last block and the head, tied to the embeddings or not.

    Raises:
        DamagedError: weights are missing or of another shape.
    """
    skeleton.load(final_norm(skeleton.family), source)
    head = skeleton.family.head
    if f"{head}.weight" in source:
        skeleton.load(head, source)
        return
    embeddings = embedding_path(skeleton)
    tied = source.read(f"{embeddings}.weight")
    skeleton.assign(skeleton.model.get_submodule(head), {"weight": tied})
