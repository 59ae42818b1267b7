"""`qtool eval`: perplexity, and divergence from a reference, of directories and GGUF files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qtool import device as devices
from qtool.calibration.tokens import Windows
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import printable
from qtool.errors import UnsupportedError, UsageError
from qtool.evaluation.buckets import PositionBucket, by_position
from qtool.evaluation.divergence import Comparison, compared, second_half_perplexity
from qtool.evaluation.domains import DomainScores, DomainWindows, by_domain
from qtool.evaluation.metrics_json import metrics_json
from qtool.evaluation.perplexity import Estimate, perplexity
from qtool.evaluation.rows import ReferenceRows
from qtool.evaluation.runners import Runner
from qtool.evaluation.scores import Scores, score_windows
from qtool.pipeline.evaluate_reference import (
    CachedReference,
    Reference,
    Setting,
    common_vocabulary,
    steps,
)
from qtool.pipeline.progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOISE_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Evaluated:
    """One model's figures.

    Args:
        checkpoint: the model.
        perplexity: over every token but the first of each window; None where no text was run.
        comparison: against the reference; None where there is none.
        seconds: wall time.
        llama_cpp: perplexity by llama.cpp's rule; None for windows too short for it.
        positions: by position in the window, if that was asked for.
        domains: by domain, if that was asked for.
    """

    checkpoint: Checkpoint
    perplexity: Estimate | None
    comparison: Comparison | None
    seconds: float
    llama_cpp: Estimate | None = None
    positions: tuple[PositionBucket, ...] = ()
    domains: dict[str, DomainScores] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of the weight files."""
        return self.checkpoint.file_bytes


@dataclass(frozen=True)
class Extent:
    """What is measured beside the figures over all tokens.

    Args:
        position_ends: of the buckets by position; the last is the length of a window.
        domains: one window for each domain.
        cache: directory for the reference's logits; None keeps nothing.
        noise_floor: whether to compare the reference with itself in another dtype.
    """

    position_ends: tuple[int, ...] = ()
    domains: DomainWindows | None = None
    cache: Path | None = None
    noise_floor: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Every model's figures, and what the reference itself differs by in NOISE_DTYPE."""

    results: tuple[Evaluated, ...]
    noise_floor: Comparison | None = None


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that `--dtype` names.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in DTYPES:
        raise UsageError(f"unknown dtype '{printable(name)}'", f"choose from: {', '.join(DTYPES)}")
    return DTYPES[name]


def without_text(models: Sequence[Checkpoint]) -> Evaluation:
    """Return what is known of models that no text was run on: their size."""
    return Evaluation(tuple(Evaluated(checkpoint, None, None, 0.0) for checkpoint in models))


def evaluate(
    models: Sequence[Checkpoint],
    reference: Checkpoint | None,
    windows: Windows,
    device: torch.device,
    progress: Progress,
    *,
    dtype: str = "float32",
) -> list[Evaluated]:
    """Measure models on the same windows, against a reference if there is one.

    Directories are run in `dtype` on `device`; GGUF files as llama.cpp runs them, on the CPU.

    Raises:
        UsageError: an unknown dtype.
        UnsupportedError: a model that qtool cannot run, or another vocabulary.
        DamagedError: a GGUF file that llama.cpp refuses.
        NumericalError: logits that are not finite.
    """
    extent = Extent()
    return list(
        evaluate_fully(models, reference, windows, device, progress, extent, dtype=dtype).results
    )


def evaluate_fully(
    models: Sequence[Checkpoint],
    reference: Checkpoint | None,
    windows: Windows,
    device: torch.device,
    progress: Progress,
    extent: Extent,
    *,
    dtype: str = "float32",
) -> Evaluation:
    """Measure models as `evaluate` does, and what `extent` asks for.

    Raises:
        UsageError: an unknown dtype, a noise floor without an original directory, or a cache that
            cannot be written.
        UnsupportedError, DamagedError, NumericalError: as `evaluate`; or a model was changed.
        CapacityError: no room for the cache.
    """
    _check_noise_floor(reference, extent, dtype)
    parts = [windows.ids, *([extent.domains.ids] if extent.domains is not None else [])]
    setting = Setting(torch.cat(parts), device, dtype_of(dtype), progress)
    for checkpoint in [*models, *([reference] if reference else [])]:
        _check_vocabulary(checkpoint, windows)
        if reference is not None:
            common_vocabulary(checkpoint, reference, setting.ids)
    with ExitStack() as stack:
        spill = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        original: Reference | CachedReference | None = None
        if reference is not None and extent.cache is not None:
            original = CachedReference(reference, setting, extent.cache, dtype)
        elif reference is not None:
            original = stack.enter_context(closing(Reference(reference, setting, spill)))
        task = _Task(setting, spill, reference, original, windows, extent)
        results = tuple(task.measured(checkpoint) for checkpoint in models)
        found = Evaluation(results, task.noise_floor() if extent.noise_floor else None)
    for checkpoint in [*models, *([reference] if reference else [])]:
        checkpoint.check_unchanged()
    return found


