"""Tasks on GGUF files, by llama.cpp: continuations scored, and text generated greedily."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import POINTER, c_bool, c_float, c_int32, c_void_p
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import UnsupportedError
from qtool.evaluation.continuations import Answer, Begin, Request, Tokens, covers, no_steps
from qtool.evaluation.gguf_contents import check_continues_text
from qtool.evaluation.llama_cpp import TOKENS_AT_ONCE, Batch, LlamaModel, fill
from qtool.evaluation.llama_trial import check_runs
from qtool.evaluation.rows import log_totals
from qtool.evaluation.scores import not_finite

UNBOUNDED = 1 << 30
# Beside those that windows need.
FUNCTIONS = {
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
}


class ContinuedModel(LlamaModel):
    """A GGUF file that is asked for some rows only, and keeps what texts begin with alike.

    Args:
        path: of the file, or of the first of its parts.
        context: most tokens of a text.
        threads: to compute with.
    """

    def __init__(self, path: Path, *, context: int, threads: int = 1) -> None:
        super().__init__(path, context=context, threads=threads, check=False)
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._held: list[int] = []

    def rows(self, ids: Sequence[int], first: int) -> Iterator[NDArray[np.float32]]:
        """Yield logits [vocabulary] after each of the ids from number `first` on.

        Whatever the last text and this one begin with alike is not computed again.

        Raises:
            UnsupportedError: an id that the model does not have, or llama.cpp gives up.
        """
        if not all(0 <= token < self.n_tokens for token in ids):
            raise UnsupportedError(
                f"{shown_path(self._path)} has {self.n_tokens} tokens, but the tasks were "
                "tokenized with more",
                "compare a model with the one it was made from",
            )
        begin = self._rewind(ids, first)
        batch = self._library.llama_batch_init(TOKENS_AT_ONCE, 0, 1)
        try:
            for start in range(begin, len(ids), TOKENS_AT_ONCE):
                part = list(ids[start : start + TOKENS_AT_ONCE])
                self._decode(batch, part, start, first)
                for place in range(max(0, first - start), len(part)):
                    pointer = self._library.llama_get_logits_ith(self._context, place)
                    yield np.ctypeslib.as_array(pointer, (self.n_tokens,)).copy()
        finally:
            self._library.llama_batch_free(batch)

    def _rewind(self, ids: Sequence[int], first: int) -> int:
        """Forget what the last text does not share with this one; return where to go on."""
        shared = 0
        for ours, theirs in zip(ids[:first], self._held, strict=False):
            if ours != theirs:
                break
            shared += 1
        memory = self._library.llama_get_memory(self._context)
        # Some architectures can forget all or nothing.
        if not shared or not self._library.llama_memory_seq_rm(memory, 0, shared, -1):
            self._library.llama_memory_clear(memory, True)
            shared = 0
        del self._held[shared:]
        return shared

    def _decode(self, batch: Batch, part: Sequence[int], start: int, first: int) -> None:
        fill(batch, part, start)
        for index in range(len(part)):
            batch.logits[index] = start + index >= first
        code = self._library.llama_decode(self._context, batch)
        if code:
            self._held.clear()
            raise UnsupportedError(
                f"llama.cpp gives no logits for {shown_path(self._path)} (code {code})",
                "check that llama.cpp itself can run it on texts of this length",
            )
        self._held += part


class LlamaTasks:
    """A GGUF file that answers tasks; llama.cpp computes on the CPU.

    Args:
        checkpoint: located with `gguf=True`.
        vocabulary: only the first so many tokens count; None for all that the model predicts.
        begin: told about phases.

    Raises:
        UnsupportedError: this is no language model.
    """

    def __init__(
        self, checkpoint: Checkpoint, vocabulary: int | None = None, begin: Begin = no_steps
    ) -> None:
        first = checkpoint.gguf[0]
        check_continues_text(first)
        self._path, self._name = first.path, checkpoint.name
        self._vocabulary, self._begin = vocabulary, begin
        known = {key: value.content for key, value in first.metadata.items()}
        self._longest = known.get(f"{known.get('general.architecture')}.context_length")
        self._model: ContinuedModel | None = None
        self._context = 0

    @property
    def longest(self) -> int:
        """Most tokens that the model was made to read."""
        found = self._longest
        return found if isinstance(found, int) and found > 0 else UNBOUNDED

    def close(self) -> None:
        """Free the model."""
        if self._model is not None:
            self._model.close()
        self._model = None

    def _opened(self, tokens: int) -> ContinuedModel:
        """Return the model with room for a text of so many tokens.

        Raises:
            UnsupportedError, DamagedError, CapacityError: llama.cpp cannot run it so.
        """
        if self._model is None or self._context < tokens:
            self.close()
            check_runs(self._path, tokens)
            self._context = tokens
            threads = torch.get_num_threads()
            self._model = ContinuedModel(self._path, context=tokens, threads=threads)
        return self._model

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests, one text after the other.

        Raises:
            UnsupportedError: tokens that the model does not have.
            NumericalError: logits that are not finite.
        """
        if not requests:
            return []
        texts = covers(requests)
        model = self._opened(max(len(text) for text, _ in texts))
        tick = self._begin(f"tasks on {self._name}", len(texts), "text")
        answers: dict[int, Answer] = {}
        for text, indices in texts:
            answers.update(self._answers(model, text, {i: requests[i] for i in indices}))
            tick()
        return [answers[index] for index in range(len(requests))]

    def _answers(
        self, model: ContinuedModel, sequence: Tokens, asked: Mapping[int, Request]
    ) -> dict[int, Answer]:
        """Answer the requests that one text covers."""
        totals = dict.fromkeys(asked, 0.0)
        greedy: dict[int, list[int]] = {index: [] for index in asked}
        first = min(request.first for request in asked.values())
        for number, row in enumerate(model.rows(sequence, first), start=first):
            log_total, top = log_totals(torch.from_numpy(row)[None, : self._vocabulary])
            for index, request in asked.items():
                place = number - request.first
                if 0 <= place < len(request.continuation):
                    totals[index] += float(row[request.continuation[place]]) - float(log_total)
                    greedy[index].append(int(top))
        if not all(math.isfinite(total) for total in totals.values()):
            raise not_finite(self._name)
        return {index: Answer(totals[index], tuple(greedy[index])) for index in asked}

    def generate(
        self, prompts: Sequence[Tokens], most: Sequence[int], ended: Callable[[int, Tokens], bool]
    ) -> list[Tokens]:
        """Go on greedily from prompts, one after the other.

        Raises:
            UnsupportedError, NumericalError: as `score`.
        """
        if not prompts:
            return []
        model = self._opened(max(len(p) + m for p, m in zip(prompts, most, strict=True)))
        tick = self._begin(f"generating with {self._name}", len(prompts), "prompt")
        found = []
        for index, (prompt, count) in enumerate(zip(prompts, most, strict=True)):
            made: Tokens = ()
            while len(made) < count:
                text = prompt + made
                row = next(iter(model.rows(text, len(text) - 1)))[: self._vocabulary]
                if not np.isfinite(row).all():
                    raise not_finite(self._name)
                made += (int(row.argmax()),)
                if ended(index, made):
                    break
            found.append(made)
            tick()
        return found
