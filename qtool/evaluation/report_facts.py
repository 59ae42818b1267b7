"""What a report shows: models in the order of their size, with what each of them lost.

Text in here is printable and numbers are finite: `report_reading` sees to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

LONGEST_LABEL = 26


@dataclass(frozen=True)
class Figure:
    """A measured value, its standard error where there is one, and over how many tokens."""

    value: float
    error: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Bucket:
    """What was lost on tokens whose place in the window is in [start, stop)."""

    start: int
    stop: int
    loss: Figure | None
    reference_loss: float | None
    kld: Figure | None


@dataclass(frozen=True)
class Domain:
    """What was lost on one kind of text."""

    name: str
    ppl: float | None
    ppl_reference: float | None
    kld: Figure | None
    top1: float | None


@dataclass(frozen=True)
class Tokenizer:
    """How a model's tokenizer and chat template compare with the original's."""

    same: bool
    template: str
    differences: tuple[str, ...]

    @property
    def alarming(self) -> bool:
        """Whether the model gets other tokens than the original would."""
        return not self.same or self.template == "different" or bool(self.differences)


@dataclass(frozen=True)
class TaskFigure:
    """One metric of a task, and how it compares with the original's on the same samples."""

    task: str
    metric: str
    samples: int | None
    score: Figure
    reference: float | None
    difference: Figure | None
    won: int | None
    lost: int | None
    p_value: float | None


@dataclass(frozen=True)
class Layer:
    """The error that rounding made in one linear."""

    name: str
    error: float
    bits: float | None


@dataclass(frozen=True)
class Gate:
    """A condition and what became of it; `limit` is None where it is not a number."""

    expression: str
    value: float | str | None
    error: float | None
    passed: bool
    metric: str
    limit: float | None

    @property
    def close(self) -> bool:
        """Whether the limit is within two standard errors, so that other text could decide."""
        if self.error is None or self.limit is None or not isinstance(self.value, float):
            return False
        return abs(self.value - self.limit) < 2 * self.error


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        number: from 1, in the order of size; plots refer to it where names do not fit.
        label: a short name, different for every row.
        bits: bits per weight of the whole file, or of the rounded linears (`bits_of_linears`).
        frontier: no other model is both smaller and nearer to the original.
    """

    number: int
    name: str
    label: str
    format: str
    n_bytes: int | None
    bits: float | None
    bits_of_linears: bool
    seconds: float | None
    ppl: Figure | None
    ppl_reference: float | None
    ppl_ratio: Figure | None
    ppl_llama_cpp: Figure | None
    kld: Figure | None
    kld_median: float | None
    kld_p99: Figure | None
    kld_p999: float | None
    tail_error: float | None
    top1: Figure | None
    flips: Figure | None
    positions: tuple[Bucket, ...]
    domains: tuple[Domain, ...]
    tasks: tuple[TaskFigure, ...]
    tokenizer: Tokenizer | None
    layers: tuple[Layer, ...]
    gates: tuple[Gate, ...]
    frontier: bool = False

    @property
    def passed(self) -> bool | None:
        """Whether all its gates passed; None where it has none."""
        return all(gate.passed for gate in self.gates) if self.gates else None


@dataclass(frozen=True)
class Facts:
    """All that a report shows."""

    rows: tuple[Row, ...]
    reference: str | None
    reference_format: str
    reference_bytes: int | None
    data: Mapping[str, str]
    noise_dtype: str | None
    noise: Figure | None
    warnings: tuple[str, ...]
    environment: Mapping[str, str]
    left_out: int  # models beyond the most that a report shows

    @property
    def compared(self) -> bool:
        """Whether anything was measured against an original."""
        return any(row.kld for row in self.rows)


def frontier_of(rows: Sequence[Row]) -> frozenset[int]:
    """Return the numbers of rows that no other row beats in both size and KL divergence."""
    measured = [(row.n_bytes, row.kld.value, row.number) for row in rows if row.n_bytes and row.kld]
    return frozenset(
        number
        for size, loss, number in measured
        if not any(
            s <= size and k <= loss and (s < size or k < loss or n < number)
            for s, k, n in measured
            if n != number
        )
    )


def best_for_size(rows: Sequence[Row]) -> Row | None:
    """Return the model that loses least for its bytes, or None where that cannot be said.

    The error of an even grid falls by four for each further bit, and KL divergence goes with the
    squared error; so `kld * 4 ** bits` compares models of different sizes fairly.
    """
    rated = [
        (math.log(row.kld.value) + row.bits * math.log(4), row.number, row)
        for row in rows
        if row.kld and row.kld.value > 0 and row.bits and not row.bits_of_linears
    ]
    return min(rated)[2] if len(rated) > 1 else None


def short_labels(names: Sequence[str]) -> list[str]:
    """Return the last part of each path, with more of it where two would look the same.

    What all of them begin with, the name of the model as a rule, tells none from another.
    """
    parts = [PurePosixPath(name.rstrip("/") or name).parts or (name,) for name in names]
    last = [part[-1].removesuffix(".gguf") or part[-1] for part in parts]
    shared = _shared_beginning(last)
    labels = [_cut(name[shared:]) for name in last]
    for depth in range(2, 6):
        repeated = {label for label in labels if labels.count(label) > 1}
        labels = [
            _cut("/".join(part[-depth:])) if label in repeated else label
            for part, label in zip(parts, labels, strict=True)
        ]
    seen: dict[str, int] = {}
    unique = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        many = labels.count(label) > 1
        unique.append(f"{label[: LONGEST_LABEL - 5]} ({seen[label]})" if many else label)
    return unique


def _shared_beginning(names: Sequence[str]) -> int:
    """Return how many characters up to a hyphen, underscore or dot all of several names share."""
    if len(set(names)) < 2:
        return 0
    first, last = min(names), max(names)  # all others lie between, and share what these share
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    end = max(first.rfind(mark, 0, same) for mark in "-_.") + 1
    return end if all(len(name) > end for name in names) else 0


def _cut(label: str) -> str:
    """Shorten in the middle: both ends of a model's name say what it is."""
    if len(label) <= LONGEST_LABEL:
        return label
    head = LONGEST_LABEL // 2 - 1
    return f"{label[:head]}…{label[-(LONGEST_LABEL - head - 1) :]}"
