"""GGUF files for evaluation: their logits window by window, and their tokenizer, by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor

from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import printable
from qtool.errors import NumericalError
from qtool.evaluation.gguf_contents import check_continues_text
from qtool.evaluation.llama_cpp import LlamaModel
from qtool.evaluation.llama_trial import check_runs
from qtool.evaluation.rows import PIECE_ROWS


class GgufModel:
    """A GGUF file run by llama.cpp on token windows; closes itself at the end of a `with`.

    Args:
        checkpoint: located with `gguf=True`.
        windows: token ids [windows, length].
        device: where the logits shall be; llama.cpp computes on the CPU.
        tick: called after each window.

    Raises:
        UnsupportedError: llama.cpp is absent, or this is no language model.
        DamagedError: llama.cpp refuses it.
        CapacityError: no memory for a window.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Tensor,
        device: torch.device,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        first = checkpoint.gguf[0]
        check_continues_text(first)
        length = int(windows.shape[1])
        check_runs(first.path, length)
        self._name, self._windows, self._device, self._tick = (
            checkpoint.name,
            windows,
            device,
            tick,
        )
        threads = torch.get_num_threads()
        self._model = LlamaModel(first.path, context=length, threads=threads, check=False)

    @property
    def vocabulary(self) -> int:
        """How many tokens it predicts."""
        return self._model.n_tokens

    def logits(self) -> Iterator[Tensor]:
        """Yield the logits [length, vocabulary] float32 of one window after the other.

        Raises:
            NumericalError: they are not finite.
            UnsupportedError: the text has tokens that the model does not.
        """
        for window in self._windows:
            logits = torch.from_numpy(self._model.logits(window.tolist())).to(self._device)
            if not bool(torch.isfinite(logits).all()):
                raise NumericalError(
                    f"{printable(self._name)} gives logits that are not finite",
                    "the model overflows; make the file again from the original",
                )
            self._tick()
            yield logits

    def pieces(self) -> Iterator[Tensor]:
        """Yield logits [PIECE_ROWS or fewer, vocabulary] float32; no piece spans two windows.

        Nothing looks for values that are not finite: whoever sums them up will notice.

        Raises:
            UnsupportedError: the text has tokens that the model does not.
        """
        for window in self._windows:
            for part in self._model.parts(window.tolist()):
                yield from torch.from_numpy(part).to(self._device).split(PIECE_ROWS)
            self._tick()

    def close(self) -> None:
        """Free the model."""
        self._model.close()


class GgufTokenizer:
    """The tokenizer of a GGUF file with the face of a transformers one, as far as `tokens` needs.

    Args:
        checkpoint: located with `gguf=True`.

    Raises:
        UnsupportedError, DamagedError: as `GgufModel`.
    """

    chat_template = None  # text only: rows are evaluated as they stand

    def __init__(self, checkpoint: Checkpoint) -> None:
        first = checkpoint.gguf[0]
        check_continues_text(first)
        check_runs(first.path, 0)
        self._model = LlamaModel(first.path, context=0)

    @property
    def bos_token_id(self) -> int | None:
        """The token at the beginning of every text, None if the model wants none."""
        return self._model.bos

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._model.eos

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = True, **_: object
    ) -> dict[str, list[int] | list[list[int]]]:
        """Return `input_ids` of a text or of each of several."""
        if isinstance(text, list):
            return {"input_ids": [self._encode(one, special=add_special_tokens) for one in text]}
        return {"input_ids": self._encode(text, special=add_special_tokens)}

    def _encode(self, text: str, *, special: bool) -> list[int]:
        start = [self._model.bos] if special and self._model.bos is not None else []
        return start + self._model.tokenize(text)

    def decode(self, ids: Sequence[int], **_: object) -> str:
        """Return the text of token ids, without special ones."""
        return self._model.text_of(ids)

    def __enter__(self) -> GgufTokenizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._model.close()
