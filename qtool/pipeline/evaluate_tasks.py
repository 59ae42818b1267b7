"""Tasks for `qtool eval`: every model answers the same questions, and so does the original."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qtool.checkpoint.locate import Checkpoint
from qtool.evaluation.answers_cache import CachedTasks
from qtool.evaluation.continuations import Begin, TaskRunner
from qtool.evaluation.streamed_tasks import StreamedTasks
from qtool.evaluation.task_files import TaskFile
from qtool.evaluation.task_scoring import Samples, Shortened, score_files
from qtool.evaluation.task_statistics import Paired, TaskMetric, TaskScore, metric_of
from qtool.evaluation.task_tokens import TaskTokenizer
from qtool.pipeline.evaluate import dtype_of
from qtool.pipeline.evaluate_reference import TOKENS_AT_ONCE, model_key, steps, vocabulary_of
from qtool.pipeline.progress import Progress

if TYPE_CHECKING:
    from qtool.evaluation.harness import Harness, HarnessScores


@dataclass(frozen=True)
class TaskSuite:
    """What models are asked.

    Args:
        files: a person's own questions.
        harness: tasks of lm_eval with their data, None without.
        chat: whether prompts are laid out by the chat template.
    """

    files: tuple[TaskFile, ...] = ()
    harness: Harness | None = None
    chat: bool = False


@dataclass(frozen=True)
class ModelTasks:
    """What one model reached, task by task, and the seconds that it took."""

    scores: Mapping[str, TaskScore]
    seconds: float


@dataclass(frozen=True)
class _Raw:
    """What one model did, sample by sample."""

    files: Sequence[Samples]
    harness: Mapping[str, HarnessScores]
    seconds: float


def evaluate_tasks(
    models: Sequence[Checkpoint],
    reference: Checkpoint | None,
    suite: TaskSuite,
    tokenizer: Any,
    device: torch.device,
    progress: Progress,
    *,
    dtype: str,
    cache: Path | None = None,
) -> list[ModelTasks]:
    """Score models in tasks, in pairs with the reference if there is one.

    Directories run in `dtype` on `device`, GGUF files by llama.cpp on the CPU. All get the token
    ids that `tokenizer` makes, the original's as a rule. What a model has answered before is taken
    from `cache`.

    Raises:
        UsageError: an answer longer than what a model can read, or no chat template; an unknown
            dtype; a cache that cannot be written.
        UnsupportedError, DamagedError, NumericalError: a model that cannot be run, or was changed.
        CapacityError: a task generates text, and the whole model does not fit; no room for the
            cache.
    """
    every = [*models, *([reference] if reference else [])]
    sizes = [size for size in map(vocabulary_of, every) if size]
    # Rows that a GGUF file is filled up with count only where there is nothing to cut to.
    vocabulary = min(sizes) if reference is not None and sizes else None
    texts = TaskTokenizer(tokenizer)

    def run(checkpoint: Checkpoint) -> _Raw:
        with tempfile.TemporaryDirectory() as spill:
            begin = partial(steps, progress)
            place = Path(spill)
            runner = _runner(checkpoint, device, dtype_of(dtype), place, vocabulary, begin)
            if cache is not None:
                key = model_key(checkpoint, cache, device, dtype)
                key["vocabulary"] = vocabulary
                at_once = TOKENS_AT_ONCE["cpu" if checkpoint.gguf else device.type]
                runner = CachedTasks(runner, cache, key, at_once, checkpoint.check_unchanged)
            with closing(runner):
                raw = _answered(checkpoint, runner, suite, texts, progress)
        checkpoint.check_unchanged()
        progress.finish()
        return raw

    expected = None if reference is None else run(reference)
    found = []
    for checkpoint in models:
        ours = run(checkpoint)
        found.append(ModelTasks(_compared(suite, ours, expected), ours.seconds))
    return found


def _runner(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    spill: Path,
    vocabulary: int | None,
    begin: Begin,
) -> TaskRunner:
    if not checkpoint.gguf:
        return StreamedTasks(checkpoint, device, dtype, spill, vocabulary, begin)
    from qtool.evaluation.llama_tasks import LlamaTasks

    return LlamaTasks(checkpoint, vocabulary, begin)


def _answered(
    checkpoint: Checkpoint,
    runner: TaskRunner,
    suite: TaskSuite,
    texts: TaskTokenizer,
    progress: Progress,
) -> _Raw:
    started, cut = time.perf_counter(), Shortened()
    files = score_files(suite.files, runner, texts, cut, chat=suite.chat)
    harness: Mapping[str, HarnessScores] = {}
    if suite.harness is not None:
        harness = suite.harness.run(runner, texts, cut, progress.warn)
    if cut.texts:
        progress.warn(
            "beyond_context",
            f"{checkpoint.name} was made for {runner.longest} tokens: {cut.texts} texts of tasks "
            "are longer and lost their beginning",
        )
    return _Raw(files, harness, time.perf_counter() - started)


def _compared(suite: TaskSuite, ours: _Raw, theirs: _Raw | None) -> dict[str, TaskScore]:
    """Return a model's scores, in pairs with the reference's."""
    found: dict[str, TaskScore] = {}
    for index, (file, samples) in enumerate(zip(suite.files, ours.files, strict=True)):
        expected = None if theirs is None else theirs.files[index]
        metrics = _metrics(samples, expected)
        found[file.name] = TaskScore("file", len(file), metrics, file.sha256)
    for name, scores in ours.harness.items():
        other = None if theirs is None else theirs.harness[name]
        metrics = _metrics(scores.samples, None if other is None else other.samples)
        for metric, value in scores.summaries.items():
            paired = None
            if other is not None and metric in other.summaries:
                reference = other.summaries[metric]
                paired = Paired(reference, math.nan, value - reference, math.nan)
            metrics[metric] = TaskMetric(value, math.nan, paired)
        if metrics:
            found[name] = TaskScore("lm_eval", scores.count, metrics)
    return found


def _metrics(
    samples: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]] | None
) -> dict[str, TaskMetric]:
    return {
        name: metric_of(values, None if reference is None else reference.get(name))
        for name, values in samples.items()
    }
