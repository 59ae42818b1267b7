"""`qtool eval`: perplexity, and divergence from a reference, of directories and GGUF files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import device as devices
from qtool.calibration.tokens import Windows
from qtool.checkpoint.locate import Checkpoint
from qtool.errors import UnsupportedError, UsageError
from qtool.evaluation.divergence import Comparison, compare, perplexity_of
from qtool.evaluation.perplexity import Estimate, perplexity
from qtool.evaluation.runners import Runner, StreamedModel
from qtool.pipeline.progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Evaluated:
    """One model's figures.

    Args:
        checkpoint: the model.
        perplexity: over every token but the first of each window.
        comparison: against the reference; None where there is none.
        seconds: wall time.
        llama_cpp: perplexity by llama.cpp's rule, see `SecondHalf`; None for a directory.
    """

    checkpoint: Checkpoint
    perplexity: Estimate
    comparison: Comparison | None
    seconds: float
    llama_cpp: Estimate | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights on disk."""
        return self.checkpoint.total_bytes


class SecondHalf:
    """Perplexity as llama-perplexity counts it, from logits that pass by.

    Only tokens of a window's second half are scored: all of those have at least half a window
    before them. The figure is lower than over whole windows, and comparable to llama.cpp's.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def watch(self, logits: Iterable[Tensor], windows: Tensor) -> Iterator[Tensor]:
        """Yield the logits of each window on, and note the losses of its second half."""
        for ids, window in zip(windows, logits, strict=True):
            first = len(ids) // 2
            half = window[first:-1]
            targets = ids[first + 1 :, None].to(half.device)
            if len(half):
                self._losses.append(half.logsumexp(-1) - half.gather(1, targets)[:, 0])
            yield window

    def perplexity(self) -> Estimate | None:
        """Return it, or None where windows are too short to have a second half."""
        return perplexity(self._losses) if self._losses else None


@dataclass(frozen=True)
class _Task:
    """What all models are run with."""

    windows: Windows
    device: torch.device
    dtype: torch.dtype
    spill: Path
    progress: Progress

    def run(self, checkpoint: Checkpoint, *, reference: bool = False) -> Runner:
        """Run a model as far as its logits; those of a GGUF file are computed when asked for."""
        ids, progress = self.windows.ids, self.progress

        def tick() -> None:
            progress.advance("")

        if checkpoint.gguf:
            from qtool.evaluation.gguf_model import GgufModel

            if reference:  # its windows come between those of the models
                return GgufModel(checkpoint, ids, self.device)
            progress.start(f"running {checkpoint.name}", len(ids))
            return GgufModel(checkpoint, ids, self.device, tick)
        blocks = int(checkpoint.config["num_hidden_layers"])
        progress.start(f"running {checkpoint.name}", blocks)
        model = StreamedModel(checkpoint, ids, self.device, self.dtype, self.spill, tick)
        progress.finish()
        return model


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
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", f"choose from: {', '.join(DTYPES)}")
    for checkpoint in [*models, *([reference] if reference else [])]:
        _check_vocabulary(checkpoint, windows)
    results = []
    with tempfile.TemporaryDirectory() as spill:
        task = _Task(windows, device, DTYPES[dtype], Path(spill), progress)
        original = None if reference is None else task.run(reference, reference=True)
        with nullcontext() if original is None else closing(original):
            for checkpoint in models:
                started = time.perf_counter()
                with closing(task.run(checkpoint)) as model:
                    found = _measured(checkpoint, model, original, windows.ids)
                if checkpoint.gguf:
                    progress.finish()
                devices.synchronize(device)
                results.append(replace(found, seconds=time.perf_counter() - started))
    return results


def _measured(
    checkpoint: Checkpoint, model: Runner, original: Runner | None, ids: Tensor
) -> Evaluated:
    """Measure one model; its `seconds` are still to be filled in."""
    rule = SecondHalf()
    logits = rule.watch(model.logits(), ids) if checkpoint.gguf else model.logits()
    comparison = None
    if original is None:
        found = perplexity_of(logits, ids)
    else:
        expected = original.logits()
        if checkpoint.gguf or not isinstance(original, StreamedModel):
            logits, expected = _common(checkpoint, (model, logits), (original, expected), ids)
        comparison = compare(logits, expected, ids)
        found = comparison.perplexity
    return Evaluated(checkpoint, found, comparison, 0.0, rule.perplexity())


def _common(
    checkpoint: Checkpoint,
    model: tuple[Runner, Iterable[Tensor]],
    original: tuple[Runner, Iterable[Tensor]],
    ids: Tensor,
) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """Cut logits to the tokens that both models have.

    A GGUF file's vocabulary may be filled up to a round number, or cut to what the tokenizer
    knows; the rows between stand for no token.
    """
    rows = min(model[0].vocabulary, original[0].vocabulary)
    if int(ids.max()) >= rows:
        raise UnsupportedError(
            f"{checkpoint.name} has {model[0].vocabulary} tokens and the reference "
            f"{original[0].vocabulary}, but the text was tokenized with more",
            "compare a model with the one it was made from",
        )
    cut_model = (window[:, :rows] for window in model[1])
    cut_original = (window[:, :rows] for window in original[1])
    return cut_model, cut_original


def _check_vocabulary(checkpoint: Checkpoint, windows: Windows) -> None:
    vocabulary = int(checkpoint.config.get("vocab_size", 0))
    if vocabulary and int(windows.ids.max()) >= vocabulary:
        raise UnsupportedError(
            f"{checkpoint.name} has {vocabulary} tokens, but the text was tokenized with more",
            "compare a model with the one it was made from",
        )


def metrics_of(result: Evaluated) -> dict[str, Any]:
    """Return a result's figures in the terms of the JSON contract."""
    metrics: dict[str, Any] = {
        "ppl": {
            "value": result.perplexity.value,
            "se": result.perplexity.standard_error,
            "tokens": result.perplexity.tokens,
        }
    }
    if result.llama_cpp is not None:
        metrics["ppl_llama_cpp"] = {
            "value": result.llama_cpp.value,
            "se": result.llama_cpp.standard_error,
            "tokens": result.llama_cpp.tokens,
        }
    comparison = result.comparison
    if comparison is not None:
        reference = comparison.reference_perplexity
        metrics["ppl"]["reference"] = reference.value
        metrics["ppl"]["ratio"] = result.perplexity.value / reference.value
        metrics["kld"] = {
            "mean": comparison.divergence.value,
            "se": comparison.divergence.standard_error,
            "median": comparison.divergence_median,
            "p99": comparison.divergence_p99,
            "tokens": comparison.divergence.tokens,
        }
        metrics["top1"] = {
            "value": comparison.top1.value,
            "se": comparison.top1.standard_error,
            "tokens": comparison.top1.tokens,
        }
    return metrics
