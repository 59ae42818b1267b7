"""Measure finished outputs against their original and hold them to gates, before they are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qtool.calibration.tokens import Windows
from qtool.checkpoint.locate import Checkpoint, locate
from qtool.errors import GateError, UnsupportedError
from qtool.evaluation.gates import (
    Gate,
    GateOutcome,
    check_gates,
    needed_metrics,
    shown_outcome,
)
from qtool.evaluation.metrics_json import DEFAULT_METRICS
from qtool.pipeline.evaluate import Extent, brief, evaluate_fully, metrics_of
from qtool.pipeline.outputs import PlannedOutput
from qtool.pipeline.plan import Plan
from qtool.pipeline.progress import Progress
from qtool.pipeline.tokenizer_check import check_tokenizer, tokenizer_json
from qtool.recipe.schema import Recipe


@dataclass(frozen=True)
class Measurement:
    """What one output lost, and which gates it passed.

    Args:
        result: in the terms of the JSON contract: model, bytes, metrics (empty where nothing was
            measured) and, where a gate asks for it, what is known of the tokenizer.
        outcomes: of every gate.
    """

    result: Mapping[str, Any]
    outcomes: tuple[GateOutcome, ...] = ()

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures, without the errors of quantiles and ratios."""
        return brief(self.result["metrics"])

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(outcome.passed for outcome in self.outcomes)


@dataclass(frozen=True)
class Measurer:
    """How the outputs of a run are measured.

    Args:
        original: the model they are made from.
        windows: of the evaluation text; None where no figure is wanted.
        metrics: members of METRICS.
        gates: conditions on the figures.
        device: where to compute.
        progress: told what happens.
        cache: directory for the original's logits; None computes them each time.
    """

    original: Checkpoint
    windows: Windows | None
    metrics: frozenset[str]
    gates: tuple[Gate, ...]
    device: torch.device
    progress: Progress
    cache: Path | None = None

    def measure(self, weights: Sequence[Path], names: Sequence[Path]) -> tuple[Measurement, ...]:
        """Measure complete outputs, which may still have hidden names.

        Args:
            weights: what opens each: a directory, or a GGUF file.
            names: what each will be called.

        Raises:
            UnsupportedError, DamagedError, NumericalError: as `evaluate`.
        """
        models = [replace(locate(str(path), gguf=True), name="the result") for path in weights]
        found: list[Mapping[str, Any]] = [{} for _ in models]
        if self.windows is not None and self._can_run(models):
            results = evaluate_fully(
                models,
                self.original,
                self.windows,
                self.device,
                self.progress,
                Extent(cache=self.cache),
            ).results
            found = [metrics_of(result, self._names(result.checkpoint)) for result in results]
        return tuple(
            self._held_to_gates(model, name, metrics)
            for model, name, metrics in zip(models, names, found, strict=True)
        )

    def _names(self, model: Checkpoint) -> frozenset[str]:
        return self.metrics | ({"ppl_llama_cpp"} if model.gguf else frozenset())

    def _can_run(self, models: Sequence[Checkpoint]) -> bool:
        """Tell whether the models can be run here; gates that need it were checked before."""
        if not any(model.gguf for model in models):
            return True
        from qtool.evaluation.llama_cpp import check_installed

        try:
            check_installed()
        except UnsupportedError as error:
            self.progress.warn("not_measured", f"{error.message}; {error.hint}")
            return False
        return True

    def _held_to_gates(
        self, model: Checkpoint, name: Path, metrics: Mapping[str, Any]
    ) -> Measurement:
        result: dict[str, Any] = {
            "model": str(name),
            "bytes": model.file_bytes,
            "metrics": metrics,
        }
        if any(gate.measure.kind == "same" for gate in self.gates):
            check = check_tokenizer(model, self.original)
            result.update({} if check is None else {"tokenizer": tokenizer_json(check)})
        return Measurement(result, check_gates(self.gates, [result]))


def wanted_metrics(recipe: Recipe, gates: Sequence[Gate]) -> frozenset[str]:
    """Return what a run has to measure: nothing, or at least the default figures."""
    if not recipe.eval.metrics:
        return frozenset()
    return frozenset({*DEFAULT_METRICS, *recipe.eval.metrics, *needed_metrics(gates)})


def check_gates_can_decide(plans: Sequence[Plan], gates: Sequence[Gate]) -> None:
    """Refuse a run whose gates could not be held against its result.

    Sizes are known from the plan: a gate on one that would fail fails now, before hours of work.

    Raises:
        GateError: an output will be larger than a gate allows; nothing was written.
        UnsupportedError: a gate needs a GGUF file to be run, and llama.cpp is not there.
    """
    outputs = [output for plan in plans for output in plan.outputs]
    _check_sizes(outputs, [gate for gate in gates if gate.measure.kind == "size"])
    runs_gguf = any(output.name.startswith("gguf:") for output in outputs)
    if runs_gguf and needed_metrics(gates):
        from qtool.evaluation.llama_cpp import check_installed

        check_installed()


def _check_sizes(outputs: Sequence[PlannedOutput], gates: Sequence[Gate]) -> None:
    planned = [
        {"model": f"the planned {output.name}", "bytes": output.n_bytes} for output in outputs
    ]
    failed = [outcome for outcome in check_gates(gates, planned) if not outcome.passed]
    if failed:
        raise GateError(
            "; ".join(shown_outcome(outcome) for outcome in failed),
            "quantize with fewer bits, or loosen the gate; nothing was written",
        )
