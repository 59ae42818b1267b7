"""Gates: conditions on an evaluation's figures that a script can rely on.

    kld<=0.05   ppl_ratio<=1.03   top1>=90%   loss<=3%   size<=5GB   template==same
    task:NAME>=60%   task:NAME.acc_norm>=0.6   task_drop:NAME<=1%

Pure functions of the results in the terms of the JSON contract (`qtool.eval/1`), so that `eval`,
`quantize` and recipes mean the same. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from qtool.checkpoint.untrusted import printable
from qtool.errors import GateError, UsageError
from qtool.recipe.schema import LONGEST_GATE
from qtool.recipe.sizes import parse_size, shown_size

EXAMPLES = (
    "write it like 'kld<=0.05', 'top1>=0.9', 'loss<=3%', 'size<=5GB', 'template==same' or "
    "'task_drop:NAME<=1%'"
)
Operator = Literal["<=", ">=", "<", ">", "=="]


@dataclass(frozen=True)
class Measure:
    """A name that a gate may use.

    Args:
        path: keys of the value in a result.
        error_path: keys of its standard error; empty where there is none.
        metric: what `--metrics` calls it, empty if it is always there.
        relative: whether the value is that much more than one: perplexity's ratio 1.03 is 0.03.
        needs_reference: whether there must be an original to compare with.
        kind: what stands on the right-hand side.
        of_task: keys of value and error below a task, which the gate names; empty for others.
        sign: -1 where the value is the negative of what the gate speaks of.
    """

    path: tuple[str, ...]
    error_path: tuple[str, ...] = ()
    metric: str = ""
    relative: bool = False
    needs_reference: bool = True
    kind: Literal["number", "size", "same"] = "number"
    of_task: tuple[str, str] | None = None
    sign: int = 1


def _divergence(key: str, error: str) -> Measure:
    return Measure(("metrics", "kld", key), ("metrics", "kld", error), "kld")


RATIO = (("metrics", "ppl", "ratio"), ("metrics", "ppl", "ratio_se"), "ppl")
MEASURES: Mapping[str, Measure] = {
    "ppl": Measure(
        ("metrics", "ppl", "value"), ("metrics", "ppl", "se"), "ppl", needs_reference=False
    ),
    "ppl_ratio": Measure(*RATIO),
    "loss": Measure(*RATIO, relative=True),
    "kld": _divergence("mean", "se"),
    "kld_median": _divergence("median", "median_se"),
    "kld_p99": _divergence("p99", "p99_se"),
    "kld_p999": _divergence("p999", "p999_se"),
    "top1": Measure(("metrics", "top1", "value"), ("metrics", "top1", "se"), "top1"),
    "flips": Measure(("metrics", "flips", "value"), ("metrics", "flips", "se"), "flips"),
    "task": Measure((), needs_reference=False, of_task=("value", "se")),
    # By how much the model is worse than the reference on the same samples.
    "task_drop": Measure((), of_task=("difference", "difference_se"), sign=-1),
    "size": Measure(("bytes",), needs_reference=False, kind="size"),
    "template": Measure(("tokenizer", "template"), kind="same"),
    "tokenizer": Measure(("tokenizer", "same"), kind="same"),
}

_GATE = re.compile(
    r"\s*([a-z_][a-z0-9_.]*)(?::([^\s<>=]+))?\s*(<=|>=|==|<|>)\s*(\S.*?)\s*", re.IGNORECASE
)
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(%?)", re.IGNORECASE)


@dataclass(frozen=True)
class Gate:
    """One condition.

    Args:
        expression: as written.
        name: of the measure, a key of MEASURES.
        operator: how the value must stand to the limit.
        limit: a number, bytes for a size; 1 stands for "same".
        task: what follows the name and a colon: a task, or task.metric.
    """

    expression: str
    name: str
    operator: Operator
    limit: float
    task: str = ""

    @property
    def measure(self) -> Measure:
        """What it looks at."""
        return MEASURES[self.name]


@dataclass(frozen=True)
class GateOutcome:
    """What became of a gate on one model.

    Args:
        gate: the condition.
        model: as given.
        value: what was found; None where it could not be.
        error: its standard error; None where there is none.
        passed: whether the value meets the limit. The error is told, it decides nothing.
    """

    gate: Gate
    model: str
    value: float | str | None
    error: float | None
    passed: bool


def parse_gate(text: str) -> Gate:
    """Read a gate such as `kld<=0.05`.

    Raises:
        UsageError: an unknown name or operator, or a limit that the name does not take.
    """
    match = _GATE.fullmatch(text) if len(text) <= LONGEST_GATE else None
    if match is None:
        raise UsageError(f"'{printable(text)}' is not a gate", EXAMPLES)
    name, task, operator = match[1].lower(), match[2] or "", match[3]
    if name not in MEASURES:
        raise UsageError(
            f"gate '{printable(text)}': there is no figure '{printable(name)}'",
            f"choose from: {', '.join(MEASURES)}",
        )
    if bool(task) != (MEASURES[name].of_task is not None):
        wanted = f"'{name}:NAME'" if not task else f"'{name}' without ':'"
        raise UsageError(f"gate '{printable(text)}': write it as {wanted}", EXAMPLES)
    same = MEASURES[name].kind == "same"
    if same != (operator == "=="):
        wanted = f"'{name}==same'" if same else "<=, >=, < or >"
        raise UsageError(f"gate '{printable(text)}': {name} is compared with {wanted}", EXAMPLES)
    return Gate(text.strip(), name, cast("Operator", operator), _limit(name, match[4], text), task)


def parse_gates(texts: Iterable[str] | None) -> tuple[Gate, ...]:
    """Read several gates, none for None.

    Raises:
        UsageError: as `parse_gate`.
    """
    return tuple(parse_gate(text) for text in texts or ())


def _limit(name: str, text: str, expression: str) -> float:
    """Return the right-hand side of a gate as a number."""
    kind = MEASURES[name].kind
    if kind == "same":
        if text.lower() == "same":
            return 1.0
        raise UsageError(f"gate '{printable(expression)}': {name} can only be 'same'", EXAMPLES)
    if kind == "size":
        try:
            return float(parse_size(text))
        except UsageError as error:
            raise UsageError(
                f"gate '{printable(expression)}': {error.message}", EXAMPLES
            ) from error
    number = _NUMBER.fullmatch(text)
    if number is None or not math.isfinite(float(number[1])):
        raise UsageError(
            f"gate '{printable(expression)}': '{printable(text)}' is not a number", EXAMPLES
        )
    return float(number[1]) / (100 if number[2] else 1)


def needed_metrics(gates: Iterable[Gate]) -> frozenset[str]:
    """Return what `--metrics` must name for the gates to have a value."""
    return frozenset(gate.measure.metric for gate in gates if gate.measure.metric)


def check_measurable(
    gates: Iterable[Gate], *, has_reference: bool, tasks: Collection[str] = ()
) -> None:
    """Refuse gates that compare with an original where there is none, or name no task of the run.

    Raises:
        UsageError: such a gate.
    """
    for gate in gates:
        if gate.task and _split_task(gate.task, tasks) is None:
            raise UsageError(
                f"gate '{printable(gate.expression)}': there is no task '{printable(gate.task)}'",
                f"tasks of this run: {printable(', '.join(tasks))}"
                if tasks
                else "give it with --tasks NAME or --task-file NAME.jsonl of qtool eval",
            )
        if gate.measure.needs_reference and not has_reference:
            raise UsageError(
                f"gate '{printable(gate.expression)}' compares with an original, and none is given",
                "give it with --ref ORIGINAL",
            )


def check_gates(
    gates: Sequence[Gate], results: Sequence[Mapping[str, Any]]
) -> tuple[GateOutcome, ...]:
    """Hold results to gates: one outcome for each model and gate.

    Args:
        gates: as parsed.
        results: in the terms of the JSON contract, with `model`, `bytes`, `metrics` and, where it
            was looked at, `tokenizer`.
    """
    return tuple(_outcome(gate, result) for result in results for gate in gates)


def _split_task(name: str, tasks: Collection[str]) -> tuple[str, str] | None:
    """Return (task, metric or "") that a gate names; a task's own name may have dots in it."""
    if name in tasks:
        return name, ""
    task, _, metric = name.rpartition(".")
    return (task, metric) if metric and task in tasks else None


