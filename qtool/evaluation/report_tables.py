"""The tables of a report, as cells of text that the page and the Markdown file share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qtool.evaluation.report_facts import Facts, Figure, Row, TaskFigure
from qtool.evaluation.report_heat import worst_layers
from qtool.evaluation.report_numbers import (
    percent,
    percent_with_error,
    plain,
    seconds,
    size,
    with_error,
)
from qtool.evaluation.report_plots import curves_shown
from qtool.evaluation.report_words import shown_gate_value

GLOSSARY = (
    ("KL divergence", "how far the model's predictions of the next token are from the original's, "
     "in nats, averaged over tokens; 0 is the same model. The best single figure here."),
    ("p99", "the divergence that one token in a hundred exceeds: an average hides rare failures."),
    ("perplexity", "how surprised the model is by the text. Its standard error is mostly that of "
     "the text itself, which the ratio to the original's perplexity does not have."),
    ("same top token", "how often model and original find the same token likeliest."),
    ("perplexity by llama.cpp's rule", "of the second half of each window only, as llama.cpp "
     "counts it; lower than over whole windows."),
    ("flips", "how often exactly one of the two predicts the right token."),
    ("acc, acc_norm", "how often the likeliest choice is right, and the one that is likeliest per "
     "character of its text."),
    ("exact_match", "how often greedy decoding gives an accepted answer."),
    ("won, lost, p", "samples that only the model, only the original gets right; how likely so "
     "uneven a split is where both are equally good (McNemar). Below 0.05 is worth a look."),
    ("noise floor", "the divergence of the original from itself in another dtype: less than that "
     "cannot be told from rounding in the arithmetic."),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A value, and what stands in small letters below it."""

    text: str
    below: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the table of models; it is left out where no model has a value for it."""

    name: str
    below: str
    of: Callable[[Row, Facts], Cell]
    known: Callable[[Row], object]


@dataclass(frozen=True)
class Table:
    """A heading for each column, and lines whose first value names them."""

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def _size(row: Row, facts: Facts) -> Cell:
    whole = facts.reference_bytes
    part = percent(row.n_bytes / whole) if row.n_bytes and whole else ""
    return Cell(size(row.n_bytes), part)


def _kld(row: Row, facts: Facts) -> Cell:
    del facts
    return Cell(with_error(row.kld), "" if row.kld_median is None else plain(row.kld_median))


def _tail(row: Row, facts: Facts) -> Cell:
    del facts
    return Cell(with_error(row.kld_p99), "" if row.kld_p999 is None else plain(row.kld_p999))


def _top1(row: Row, facts: Facts) -> Cell:
    del facts
    return Cell(percent_with_error(row.top1))


def _flips(row: Row, facts: Facts) -> Cell:
    del facts
    return Cell(percent_with_error(row.flips))


def _ppl(row: Row, facts: Facts) -> Cell:
    del facts
    return Cell(with_error(row.ppl), _times(row.ppl_ratio))


def _times(ratio: Figure | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio.value:.4f} x" if ratio.error is None else f"{with_error(ratio)} x"


def _gates(row: Row, facts: Facts) -> Cell:
    del facts
    if not row.gates:
        return Cell("none")
    failed = failed_gates(row)
    return Cell(f"FAILS {failed}" if failed else "passes")


def failed_gates(row: Row) -> str:
    """Return the gates that a model fails."""
    return ", ".join(gate.expression for gate in row.gates if not gate.passed)


COLUMNS = (
    Column("size", "of the original", _size, lambda row: row.n_bytes),
    Column("KL divergence", "median", _kld, lambda row: row.kld),
    Column("KL p99", "p99.9", _tail, lambda row: row.kld_p99),
    Column("same top token", "", _top1, lambda row: row.top1),
    Column("flips", "", _flips, lambda row: row.flips),
    Column("perplexity", "to the original's", _ppl, lambda row: row.ppl),
)


GATES = Column("gates", "", _gates, lambda row: row.gates)


def columns_of(facts: Facts, *more: Column) -> list[Column]:
    """Return the columns for which some model has a value."""
    return [column for column in (*more, *COLUMNS) if any(map(column.known, facts.rows))]


def cells_of(row: Row, facts: Facts, columns: Sequence[Column]) -> list[Cell]:
    """Return a model's line."""
    return [column.of(row, facts) for column in columns]


def kind_of(row: Row) -> str:
    """Return a model's format and bits per weight."""
    bits = "" if row.bits is None else f"{row.bits:.2f} bits"
    if bits and row.bits_of_linears:
        bits += " in linears"
    return ", ".join(filter(None, [row.format, bits]))


