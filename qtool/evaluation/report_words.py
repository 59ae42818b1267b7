"""What a report says in words: the verdict on top, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qtool.evaluation.report_facts import Facts, Figure, Gate, Row, best_for_size
from qtool.evaluation.report_numbers import (
    percent_with_error,
    plain,
    seconds,
    size,
    with_error,
)

MOST_NAMED = 6
WORDS_MISSED = 10.0  # another template weighs more than any figure that is a little off


@dataclass(frozen=True)
class Verdict:
    """The headline, whether it is good news, and what else the figures say."""

    mood: Literal["good", "bad", "plain"]
    headline: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Alert:
    """A model that does not get the tokens that its original would."""

    model: str
    lines: tuple[str, ...]


def verdict(facts: Facts) -> Verdict:
    """Return whether models pass their gates, and which of them loses least for its size."""
    if not facts.rows:
        return Verdict("bad", "No model was measured.", ())
    mood, headline = _headline(facts)
    return Verdict(mood, headline, tuple(_remarks(facts)))


def _headline(facts: Facts) -> tuple[Literal["good", "bad", "plain"], str]:
    judged = [row for row in facts.rows if row.passed is not None]
    if not judged:
        return "plain", _without_gates(facts)
    passed = [row for row in judged if row.passed]
    count = max(len(row.gates) for row in judged)
    every = {1: "the gate", 2: "both gates"}.get(count, f"all {count} gates")
    if len(judged) == 1:
        if passed:
            return "good", f"{judged[0].label} passes {every}."
        failed = sum(not gate.passed for gate in judged[0].gates)
        return "bad", f"{judged[0].label} fails {failed} of {count} gates."
    if not passed:
        return "bad", f"None of {len(judged)} models passes {every}."
    smallest = f"the smallest is {passed[0].label}, {described(passed[0])}."
    if len(passed) == len(judged):
        all_of_them = "Both" if len(judged) == 2 else f"All {len(judged)}"
        return "good", f"{all_of_them} models pass {every}; {smallest}"
    one = len(passed) == 1
    found = f"{passed[0].label}, {described(passed[0])}." if one else smallest
    verb = "passes" if one else "pass"
    return (
        "good",
        f"{len(passed)} of {len(judged)} models {verb} {every}{': ' if one else '; '}{found}",
    )


def _without_gates(facts: Facts) -> str:
    measured = [row for row in facts.rows if row.kld]
    if not measured and not any(row.ppl for row in facts.rows):
        return "Text was not looked at: sizes, tokenizers and tasks only."
    if not measured:
        models = "one model" if len(facts.rows) == 1 else f"{len(facts.rows)} models"
        return f"Perplexity of {models}, without an original to compare with."
    if len(measured) == 1:
        return f"{measured[0].label}: {described(measured[0])}."
    least = min(measured, key=lambda row: row.kld.value if row.kld else 0.0)
    return f"Of {len(measured)} models, {least.label} loses least: {described(least)}."


def described(row: Row) -> str:
    """Return a model's size and loss in a few words."""
    if row.kld:
        return f"{size(row.n_bytes)}, KL divergence {with_error(row.kld)}"
    return size(row.n_bytes) + (f", perplexity {with_error(row.ppl)}" if row.ppl else "")


