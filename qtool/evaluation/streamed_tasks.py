"""Tasks on directories: all requests go through the model together, one block's weights at a time.

Only text that is generated needs the whole model at once; see `whole_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtool import device as devices
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import TensorReader
from qtool.errors import UnsupportedError
from qtool.evaluation.continuations import (
    Answer,
    Begin,
    Request,
    Tokens,
    bucket_of,
    covers,
    no_steps,
)
from qtool.evaluation.rows import PIECE_ROWS, score_rows
from qtool.evaluation.runners import load_head
from qtool.evaluation.scores import not_finite
from qtool.evaluation.whole_model import WholeModel
from qtool.formats.reading import DenseSource
from qtool.model.family import family_of
from qtool.model.skeleton import Skeleton, WeightSource, skeleton_of
from qtool.model.streaming import Stream, advance, embedding_path
from qtool.model.trace import head_logits

UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class _Bucket:
    """Sequences of about one length."""

    members: list[int]  # indices of sequences, in the order of the stream's windows
    stream: Stream


class _Kept:
    """A source that holds on to one tensor, which every bucket's stream asks for."""

    def __init__(self, source: WeightSource, name: str) -> None:
        self._source, self._name = source, name
        self._tensor: Tensor | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def file(self, name: str) -> Path:
        """Return the file that the tensor lies in."""
        return self._source.file(name)

    def read(self, name: str) -> Tensor:
        """Return the dense tensor called `name`."""
        if name != self._name:
            return self._source.read(name)
        if self._tensor is None:
            self._tensor = self._source.read(name)
        return self._tensor