def gates_table(facts: Facts) -> Table | None:
    """Return every gate with what was measured."""
    lines = tuple(
        (
            f"{row.label}: {gate.expression}",
            shown_gate_value(gate),
            "passes" if gate.passed else "fails",
        )
        for row in facts.rows
        for gate in row.gates
    )
    return Table(("gate", "measured", "verdict"), lines) if lines else None


def more_table(facts: Facts) -> Table:
    """Return the full name of every model, and the figures that few people ask for."""
    lines = tuple(
        (f"{row.number}. {row.name}", with_error(row.ppl_llama_cpp), seconds(row.seconds))
        for row in facts.rows
    )
    return Table(("model", "perplexity by llama.cpp's rule", "time"), lines)


def positions_table(facts: Facts) -> Table | None:
    """Return loss by place in the window for the models whose curves are drawn."""
    rows = curves_shown(facts.rows)
    if not rows:
        return None
    spans = sorted({(b.start, b.stop) for row in rows for b in row.positions})
    lines = []
    for span in spans:
        found = [next((b for b in r.positions if (b.start, b.stop) == span), None) for r in rows]
        reference = next((b.reference_loss for b in found if b and b.reference_loss), None)
        values = [with_error(b.kld) if b else with_error(None) for b in found]
        lines.append((f"{span[0]} to {span[1]}", plain(reference), *values))
    return Table(("tokens", "original's loss", *(f"{row.label}: KL" for row in rows)), tuple(lines))


def domains_table(facts: Facts) -> Table | None:
    """Return what each model lost on each kind of text."""
    rows = [row for row in facts.rows if row.domains]
    kinds = list(dict.fromkeys(d.name for row in rows for d in row.domains))
    if not kinds:
        return None
    lines = []
    for row in rows:
        for domain in row.domains:
            ratio = (
                domain.ppl / domain.ppl_reference if domain.ppl and domain.ppl_reference else None
            )
            shown = "" if ratio is None else f" ({ratio:.3f} x)"
            values = (with_error(domain.kld), percent(domain.top1), f"{plain(domain.ppl)}{shown}")
            lines.append((f"{row.label}, {domain.name}", *values))
    return Table(("model, text", "KL divergence", "same top token", "perplexity"), tuple(lines))


def tasks_table(facts: Facts) -> Table | None:
    """Return every model's score in every task, beside the original's."""
    found = [(row, figure) for row in facts.rows for figure in row.tasks]
    if not found:
        return None
    compared = any(figure.difference for _, figure in found)
    titles = ("original's", "difference", "won, lost", "p") if compared else ()
    order = {task: n for n, task in enumerate(dict.fromkeys(f.task for _, f in found))}
    lines = []
    for row, figure in sorted(found, key=lambda pair: order[pair[1].task]):
        name = f"{figure.task}, {figure.metric}: {row.label}"
        beside = _beside_original(figure) if compared else ()
        lines.append((name, _score(figure.score), *beside, plain_count(figure.samples)))
    return Table(("task, metric: model", "score", *titles, "samples"), tuple(lines))


def _beside_original(figure: TaskFigure) -> tuple[str, ...]:
    difference = figure.difference
    split = "" if figure.won is None else f"{figure.won}, {figure.lost}"
    return (
        percent(figure.reference) if _is_part(figure.reference) else plain(figure.reference),
        percent_with_error(difference) if _is_part(figure.score.value) else plain_of(difference),
        split,
        "" if figure.p_value is None else plain(figure.p_value, 2),
    )


def _score(figure: Figure) -> str:
    return percent_with_error(figure) if _is_part(figure.value) else with_error(figure)


def _is_part(value: float | None) -> bool:
    return value is not None and 0 <= value <= 1


def plain_of(figure: Figure | None) -> str:
    """Return a figure without its error."""
    return plain(None if figure is None else figure.value)


def plain_count(count: int | None) -> str:
    """Return a number of things, nothing where it is not known."""
    return "" if count is None else str(count)


def layers_table(facts: Facts) -> Table | None:
    """Return the linears with the largest errors of each model that has a report beside it."""
    lines = tuple(
        (f"{row.label}: {layer.name}", plain(layer.error), plain(layer.bits))
        for row in facts.rows
        for layer in worst_layers(row)
    )
    return (
        Table(("the largest errors", "relative error", "bits per weight"), lines) if lines else None
    )
