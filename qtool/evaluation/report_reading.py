"""Take what a report shows out of the JSON object of `qtool eval`.

Names, notes and the layers of a model's own report come from files that strangers wrote. Here, and
nowhere later, text becomes printable, numbers become finite or None, and what has the wrong shape
counts as missing; so the page and the plots may trust what they get.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import UsageError
from qtool.evaluation.gates import parse_gate
from qtool.evaluation.report_facts import (
    Bucket,
    Domain,
    Facts,
    Figure,
    Gate,
    Layer,
    Row,
    TaskFigure,
    Tokenizer,
    frontier_of,
    short_labels,
)

MOST_MODELS = 200
MOST_LAYERS = 20_000
MOST_BUCKETS = 64
MOST_DOMAINS = 24
MOST_TASKS = 200
MOST_NOTES = 50


def facts_of(result: Mapping[str, Any]) -> Facts:
    """Take what a report shows out of the object that `qtool eval --json` prints."""
    reference = _mapping(result.get("reference"))
    models = [_mapping(item) for item in _items(result.get("results"))]
    gates = [_mapping(item) for item in _items(result.get("gates"))]
    rows = [_row(model, gates, reference) for model in models[:MOST_MODELS]]
    rows.sort(key=lambda row: (math.inf if row.n_bytes is None else row.n_bytes, row.name))
    labels = short_labels([row.name for row in rows])
    rows = [
        replace(row, number=number, label=label)
        for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=1)
    ]
    best = frontier_of(rows)
    noise = _mapping(result.get("noise_floor"))
    name = reference.get("model") or reference.get("name")
    return Facts(
        rows=tuple(replace(row, frontier=row.number in best) for row in rows),
        reference=None if name is None else printable(name),
        reference_format=_text(reference.get("format")),
        reference_bytes=_count(reference.get("bytes")),
        data=_texts(result.get("data")),
        noise_dtype=_text(noise.get("dtype")) or None,
        noise=_figure(noise.get("kld"), "mean"),
        warnings=tuple(_warning(item) for item in _items(result.get("warnings"))[:MOST_NOTES]),
        environment=_texts(result.get("environment")),
        left_out=max(0, len(models) - MOST_MODELS),
    )


def _row(
    item: Mapping[str, Any], gates: Sequence[Mapping[str, Any]], reference: Mapping[str, Any]
) -> Row:
    metrics = _mapping(item.get("metrics"))
    ppl, kld = _mapping(metrics.get("ppl")), _mapping(metrics.get("kld"))
    layers = tuple(_layers(item.get("layers")))
    bits, of_linears = _bits(item, reference, layers)
    return Row(
        number=0,
        name=printable(item.get("model", "?")),
        label="",
        format=_text(item.get("format")),
        n_bytes=_count(item.get("bytes")),
        bits=bits,
        bits_of_linears=of_linears,
        seconds=_number(item.get("seconds")),
        ppl=_figure(ppl, "value"),
        ppl_reference=_number(ppl.get("reference")),
        ppl_ratio=_figure(ppl, "ratio", "ratio_se"),
        ppl_llama_cpp=_figure(metrics.get("ppl_llama_cpp"), "value"),
        kld=_figure(kld, "mean"),
        kld_median=_number(kld.get("median")),
        kld_p99=_figure(kld, "p99", "p99_se"),
        kld_p999=_number(kld.get("p999")),
        tail_error=_number(kld.get("tail_error")),
        top1=_figure(metrics.get("top1"), "value"),
        flips=_figure(metrics.get("flips"), "value"),
        positions=tuple(_buckets(item.get("positions"))),
        domains=tuple(_domains(item.get("domains"))),
        tasks=tuple(_tasks(metrics.get("tasks"))),
        tokenizer=_tokenizer(item.get("tokenizer")),
        layers=layers,
        gates=tuple(_gate(g) for g in gates if g.get("model") in {None, item.get("model")}),
    )


def _bits(
    item: Mapping[str, Any], reference: Mapping[str, Any], layers: Sequence[Layer]
) -> tuple[float | None, bool]:
    """Return bits per weight, and whether they are those of the rounded linears only."""
    stated, n_bytes = _number(item.get("bits_per_weight")), _count(item.get("bytes"))
    if stated is not None:
        return stated, False
    weights = _count(item.get("parameters")) or _count(reference.get("parameters"))
    if weights and n_bytes:
        return 8 * n_bytes / weights, False
    known = [layer.bits for layer in layers if layer.bits is not None]
    return (sum(known) / len(known), True) if known else (None, False)


def _gate(item: Mapping[str, Any]) -> Gate:
    expression = _text(item.get("expression")) or "?"
    try:
        parsed = parse_gate(expression)
    except UsageError:  # of a later version
        parsed = None
    value = item.get("value")
    return Gate(
        expression=expression,
        value=_text(value) if isinstance(value, str) else _number(value),
        error=_number(item.get("se")),
        passed=item.get("pass") is True,
        metric="" if parsed is None else parsed.name,
        limit=None if parsed is None or parsed.measure.kind == "same" else parsed.limit,
    )


def _layers(value: object) -> Iterable[Layer]:
    for item in map(_mapping, _items(value)[:MOST_LAYERS]):
        error = _number(item.get("relative_error"))
        if error is not None and error >= 0:
            yield Layer(_text(item.get("name")), error, _number(item.get("bits_per_weight")))


def _buckets(value: object) -> Iterable[Bucket]:
    for item in map(_mapping, _items(value)[:MOST_BUCKETS]):
        start, stop = _count(item.get("start")), _count(item.get("stop"))
        if start is not None and stop is not None and stop > start:
            yield Bucket(
                start=start,
                stop=stop,
                loss=_figure(item, "loss", "loss_se"),
                reference_loss=_number(item.get("reference_loss")),
                kld=_figure(item, "kld", "kld_se"),
            )


def _domains(value: object) -> Iterable[Domain]:
    for name, item in list(_mapping(value).items())[:MOST_DOMAINS]:
        found = _mapping(item)
        yield Domain(
            name=printable(name),
            ppl=_number(found.get("ppl")),
            ppl_reference=_number(found.get("ppl_reference")),
            kld=_figure(found, "kld", "kld_se"),
            top1=_number(found.get("top1")),
        )


def _tasks(value: object) -> Iterable[TaskFigure]:
    for name, item in list(_mapping(value).items())[:MOST_TASKS]:
        found = _mapping(item)
        figures = [(found.get("metric"), found), *_mapping(found.get("other")).items()]
        for metric, value_of in figures[:MOST_TASKS]:
            figure = _mapping(value_of)
            score = _figure(figure, "value")
            if score is not None:
                yield TaskFigure(
                    task=printable(name),
                    metric=_text(metric),
                    samples=_count(found.get("samples")),
                    score=score,
                    reference=_number(figure.get("reference")),
                    difference=_figure(figure, "difference", "difference_se"),
                    won=_count(figure.get("won")),
                    lost=_count(figure.get("lost")),
                    p_value=_number(figure.get("mcnemar_p")),
                )


def _tokenizer(value: object) -> Tokenizer | None:
    found = _mapping(value)
    if not found:
        return None
    return Tokenizer(
        same=found.get("same") is not False,
        template=_text(found.get("template")),
        differences=tuple(
            printable(text) for text in _items(found.get("differences"))[:MOST_NOTES]
        ),
    )


def _warning(item: object) -> str:
    found = _mapping(item)
    return printable(found.get("message", "")) if found else printable(item)


def _figure(value: object, key: str, error: str = "se") -> Figure | None:
    found = _mapping(value)
    number = _number(found.get(key))
    if number is None:
        return None
    spread = _number(found.get(error))
    return Figure(number, spread if spread and spread > 0 else None, _count(found.get("tokens")))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _count(value: object) -> int | None:
    number = _number(value)
    return None if number is None or number < 0 else int(number)


def _text(value: object) -> str:
    return "" if value is None else printable(value)


def _texts(value: object) -> dict[str, str]:
    """Return the plain values of a mapping as text."""
    plain = (str, int, float)
    return {
        printable(key): printable(item)
        for key, item in list(_mapping(value).items())[:MOST_NOTES]
        if isinstance(item, plain)
    }


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _items(value: object) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
