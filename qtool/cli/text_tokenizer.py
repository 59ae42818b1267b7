"""The tokenizer that evaluation uses for all models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtool.checkpoint.locate import Checkpoint


@contextmanager
def text_tokenizer(original: Checkpoint | None, models: Sequence[Checkpoint]) -> Iterator[Any]:
    """Open the original's tokenizer, or else that of a directory, or else the first model's.

    Raises:
        DamagedError, UnsupportedError: it cannot be loaded.
    """
    chosen = original or next((model for model in models if not model.gguf), models[0])
    if chosen.gguf:
        from qtool.evaluation.gguf_model import GgufTokenizer

        with GgufTokenizer(chosen) as tokenizer:
            yield tokenizer
    else:
        from qtool.cli.calibration_data import load_tokenizer

        yield load_tokenizer(chosen)
