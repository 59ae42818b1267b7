"""REPORT.md: the report for a repository, a pull request or a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qtool import __version__
from qtool.evaluation.report_facts import Facts
from qtool.evaluation.report_page import PLOTS, TASKS_CAPTION, subtitle_of, title_of
from qtool.evaluation.report_tables import (
    GATES,
    Cell,
    Table,
    cells_of,
    columns_of,
    gates_table,
    kind_of,
    more_table,
    tasks_table,
)
from qtool.evaluation.report_words import alerts, measured, verdict

_SPECIAL = re.compile(r"([\\`*_{}\[\]#+!|~$^-])")


def markdown(facts: Facts, plots: Sequence[str]) -> str:
    """Return the report as Markdown; `plots` are the files that were drawn beside it."""
    said = verdict(facts)
    lines = [f"# {literal(title_of(facts))}", "", literal(subtitle_of(facts)), ""]
    lines += [f"**{literal(said.headline)}**", ""]
    for line in said.lines:
        lines += [literal(line), ""]
    for alert in alerts(facts):
        lines += [
            f"> **Not the original's tokens: {literal(alert.model)}**: "
            f"{literal('; '.join(alert.lines))}",
            "",
        ]
    lines += [f"> {literal(note)}\n" for note in facts.warnings]
    if facts.rows:
        lines += [*_models(facts), "", "± is one standard error, over windows of text.", ""]
    gates = gates_table(facts)
    if gates is not None:
        lines += ["## Gates", "", *_table(gates), ""]
    tasks = tasks_table(facts)
    if tasks is not None:
        lines += ["## Tasks", "", *_table(tasks), "", TASKS_CAPTION, ""]
    for plot in PLOTS:
        if plot.file not in plots:
            continue
        lines += [f"## {plot.heading}", "", f"![{plot.heading}]({plot.file})", "", plot.caption, ""]
        table = plot.table(facts)
        if table is not None:
            lines += [*_table(table), ""]
    lines += ["## How it was measured", "", "| | |", "|---|---|"]
    lines += [f"| {literal(name)} | {literal(value)} |" for name, value in measured(facts)]
    if facts.rows:
        lines += ["", *_table(more_table(facts))]
    return "\n".join([*lines, "", f"Made by qtool {__version__} from `report.json`.", ""])


def literal(text: str) -> str:
    """Return text so that Markdown shows it as it is: no markup, no HTML, no link."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", escaped).replace("://", "&#58;//")


def _models(facts: Facts) -> list[str]:
    columns = columns_of(facts, GATES)
    names = [f"{c.name} ({c.below})" if c.below else c.name for c in columns]
    table = Table(
        ("model", "format", *names),
        tuple(
            (
                f"{row.number}. {row.label}",
                kind_of(row),
                *(_flat(cell) for cell in cells_of(row, facts, columns)),
            )
            for row in facts.rows
        ),
    )
    return _table(table)


def _flat(cell: Cell) -> str:
    return f"{cell.text} ({cell.below})" if cell.below else cell.text


def _table(table: Table) -> list[str]:
    marks = ["---", *("---:" for _ in table.head[1:])]
    return [
        f"| {' | '.join(literal(name) for name in table.head)} |",
        f"|{'|'.join(marks)}|",
        *(f"| {' | '.join(literal(value) for value in line)} |" for line in table.lines),
    ]