def _remarks(facts: Facts) -> Iterator[str]:
    if not any(row.passed for row in facts.rows):
        failed = [row for row in facts.rows if row.gates]
        if failed:
            nearest = min(failed, key=_miss)
            gates = [gate for gate in nearest.gates if not gate.passed]
            values = "; ".join(f"{gate.expression} is {shown_gate_value(gate)}" for gate in gates)
            yield f"Nearest to passing: {nearest.label}, where {values}."
    for row in facts.rows:
        for gate in row.gates:
            if gate.close:
                other = "questions" if gate.metric.startswith("task") else "text"
                yield (
                    f"{row.label} is within two standard errors of {gate.expression} "
                    f"({shown_gate_value(gate)}): other {other} could decide otherwise."
                )
    if not facts.compared:
        if any(row.ppl for row in facts.rows):
            yield (
                "Perplexity says how well a model predicts this text, not what quantization cost: "
                "give the original with --ref."
            )
        return
    best = best_for_size(facts.rows)
    if best is not None:
        yield (
            f"Least loss for its size: {best.label}. One more bit per weight is expected to cut "
            "the divergence to a quarter, and sizes are compared on that line."
        )
    frontier = [row.label for row in facts.rows if row.frontier]
    if len(facts.rows) > 2 and len(frontier) > 1:
        named = ", ".join(frontier[:MOST_NAMED])
        more = f" and {len(frontier) - MOST_NAMED} more" if len(frontier) > MOST_NAMED else ""
        yield (
            f"Worth choosing from, smallest first: {named}{more}. Each of the others is beaten "
            "by one of these in size and in loss."
        )
    yield from _near_the_floor(facts)


def _miss(row: Row) -> float:
    """Return by what factor, summed over gates, a model misses their limits; as a logarithm."""
    total = 0.0
    for gate in row.gates:
        value, limit = gate.value, gate.limit
        if gate.passed:
            continue
        if isinstance(value, float) and value > 0 and limit is not None and limit > 0:
            total += abs(math.log(value / limit))
        else:
            total += WORDS_MISSED
    return total


def _near_the_floor(facts: Facts) -> Iterator[str]:
    if facts.noise is None:
        return
    near = [row.label for row in facts.rows if row.kld and row.kld.value <= 2 * facts.noise.value]
    if near:
        floor = with_error(facts.noise)
        yield f"Hardly told from arithmetic noise ({floor}): {', '.join(near[:MOST_NAMED])}."


def shown_gate_value(gate: Gate) -> str:
    """Return what a gate measured, in the units of its metric."""
    if not isinstance(gate.value, float):
        return gate.value or "not measured"
    figure = Figure(gate.value, gate.error)
    if gate.metric in {"top1", "flips", "loss", "task", "task_drop"}:
        return percent_with_error(figure)
    return size(int(gate.value)) if gate.metric == "size" else with_error(figure)


def alerts(facts: Facts) -> list[Alert]:
    """Return the models whose tokenizer or chat template is not the original's."""
    found = []
    for row in facts.rows:
        if row.tokenizer is not None and row.tokenizer.alarming:
            lines = row.tokenizer.differences
            if not lines:
                which = "tokenizer" if not row.tokenizer.same else "chat template"
                lines = (f"the {which} is another",)
            found.append(Alert(row.label, lines))
    return found


def measured(facts: Facts) -> list[tuple[str, str]]:
    """Return how the figures came about, as names and values."""
    data = facts.data
    found = []
    if facts.reference:
        whole = (
            f"{facts.reference} ({facts.reference_format})"
            if facts.reference_format
            else facts.reference
        )
        n_bytes = "" if facts.reference_bytes is None else f", {size(facts.reference_bytes)}"
        found.append(("original", f"{whole}{n_bytes}"))
    if data.get("name"):
        found.append(("text", data["name"]))
    if data.get("windows") and data.get("context"):
        found.append(
            ("windows", f"{data['windows']} of {data['context']} tokens that do not overlap")
        )
    tokens = next((row.ppl.tokens for row in facts.rows if row.ppl and row.ppl.tokens), None)
    if tokens:
        found.append(("tokens scored", f"{tokens:,}".replace(",", " ")))
    if facts.noise:
        dtype = facts.noise_dtype or "another dtype"
        found.append(("noise floor", f"KL {with_error(facts.noise)}, the original in {dtype}"))
    tails = [abs(row.tail_error) for row in facts.rows if row.tail_error is not None]
    if tails:
        off = f"KL off by about {plain(max(tails), 2)} where it is most"
        found.append(("error of the stored logits", off))
    spent = [row.seconds for row in facts.rows if row.seconds is not None]
    if spent:
        found.append(("time", seconds(sum(spent))))
    if data.get("sha256"):
        found.append(("SHA-256 of the tokens", data["sha256"]))
    found += [(name, value) for name, value in facts.environment.items()]
    return found
