"""The page of a report: one HTML file that opens from disk and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import __version__
from qtool.evaluation.report_facts import Facts
from qtool.evaluation.report_heat import error_heat, heat_maps
from qtool.evaluation.report_plots import (
    MOST_CURVES,
    NARROW,
    WIDE,
    loss_against_size,
    loss_by_domain,
    loss_by_position,
)
from qtool.evaluation.report_png import can_draw, plain_style, png
from qtool.evaluation.report_svg import Drawing
from qtool.evaluation.report_tables import (
    GLOSSARY,
    Table,
    cells_of,
    columns_of,
    domains_table,
    failed_gates,
    gates_table,
    kind_of,
    layers_table,
    more_table,
    positions_table,
    tasks_table,
)
from qtool.evaluation.report_words import alerts, measured, verdict

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).parent
TASKS_CAPTION = (
    "± is one standard error, over samples; that of a difference counts samples in pairs, since "
    "model and original answer the same questions."
)


def _no_table(facts: Facts) -> None:
    del facts


def _heat(facts: Facts, width: int) -> Drawing | None:
    return error_heat(heat_maps(facts), width)


@dataclass(frozen=True)
class Plot:
    """A plot, the file it is also written to, and the table of its figures."""

    file: str
    heading: str
    caption: str
    draw: Callable[[Facts, int], Drawing | None]
    table: Callable[[Facts], Table | None] = _no_table


PLOTS = (
    Plot(
        "kl-against-size.svg",
        "Loss against size",
        "Filled and joined: no other model is both smaller and nearer to the original. A cross "
        "fails a gate. Bars span 95 %. The vertical axis is logarithmic.",
        loss_against_size,
    ),
    Plot(
        "kl-by-position.svg",
        "Loss by place in the window",
        "Tokens far from the start have more context to go wrong with: a rising curve says that "
        f"long texts suffer. Bands span 95 %. At most {MOST_CURVES} models are drawn.",
        loss_by_position,
        positions_table,
    ),
    Plot(
        "kl-by-domain.svg",
        "Loss by kind of text",
        "All panels have one logarithmic scale. Bars span 95 %.",
        loss_by_domain,
        domains_table,
    ),
    Plot(
        "error-by-layer.svg",
        "Error by layer",
        "What rounding changed in the output of each linear on the calibration text, or in its "
        "weights where there was none: medians of the two kinds do not compare. The strongest "
        "colours are the linears to give more bits first. From the report that quantize left "
        "beside the model.",
        _heat,
        layers_table,
    ),
)


def plot_style() -> str:
    """Return the colours and lines of the drawings."""
    return (HERE / "report_plot.css").read_text(encoding="utf-8")


def plot_files(facts: Facts) -> dict[str, str]:
    """Return file name -> SVG of every plot for which there are figures."""
    return _plots(facts, plot_style())


def plot_images(facts: Facts) -> dict[str, bytes]:
    """Return file name -> PNG of every plot with figures; nothing without the extra."""
    if not can_draw():
        return {}
    plain = _plots(facts, plain_style(plot_style()))
    return {image_of(name): png(svg) for name, svg in plain.items()}


def image_of(plot: str) -> str:
    """Return the name of the PNG file of a plot."""
    return f"{plot.removesuffix('.svg')}.png"


def _plots(facts: Facts, style: str) -> dict[str, str]:
    found = {}
    for plot in PLOTS:
        drawing = plot.draw(facts, WIDE)
        if drawing is not None:
            about = f": {short_name(facts.reference)}" if facts.reference else ""
            measured = "" if plot.draw is _heat else f"{subtitle_of(facts)}. "
            heading = f"{plot.heading}{about}"
            found[plot.file] = drawing.svg_file(style, heading, measured + plot.caption)
    return found


def title_of(facts: Facts) -> str:
    """Return what the report is about."""
    if facts.reference:
        return f"What quantization cost: {short_name(facts.reference)}"
    about = "Perplexity" if any(row.ppl for row in facts.rows) else "Tasks"
    return f"{about} of " + (facts.rows[0].label if len(facts.rows) == 1 else "models")


def short_name(name: str) -> str:
    """Return the last two parts of a hub id, and the last of a path."""
    parts = [part for part in name.split("/") if part]
    return name if name.count("/") == 1 and parts and name[0] not in "./" else (parts or [name])[-1]


def subtitle_of(facts: Facts) -> str:
    """Return one line on how much was measured."""
    models = "1 model" if len(facts.rows) == 1 else f"{len(facts.rows)} models"
    tokens = next((row.ppl.tokens for row in facts.rows if row.ppl and row.ppl.tokens), None)
    text = f" on {tokens} tokens of {facts.data.get('name', 'text')}" if tokens else ""
    left = f"; {facts.left_out} more are in report.json only" if facts.left_out else ""
    return f"{models}{text}{left}"


def page(facts: Facts, images: Collection[str]) -> str:
    """Return the whole page; `images` are the PNG files beside it."""
    from markupsafe import Markup

    columns = columns_of(facts)
    plots: list[dict[str, Any]] = []
    for plot in PLOTS:
        wide, narrow = plot.draw(facts, WIDE), plot.draw(facts, NARROW)
        if wide is not None and narrow is not None:
            # Every text in a drawing was escaped where it was written.
            drawn = {"wide": Markup(wide.svg()), "narrow": Markup(narrow.svg())}  # noqa: S704
            words = {"heading": plot.heading, "caption": plot.caption, "file": plot.file}
            image = image_of(plot.file)
            words["image"] = image if image in images else ""
            plots.append({**words, **drawn, "table": plot.table(facts)})
    style = (HERE / "report_style.css").read_text(encoding="utf-8") + plot_style()
    return _template().render(
        title=title_of(facts),
        subtitle=subtitle_of(facts),
        style=Markup(style),  # noqa: S704  our own file
        verdict=verdict(facts),
        alerts=alerts(facts),
        notes=facts.warnings,
        compared=facts.compared,
        columns=columns,
        cells=[(row, cells_of(row, facts, columns)) for row in facts.rows],
        kinds={row.number: kind_of(row) for row in facts.rows},
        failed={row.number: failed_gates(row) for row in facts.rows},
        gates=gates_table(facts),
        tasks=tasks_table(facts),
        tasks_caption=TASKS_CAPTION,
        more=more_table(facts),
        plots=plots,
        measured=measured(facts),
        glossary=GLOSSARY,
        version=__version__,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((HERE / "report_page.html").read_text(encoding="utf-8"))
