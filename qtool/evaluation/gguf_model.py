"""GGUF files for evaluation: their logits window by window, and their tokenizer, by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor

from qtool.checkpoint.gguf_header import GgufContents
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import NumericalError, UnsupportedError
from qtool.evaluation.llama_cpp import LlamaModel
from qtool.evaluation.llama_trial import check_runs
from qtool.evaluation.rows import PIECE_ROWS

OTHER_CONTENTS = {  # general.type -> what the file is
    "imatrix": "an importance matrix",
    "adapter": "an adapter",
    "mmproj": "the vision or audio part of a model",
    "vocab": "a vocabulary without weights",
}


def check_continues_text(contents: GgufContents) -> None:
    """Check by a file's metadata that it is a language model that predicts the next token.

    Args:
        contents: of the file, or of the first of its parts.

    Raises:
        UnsupportedError: it is something else.
    """
    known = {key: value.content for key, value in contents.metadata.items()}
    architecture = known.get("general.architecture")
    pooled = f"{architecture}.pooling_type" in known
    other = OTHER_CONTENTS.get(str(known.get("general.type", "")))
    if other is None and architecture == "clip":
        other = OTHER_CONTENTS["mmproj"]
    if other is None and (pooled or known.get(f"{architecture}.attention.causal") is False):
        other = "a model that embeds text"
    if other is None and not contents.tensors:
        other = OTHER_CONTENTS["vocab"]
    if other is None and architecture is None:
        other = "no model: it names no architecture"
    if other is not None:
        raise UnsupportedError(
            f"{shown_path(contents.path)} is {other}",
            "give the GGUF file of a language model",
        )


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