def _figures(gate: Gate, result: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a gate's value and its error in a result, None where there is none."""
    measure = gate.measure
    if measure.of_task is None:
        return _at(result, measure.path), _at(result, measure.error_path)
    tasks = _at(result, ("metrics", "tasks"))
    found = _split_task(gate.task, tasks if isinstance(tasks, Mapping) else ())
    if found is None:
        return None, None
    task, metric = found
    path: tuple[str, ...] = ("metrics", "tasks", task)
    if metric and metric != _at(result, (*path, "metric")):
        path = (*path, "other", metric)
    value, error = (_at(result, (*path, key)) for key in measure.of_task)
    known = isinstance(value, int | float)
    return (measure.sign * value + 0.0 if known else value), error


def _outcome(gate: Gate, result: Mapping[str, Any]) -> GateOutcome:
    value, error = _figures(gate, result)
    model = str(result["model"])
    if gate.measure.kind == "same":
        shown = {True: "same", False: "different", None: None}.get(value, value)
        return GateOutcome(gate, model, shown, None, shown == "same")
    if not isinstance(value, int | float) or not math.isfinite(value):
        return GateOutcome(gate, model, None, None, passed=False)
    number = float(value) - (1 if gate.measure.relative else 0)
    meets = {
        "<=": number <= gate.limit,
        ">=": number >= gate.limit,
        "<": number < gate.limit,
        ">": number > gate.limit,
    }[gate.operator]
    known = isinstance(error, int | float) and math.isfinite(error)
    return GateOutcome(gate, model, number, float(error) if known else None, meets)


def _at(result: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Follow keys; None where one is missing or there are none."""
    found: Any = result if path else None
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def gate_json(outcome: GateOutcome) -> dict[str, Any]:
    """Return an outcome in the terms of the JSON contract."""
    return {
        "expression": outcome.gate.expression,
        "model": outcome.model,
        "value": outcome.value,
        "se": outcome.error,
        "pass": outcome.passed,
    }


def shown_outcome(outcome: GateOutcome) -> str:
    """Return what a person reads: the gate, the value and its standard error."""
    verdict = "passed" if outcome.passed else "failed"
    gate = outcome.gate
    if outcome.value is None:
        value = "no value"
    elif isinstance(outcome.value, str):
        value = outcome.value
    elif gate.measure.kind == "size":
        value = shown_size(outcome.value)
    else:
        percent = gate.expression.endswith("%")
        value = _shown(outcome.value, percent)
        if outcome.error is not None:
            value += f" ± {_shown(outcome.error, percent)}"
    name = f"{gate.name} {printable(gate.task)}" if gate.task else gate.name
    return f"{printable(gate.expression)} {verdict}: {name} of {outcome.model} is {value}"


def _shown(number: float, percent: bool) -> str:
    return f"{100 * number:.3g} %" if percent else f"{number:.4g}"


ADVICE = {
    "number": "quantize with more bits or another method",
    "size": "quantize with fewer bits",
    "same": "give the model the original's tokenizer files and chat template",
}


def gate_error(outcomes: Sequence[GateOutcome]) -> GateError | None:
    """Return the error that names every failed gate, None if all passed."""
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if not failed:
        return None
    advice = dict.fromkeys(ADVICE[outcome.gate.measure.kind] for outcome in failed)
    return GateError(
        "; ".join(shown_outcome(outcome) for outcome in failed),
        f"{', '.join(advice)}, or loosen the gate; the model is kept",
    )