class StreamedTasks:
    """A float or packed directory that answers tasks.

    Args:
        checkpoint: float, or of any format qtool writes.
        device: where to compute.
        dtype: in which to compute.
        spill: directory for hidden states that do not fit in memory.
        vocabulary: only the first so many tokens count; None for all that the model predicts.
        begin: told about phases.

    Raises:
        UnsupportedError: the family is not one that qtool reads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        spill: Path,
        vocabulary: int | None = None,
        begin: Begin = no_steps,
    ) -> None:
        self._checkpoint, self._spill, self._begin = checkpoint, spill, begin
        self._device, self._dtype, self._vocabulary = device, dtype, vocabulary
        self._family = family_of(checkpoint.config)
        self._whole: WholeModel | None = None

    @property
    def longest(self) -> int:
        """Most tokens that the model was made to read."""
        found = self._checkpoint.config.get("max_position_embeddings")
        return found if isinstance(found, int) and found > 0 else UNBOUNDED

    def close(self) -> None:
        """Free the model if it was loaded to generate."""
        self._whole = None

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests in one run through the blocks.

        Raises:
            UnsupportedError: tokens that the model does not have.
            NumericalError: weights or logits that are not finite.
            DamagedError: weights that are missing or of another shape.
        """
        if not requests:
            return []
        check_tokens(self._checkpoint, (request.read for request in requests))
        texts = covers(requests)
        skeleton = skeleton_of(self._checkpoint, dtype=self._dtype, device=self._device)
        answers: dict[int, Answer] = {}
        with torch.no_grad(), TensorReader(self._checkpoint.refs) as reader:
            source = DenseSource(self._checkpoint, reader)
            buckets = self._buckets(skeleton, source, [text for text, _ in texts])
            steps = len(skeleton.blocks) + len(buckets)
            tick = self._begin(f"tasks on {self._checkpoint.name}", steps, "step")
            self._run_blocks(skeleton, source, buckets, tick)
            load_head(skeleton, source)
            asked = [indices for _, indices in texts]
            for bucket in buckets:
                answers.update(self._answers(skeleton, _rows(bucket, requests, asked)))
                tick()
        skeleton.drop(self._family.head)
        return [answers[index] for index in range(len(requests))]

    def _buckets(
        self, skeleton: Skeleton, source: WeightSource, sequences: Sequence[Tokens]
    ) -> list[_Bucket]:
        """Sort sequences by length, and run each bucket as far as the first block."""
        by_length: dict[int, list[int]] = {}
        for index, sequence in enumerate(sequences):
            by_length.setdefault(bucket_of(len(sequence)), []).append(index)
        kept = _Kept(source, f"{embedding_path(skeleton)}.weight")
        found = []
        for length, members in sorted(by_length.items()):
            ids = torch.zeros(len(members), length, dtype=torch.int64)
            for row, index in enumerate(members):
                ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
            found.append(_Bucket(members, Stream(skeleton, kept, ids, self._spill)))
        return found

    def _run_blocks(
        self,
        skeleton: Skeleton,
        source: WeightSource,
        buckets: Sequence[_Bucket],
        tick: Callable[[], None],
    ) -> None:
        for index, block in enumerate(skeleton.blocks):
            path = skeleton.block_prefix(index).removesuffix(".")
            skeleton.load(path, source)
            for bucket in buckets:
                advance(bucket.stream, bucket.stream.hidden, block, index)
            skeleton.drop(path)
            devices.return_free_memory()
            tick()

    def _answers(
        self, skeleton: Skeleton, rows: Iterator[tuple[int, Tensor, Tokens]]
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the answers to requests from their rows [tokens, hidden size] of hidden states."""
        waiting: list[tuple[int, Tensor, Tokens]] = []
        for item in rows:
            waiting.append(item)
            # The head's weights are read once for all of them.
            if sum(len(targets) for _, _, targets in waiting) >= PIECE_ROWS:
                yield from self._scored(skeleton, waiting)
                waiting = []
        if waiting:
            yield from self._scored(skeleton, waiting)

    def _scored(
        self, skeleton: Skeleton, asked: Sequence[tuple[int, Tensor, Tokens]]
    ) -> Iterator[tuple[int, Answer]]:
        hidden = torch.cat([rows for _, rows, _ in asked])
        targets = torch.tensor([t for _, _, ts in asked for t in ts], device=hidden.device)
        found = []
        for part, wanted in zip(hidden.split(PIECE_ROWS), targets.split(PIECE_ROWS), strict=True):
            logits = head_logits(skeleton, part[None])[0].to(torch.float32)
            found.append(score_rows(logits[:, : self._vocabulary], wanted))
        losses = torch.cat([scores.losses for scores in found]).cpu()
        top = torch.cat([scores.top for scores in found]).cpu()
        if not bool(torch.isfinite(losses).all()):
            raise not_finite(self._checkpoint.name)
        start = 0
        for index, _, wanted in asked:
            stop = start + len(wanted)
            yield index, Answer(-float(losses[start:stop].sum()), tuple(top[start:stop].tolist()))
            start = stop

    def generate(
        self, prompts: Sequence[Tokens], most: Sequence[int], ended: Callable[[int, Tokens], bool]
    ) -> list[Tokens]:
        """Go on greedily from prompts, with the whole model in memory.

        Raises:
            CapacityError: it does not fit.
            UnsupportedError, DamagedError, NumericalError: as `score`.
        """
        check_tokens(self._checkpoint, prompts)
        if self._whole is None:
            self._whole = WholeModel(
                self._checkpoint, self._device, self._dtype, self._vocabulary, self._begin
            )
        return self._whole.generate(prompts, most, ended)


def _rows(
    bucket: _Bucket, requests: Sequence[Request], asked: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor, Tokens]]:
    """Yield (request, its rows of hidden states, its targets) of everything in a bucket."""
    members = iter(bucket.members)
    for batch in bucket.stream.hidden:
        for window in batch:
            for index in asked[next(members)]:
                request = requests[index]
                stop = request.first + len(request.continuation)
                yield index, window[request.first : stop], request.continuation


def check_tokens(checkpoint: Checkpoint, sequences: Iterator[Tokens] | Sequence[Tokens]) -> None:
    """Check that a directory's model has all tokens of some texts.

    Raises:
        UnsupportedError: it does not.
    """
    vocabulary = int(checkpoint.config.get("vocab_size", 0))
    highest = max((max(sequence) for sequence in sequences), default=0)
    if vocabulary and highest >= vocabulary:
        raise UnsupportedError(
            f"{checkpoint.name} has {vocabulary} tokens, but the tasks were tokenized with more",
            "compare a model with the one it was made from",
        )
