"""`qtool eval`: perplexity, and divergence from a reference, of any directory that qtool reads."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool import device as devices
from qtool.calibration.tokens import Windows
from qtool.checkpoint.locate import Checkpoint
from qtool.errors import UnsupportedError, UsageError
from qtool.evaluation.divergence import Comparison, compare, perplexity_of
from qtool.evaluation.perplexity import Estimate
from qtool.evaluation.runners import StreamedModel
from qtool.pipeline.progress import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Evaluated:
    """One model's figures; `comparison` is None where no reference was given."""

    checkpoint: Checkpoint
    perplexity: Estimate
    comparison: Comparison | None
    seconds: float

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights on disk."""
        return self.checkpoint.total_bytes


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

    Raises:
        UsageError: an unknown dtype.
        UnsupportedError: a model that qtool cannot run, or another vocabulary.
        NumericalError: logits that are not finite.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", f"choose from: {', '.join(DTYPES)}")
    for checkpoint in [*models, *([reference] if reference else [])]:
        _check_vocabulary(checkpoint, windows)
    results = []
    with tempfile.TemporaryDirectory() as spill:

        def run(checkpoint: Checkpoint) -> StreamedModel:
            progress.start(f"running {checkpoint.name}", _block_count(checkpoint))
            model = StreamedModel(
                checkpoint,
                windows.ids,
                device,
                DTYPES[dtype],
                Path(spill),
                lambda: progress.advance(""),
            )
            progress.finish()
            return model

        original = None if reference is None else run(reference)
        for checkpoint in models:
            started = time.perf_counter()
            model = run(checkpoint)
            comparison = None
            if original is None:
                found = perplexity_of(model.logits(), windows.ids)
            else:
                comparison = compare(model.logits(), original.logits(), windows.ids)
                found = comparison.perplexity
            devices.synchronize(device)
            seconds = time.perf_counter() - started
            results.append(Evaluated(checkpoint, found, comparison, seconds))
    return results


def _block_count(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config["num_hidden_layers"])


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
