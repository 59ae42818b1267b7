"""The original's logits for `qtool eval`: as they are computed, or shortened from a cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import __version__
from qtool.checkpoint.locate import Checkpoint
from qtool.errors import UnsupportedError
from qtool.evaluation.cache_directory import identity
from qtool.evaluation.logits_cache import LogitsCache
from qtool.evaluation.rows import ReferenceRows, WholeRows
from qtool.evaluation.runners import Runner, StreamedModel
from qtool.evaluation.scores import not_finite
from qtool.pipeline.progress import Progress

# Tokens after which what a reference gave is safe in the cache: enough for the time of reading the
# weights once more to be small beside that of computing.
TOKENS_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 18}
STEPS_TOLD = 10  # lines that a phase prints where there is no terminal to draw on


@dataclass(frozen=True)
class Setting:
    """What all models are run with.

    Args:
        ids: token ids [windows, length], those of domains included.
        device: where to compute.
        dtype: in which directories are computed.
        progress: told what happens.
    """

    ids: Tensor
    device: torch.device
    dtype: torch.dtype
    progress: Progress

    def run(self, checkpoint: Checkpoint, spill: Path) -> Runner:
        """Run a model as far as its logits; those of a GGUF file are computed when asked for."""
        if checkpoint.gguf:
            from qtool.evaluation.gguf_model import GgufModel

            return GgufModel(checkpoint, self.ids, self.device)
        blocks = int(checkpoint.config["num_hidden_layers"])
        tick = steps(self.progress, f"running {checkpoint.name}", blocks, "block")
        model = StreamedModel(checkpoint, self.ids, self.device, self.dtype, spill, tick)
        self.progress.finish()
        return model


def steps(progress: Progress, title: str, total: int, unit: str) -> Callable[[], None]:
    """Begin a phase and return what is to be called after each of its steps."""
    progress.start(title, total, unit=unit)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        told = done * STEPS_TOLD // total > (done - 1) * STEPS_TOLD // total
        progress.advance(f"{unit} {done} of {total}" if told and total > STEPS_TOLD else "")

    return tick


def vocabulary_of(checkpoint: Checkpoint) -> int:
    """Return how many tokens a model predicts, 0 where its headers do not say."""
    if not checkpoint.gguf:
        return int(checkpoint.config.get("vocab_size", 0))
    names = ("output.weight", "token_embd.weight")
    return next((checkpoint.refs[n].shape[0] for n in names if n in checkpoint.refs), 0)


def common_vocabulary(model: Checkpoint, reference: Checkpoint, ids: Tensor) -> int:
    """Return how many tokens both models have.

    A GGUF file's vocabulary may be filled up to a round number, or cut to what the tokenizer
    knows; the rows between stand for no token. Two directories must agree.

    Raises:
        UnsupportedError: they do not, or the text has tokens that one of them lacks.
    """
    ours, theirs = vocabulary_of(model), vocabulary_of(reference)
    hint = "compare a model with the one it was made from"
    if ours != theirs and not model.gguf and not reference.gguf:
        raise UnsupportedError(
            f"{model.name} predicts {ours} tokens, the reference {theirs}: their vocabularies "
            "differ",
            hint,
        )
    if int(ids.max()) >= min(ours, theirs):
        raise UnsupportedError(
            f"{model.name} has {ours} tokens and the reference {theirs}, but the text was "
            "tokenized with more",
            hint,
        )
    return min(ours, theirs)


class Reference:
    """The original, run once for all models; its logits are made again from its last layer.

    Args:
        checkpoint: the original.
        setting: what all models are run with.
        spill: directory for hidden states that do not fit in memory.
    """

    def __init__(self, checkpoint: Checkpoint, setting: Setting, spill: Path) -> None:
        self._runner = setting.run(checkpoint, spill)

    def rows(self, vocabulary: int) -> Iterator[ReferenceRows]:
        """Yield its logits for the first `vocabulary` tokens, piece by piece."""
        for piece in self._runner.pieces():
            yield WholeRows(piece[:, :vocabulary])

    def close(self) -> None:
        """Free what it holds."""
        self._runner.close()


class CachedReference:
    """The original from a cache; it is run for those windows only that the cache lacks.

    Args:
        checkpoint: the original.
        setting: what all models are run with.
        directory: of the cache.
        dtype: name of the setting's dtype.

    Raises:
        UsageError, CapacityError: the directory cannot be written.
    """

    def __init__(
        self, checkpoint: Checkpoint, setting: Setting, directory: Path, dtype: str
    ) -> None:
        self._checkpoint, self._setting, self._directory = checkpoint, setting, directory
        self._key = model_key(checkpoint, directory, setting.device, dtype)

    def rows(self, vocabulary: int) -> Iterator[ReferenceRows]:
        """Yield what is kept of its logits for the first `vocabulary` tokens, piece by piece."""
        setting = self._setting
        cache = LogitsCache(self._directory, self._key, setting.ids, vocabulary)
        missing, damaged = cache.missing()
        if damaged:
            what = "1 window" if damaged == 1 else f"{damaged} windows"
            setting.progress.warn(
                "damaged_cache", f"damaged in the logits cache, computed again: {what}"
            )
        length = setting.ids.shape[1]
        step = max(1, TOKENS_AT_ONCE[setting.device.type] // length)
        for start in range(0, len(missing), step):
            self._fill(cache, missing[start : start + step], vocabulary)
        return cache.pieces()

    def _fill(self, cache: LogitsCache, windows: list[int], vocabulary: int) -> None:
        """Run the original on some windows and keep each as soon as it is there."""
        setting = self._setting
        part = Setting(setting.ids[windows], setting.device, setting.dtype, setting.progress)
        with tempfile.TemporaryDirectory() as spill:
            model = part.run(self._checkpoint, Path(spill))
            with closing(model):
                title = f"caching {self._checkpoint.name}"
                tick = steps(setting.progress, title, len(windows), "window")
                pieces = (self._checked(piece)[:, :vocabulary] for piece in model.pieces())
                for index in windows:
                    if not cache.save(index, pieces):
                        raise not_finite(self._checkpoint.name, original=True)
                    tick()
                setting.progress.finish()

    def _checked(self, piece: Tensor) -> Tensor:
        """Keep what a changed file gave out of the cache, where it would count as the old one's."""
        self._checkpoint.check_unchanged()
        return piece

    def close(self) -> None:
        """Do nothing: nothing is held."""


def model_key(
    checkpoint: Checkpoint, directory: Path, device: torch.device, dtype: str
) -> dict[str, Any]:
    """Return everything that decides what a model says to a text.

    Args:
        checkpoint: the model.
        directory: of the cache, which remembers hashes of weights.
        device: where a directory is computed.
        dtype: name of the dtype in which it is.

    Raises:
        UsageError, CapacityError: the directory cannot be written.
        DamagedError: a weight file cannot be read.
    """
    return {
        "reference": identity(checkpoint, directory),
        "engine": _engine(checkpoint),
        "dtype": None if checkpoint.gguf else dtype,
        "device": device.type,
        "qtool": __version__,
    }


def _engine(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the versions of the libraries that compute the logits."""
    if checkpoint.gguf:
        from qtool.evaluation.llama_cpp import PACKAGE, VERSION, check_installed

        check_installed()
        return {PACKAGE: VERSION}
    return {name: version(name) for name in ("torch", "transformers")}