@dataclass(frozen=True)
class _Task:
    """One run of `qtool eval`: what stays the same from model to model."""

    setting: Setting
    spill: Path
    reference: Checkpoint | None
    original: Reference | CachedReference | None
    windows: Windows
    extent: Extent

    def measured(self, checkpoint: Checkpoint) -> Evaluated:
        """Measure one model."""
        started = time.perf_counter()
        # Before the model, so that a cache is filled while the original alone is in memory.
        expected, vocabulary = self._expected(checkpoint)
        with closing(self.setting.run(checkpoint, self.spill)) as model:
            scores = self._scores(checkpoint, model, expected, vocabulary)
        devices.synchronize(self.setting.device)
        found = self._summed(checkpoint, scores)
        return replace(found, seconds=time.perf_counter() - started)

    def noise_floor(self) -> Comparison | None:
        """Compare the original with itself in NOISE_DTYPE."""
        if self.reference is None:
            return None
        setting, name = self.setting, f"{self.reference.name} in {NOISE_DTYPE}"
        expected, vocabulary = self._expected(self.reference)
        other = replace(self.reference, name=name)
        noisy = Setting(setting.ids, setting.device, DTYPES[NOISE_DTYPE], setting.progress)
        with closing(noisy.run(other, self.spill)) as model:
            scores = self._scores(other, model, expected, vocabulary)
        return compared(scores[: len(self.windows.ids)])

    def _expected(self, checkpoint: Checkpoint) -> tuple[Any, int | None]:
        """Return what is known of the original for a model, and how many tokens both have."""
        if self.original is None or self.reference is None:
            return None, None
        vocabulary = common_vocabulary(checkpoint, self.reference, self.setting.ids)
        return self.original.rows(vocabulary), vocabulary

    def _scores(
        self,
        checkpoint: Checkpoint,
        model: Runner,
        expected: Sequence[ReferenceRows] | None,
        vocabulary: int | None,
    ) -> list[Scores]:
        setting = self.setting
        title = f"measuring {checkpoint.name}"
        tick = steps(setting.progress, title, len(setting.ids), "window")
        # Rows that a GGUF file is filled up with count only where there is nothing to cut to.
        pieces = (piece[:, :vocabulary] for piece in model.pieces())
        reference = self.reference.name if self.reference is not None else ""
        scores = score_windows(pieces, expected, setting.ids, (checkpoint.name, reference), tick)
        setting.progress.finish()
        return scores

    def _summed(self, checkpoint: Checkpoint, scores: list[Scores]) -> Evaluated:
        """Sum up what was scored; the time is still to be filled in."""
        count = len(self.windows.ids)
        main, apart = scores[:count], scores[count:]
        domains = self.extent.domains
        return Evaluated(
            checkpoint,
            perplexity([window.losses for window in main]),
            compared(main),
            0.0,
            second_half_perplexity(main),
            tuple(by_position(main, self.extent.position_ends)),
            {} if domains is None else by_domain(apart, domains),
        )


def _check_noise_floor(reference: Checkpoint | None, extent: Extent, dtype: str) -> None:
    if not extent.noise_floor:
        return
    if reference is None:
        raise UsageError(
            "--noise-floor compares the original with itself", "give it with --ref ORIGINAL"
        )
    if reference.gguf:
        raise UsageError(
            f"--noise-floor: {reference.name} is a GGUF file, which has the dtypes it has",
            "give the directory that it was made from as --ref",
        )
    if dtype == NOISE_DTYPE:
        raise UsageError(
            f"--noise-floor: the original already runs in {dtype}", "use --dtype float32"
        )


def _check_vocabulary(checkpoint: Checkpoint, windows: Windows) -> None:
    vocabulary = int(checkpoint.config.get("vocab_size", 0))
    if vocabulary and int(windows.ids.max()) >= vocabulary:
        raise UnsupportedError(
            f"{checkpoint.name} has {vocabulary} tokens, but the text was tokenized with more",
            "compare a model with the one it was made from",
        )


def metrics_of(result: Evaluated, names: Collection[str]) -> dict[str, Any]:
    """Return a result's figures in the terms of the JSON contract; `names` are of METRICS."""
    return metrics_json(result.perplexity, result.llama_cpp, result.comparison, names)


def brief(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `quantize` keeps of the figures: without the errors of quantiles and ratios."""
    return {
        name: {key: value for key, value in figures.items() if key in BRIEF.get(name, figures)}
        for name, figures in metrics.items()
    }


# What `quantize` keeps of each.
BRIEF = {
    "ppl": ("value", "se", "tokens", "reference", "ratio"),
    "ppl_llama_cpp": ("value", "se", "tokens"),
    "kld": ("mean", "se", "median", "p99", "tokens"),
}
