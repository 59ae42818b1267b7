"""The plots of a report: what was lost against size, by place in the window, by kind of text.

Each takes the width it will have, because text that shrinks with its picture cannot be read on a
telephone: the page carries a wide and a narrow drawing and shows one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from qtool.evaluation.report_facts import Facts, Figure, Row
from qtool.evaluation.report_numbers import place, size, tick, with_error
from qtool.evaluation.report_svg import (
    FONT,
    GAP,
    NOTE,
    Axis,
    Box,
    Drawing,
    axis_for,
    beside_line,
    fitted,
    grid,
    place_labels,
    spread_out,
    text_width,
)
from qtool.recipe.sizes import shown_size

WIDE, NARROW = 880, 358
MOST_CURVES = 8
NINETY_FIVE = 1.96  # standard errors to each side of a mean
RADIUS = 5  # pixels of a marker
SHAPES = ("circle", "square", "diamond", "triangle")
CAP = "note limit-name"
LOSS = "KL divergence (nats per token)"


def loss_against_size(facts: Facts, width: int) -> Drawing | None:
    """Draw each model's KL divergence over its size; None with fewer than two to compare."""
    rows = [row for row in facts.rows if row.n_bytes and row.kld]
    if len(rows) < 2:
        return None
    narrow = width < 600
    drawing = Drawing(width, 340 if narrow else 430, _summary(rows))
    sizes = [float(row.n_bytes or 0) for row in rows]
    x = axis_for(
        sizes, 62, width - 14, logarithmic=max(sizes) > 6 * min(sizes), margin=_margin(narrow)
    )
    y = _loss_axis([row.kld for row in rows], facts.noise, drawing.height - 50, 14)
    grid(drawing, x, y, names=("size", LOSS))
    for value in x.ticks(4 if narrow else 7):
        drawing.line(x.at(value), y.start, x.at(value), y.start + 4, "axis")
        half = text_width(shown_size(value)) / 2
        middle = min(x.at(value), width - half)
        drawing.text(middle, y.start + 18, shown_size(value), "tick", "middle")
    levels = _levels(facts, y)
    taken = _size_gates(drawing, facts, x, y, [level.height for level in levels])
    taken += _horizontals(drawing, levels, x, taken)
    frontier = [
        (x.at(float(row.n_bytes or 0)), _height(y, row.kld)) for row in rows if row.frontier
    ]
    stairs = [*_stairs(frontier), (x.end, frontier[-1][1])]
    drawing.path(stairs, "frontier")
    taken += [_around(start, end) for start, end in pairwise(stairs)]
    points = []
    for row in rows:
        points.append(_point(drawing, row, x, y))
        taken += _clearances(points[-1], row.kld, y)
    names = [str(row.number) if narrow else row.label for row in rows]
    _label(drawing, rows, points, names, taken, Box(x.start + 2, y.end, x.end, y.start - 2))
    return drawing


def _summary(rows: Sequence[Row]) -> str:
    ordered = "; ".join(
        f"{row.label} {size(row.n_bytes)} {with_error(row.kld)}" for row in rows[:12]
    )
    return f"KL divergence against size, smallest first: {ordered}"


def _margin(narrow: bool) -> float:
    return 0.1 if narrow else 0.12


def _loss_axis(
    figures: Sequence[Figure | None], noise: Figure | None, start: float, end: float
) -> Axis:
    """Return a logarithmic axis; losses of exactly nothing will lie on its lower end."""
    found = [figure.value for figure in (*figures, noise) if figure and figure.value > 0]
    return axis_for(found or [1e-3, 1.0], start, end, logarithmic=True)


def _height(y: Axis, figure: Figure | None) -> float:
    """Return the pixel of a loss on a logarithmic axis, where nothing has no place of its own."""
    value = 0.0 if figure is None else figure.value
    return y.at(value) if value > 0 else y.start


def _bar(y: Axis, figure: Figure) -> tuple[float, float] | None:
    """Return both ends of an error bar in pixels."""
    if figure.error is None or figure.value <= 0:
        return None
    reach = NINETY_FIVE * figure.error
    return y.at(max(figure.value - reach, y.low)), y.at(figure.value + reach)


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the border of what no model reaches: across to the next size, then down."""
    found = list(points[:1])
    for (_, above), (right, below) in pairwise(points):
        found += [(right, above), (right, below)]
    return found


@dataclass(frozen=True)
class Level:
    """A level line at a pixel, its names from long to short, and the class of its colour."""

    height: float
    names: tuple[str, ...]
    kind: str


def _levels(facts: Facts, y: Axis) -> list[Level]:
    """Return the noise floor and the limits of gates on KL divergence, from above."""
    found = []
    if facts.noise and facts.noise.value > 0:
        dtype = facts.noise_dtype or "another dtype"
        both = (f"noise floor: the original in {dtype}", f"noise floor: {dtype}")
        found.append(Level(y.at(facts.noise.value), both, "noise"))
    gates = {g.limit: g.expression for row in facts.rows for g in row.gates if g.metric == "kld"}
    for limit, expression in gates.items():
        if limit is not None and y.low < limit < y.high:
            found.append(Level(y.at(limit), (f"gate: {expression}",), "limit"))
    return sorted(found, key=lambda level: level.height)


def _horizontals(
    drawing: Drawing, levels: Sequence[Level], x: Axis, taken: Sequence[Box]
) -> list[Box]:
    """Draw level lines with their names; return what they cover."""
    lines = [Box(x.start, level.height - 1, x.end, level.height + 1) for level in levels]
    labels: list[Box] = []
    for level in levels:
        drawing.line(x.start, level.height, x.end, level.height, level.kind)
        name, label = beside_line(level.names, level.height, x, [*taken, *labels], lines)
        kind = f"note {level.kind}-name"
        drawing.text(label.held, label.box.bottom - GAP, name, kind, label.anchor)
        labels.append(label.box)
    return [*lines, *labels]


def _size_gates(
    drawing: Drawing, facts: Facts, x: Axis, y: Axis, levels: Sequence[float]
) -> list[Box]:
    """Draw the limits of gates on size, named where no level line is; return what they cover."""
    crowded = any(height > y.start - 40 for height in levels)
    base = y.end + NOTE if crowded else y.start - 8
    gates = {g.limit: g.expression for row in facts.rows for g in row.gates if g.metric == "size"}
    taken = []
    for limit, expression in gates.items():
        if limit is not None and x.low < limit < x.high:
            across, name = x.at(limit), f"gate: {expression}"
            drawing.line(across, y.start, across, y.end, "limit")
            room = text_width(name) + 8
            left = across if across + room < x.end else across - room
            side = "start" if left == across else "end"
            drawing.text(across + (5 if side == "start" else -5), base, name, CAP, side)
            taken += [
                Box(across - 1, y.end, across + 1, y.start),
                Box(left, base - 14, left + room, base + 8),
            ]
    return taken


def _around(start: tuple[float, float], end: tuple[float, float]) -> Box:
    """Return what a line along an axis covers."""
    (x1, y1), (x2, y2) = start, end
    return Box(min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1)


def _point(drawing: Drawing, row: Row, x: Axis, y: Axis) -> tuple[float, float]:
    across, height = x.at(float(row.n_bytes or 0)), _height(y, row.kld)
    kind = "best" if row.frontier else "other"
    ends = _bar(y, row.kld) if row.kld else None
    shape = "cross" if row.passed is False else "circle"
    if ends is not None:
        if shape == "circle":
            drawing.line(across, ends[0], across, ends[1], f"bar {kind}-bar")
        for end in ends:
            _bar_end(drawing, (across, height), end, f"bar {kind}-bar", through=shape == "cross")
    if row.kld and row.kld.value <= 0:
        shape = "down"
    title = f"{row.number}. {row.label}: {size(row.n_bytes)}, KL {with_error(row.kld)}"
    drawing.marker(across, height, shape, f"point {kind} {shape}", title)
    return across, height


def _bar_end(
    drawing: Drawing, point: tuple[float, float], end: float, kind: str, *, through: bool
) -> None:
    """Draw an end of an error bar; beside a marker that one sees through, only what leaves it."""
    across, height = point
    reach = abs(end - height)
    if through and reach > RADIUS:
        edge = height + math.copysign(RADIUS, end - height)
        drawing.line(across, edge, across, end, kind)
    if not through or reach > 2 * RADIUS:  # else it would make an hourglass of a cross
        drawing.line(across - 4, end, across + 4, end, kind)


def _clearances(point: tuple[float, float], figure: Figure | None, y: Axis) -> list[Box]:
    """Return what a marker and its error bar cover."""
    across, height = point
    boxes = [Box(across - 7, height - 7, across + 7, height + 7)]
    ends = None if figure is None else _bar(y, figure)
    if ends is not None:
        boxes.append(Box(across - 5, ends[1] - 1, across + 5, ends[0] + 1))
    return boxes


def _label(
    drawing: Drawing,
    rows: Sequence[Row],
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    taken: Sequence[Box],
    bounds: Box,
) -> None:
    """Write names beside points; where a name has no place, the number of its row."""
    order = sorted(range(len(rows)), key=lambda index: not rows[index].frontier)
    widths = [text_width(names[i], bold=rows[i].frontier) for i in order]
    labels = place_labels([points[i] for i in order], widths, taken, bounds)
    filled = [*taken, *(label.box for label in labels if label)]
    for index, found in zip(order, labels, strict=True):
        row = rows[index]
        name = names[index] if found else str(row.number)
        label = found or place_labels([points[index]], [text_width(name)], filled, bounds)[0]
        if label is None:
            continue  # its marker names it when the pointer rests there, and so does the table
        filled.append(label.box)
        x, y = points[index]
        if label.led:
            nearest = min(max(x, label.box.left), label.box.right)
            side = label.box.bottom if label.box.bottom < y else label.box.top
            middle = (label.box.top + label.box.bottom) / 2
            end = (nearest, side) if abs(y - middle) > FONT else (nearest, middle)
            drawing.line(x, y, *end, "leader")
        kind = "best-name" if row.frontier else "other-name"
        drawing.text(label.held, label.box.bottom - GAP, name, kind, label.anchor)


def curves_shown(rows: Sequence[Row]) -> list[Row]:
    """Return the models whose curves are drawn: a few, those on the frontier before others."""
    able = [row for row in rows if sum(bucket.kld is not None for bucket in row.positions) > 1]
    chosen = sorted(able, key=lambda row: (not row.frontier, row.number))[:MOST_CURVES]
    return sorted(chosen, key=lambda row: row.number)


def loss_by_position(facts: Facts, width: int) -> Drawing | None:
    """Draw KL divergence by place in the window; None where there are no two places."""
    rows = curves_shown(facts.rows)
    if not rows:
        return None
    narrow = width < 600
    spans = sorted({(b.start, b.stop) for row in rows for b in row.positions})
    places = {span: index for index, span in enumerate(spans)}
    names = [str(row.number) if narrow else row.label for row in rows]
    room = max(text_width(name) for name in names) + 18
    drawing = Drawing(width, 300 if narrow else 340, _curve_summary(rows))
    x = Axis(-0.3, len(spans) - 0.7, 62, width - room)
    y = _loss_axis([b.kld for row in rows for b in row.positions], None, drawing.height - 50, 14)
    grid(drawing, x, y, names=("tokens up to this place in the window", LOSS))
    step = math.ceil(len(spans) / (5 if narrow else 12))
    for (_, stop), index in places.items():
        if (len(spans) - 1 - index) % step == 0:
            drawing.text(x.at(index), y.start + 18, place(stop), "tick", "middle")
    ends = [_curve(drawing, row, places, x, y, color) for color, row in enumerate(rows)]
    heights = spread_out([height for _, height in ends], FONT + 3, y.end + 6, y.start - 4)
    for color, (name, height, end) in enumerate(zip(names, heights, ends, strict=True)):
        drawing.line(end[0] + 6, end[1], x.end + 10, height, "leader")
        drawing.text(x.end + 13, height + 4, name, f"t{color}")
    return drawing


def _curve_summary(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        known = [bucket for bucket in row.positions if bucket.kld]
        first, last = known[0], known[-1]
        parts.append(
            f"{row.label} from {with_error(first.kld)} up to token {first.stop} "
            f"to {with_error(last.kld)} up to token {last.stop}"
        )
    return f"KL divergence by place in the window: {'; '.join(parts)}"


def _curve(
    drawing: Drawing,
    row: Row,
    places: dict[tuple[int, int], int],
    x: Axis,
    y: Axis,
    color: int,
) -> tuple[float, float]:
    """Draw one model's curve with its errors as a band; return its last point."""
    known = [(x.at(places[b.start, b.stop]), b.kld, b) for b in row.positions if b.kld]
    bars = [(across, _bar(y, figure)) for across, figure, _ in known]
    banded = [(across, ends) for across, ends in bars if ends is not None]
    if len(banded) > 1:
        below = [(across, ends[0]) for across, ends in banded]
        above = [(across, ends[1]) for across, ends in reversed(banded)]
        drawing.path([*below, *above], f"band f{color}", close=True)
    points = [(across, _height(y, figure)) for across, figure, _ in known]
    drawing.path(points, f"curve s{color}")
    for (across, height), (_, figure, bucket) in zip(points, known, strict=True):
        title = f"{row.label}, tokens {bucket.start} to {bucket.stop}: KL {with_error(figure)}"
        drawing.marker(across, height, SHAPES[color % len(SHAPES)], f"dot f{color}", title)
    return points[-1]


def loss_by_domain(facts: Facts, width: int) -> Drawing | None:
    """Draw one panel for each kind of text, all with one scale; None with fewer than two kinds."""
    rows = [row for row in facts.rows if any(domain.kld for domain in row.domains)]
    kinds = list(dict.fromkeys(d.name for row in rows for d in row.domains if d.kld))
    if len(kinds) < 2:
        return None
    narrow = width < 600
    names = [row.label if not narrow else f"{row.number}. {row.label}" for row in rows]
    room = min(max(text_width(name) for name in names) + 12, 0.5 * width)
    across = 1 if narrow else min(len(kinds), 4)
    panel_width = (width - room - 10) / across
    row_height, top = 19.0, 26.0
    panel_height = top + row_height * len(rows) + 30
    lines = math.ceil(len(kinds) / across)
    drawing = Drawing(width, panel_height * lines + 26, _domain_summary(rows, kinds))
    measured = [domain.kld for row in rows for domain in row.domains]
    for index, kind in enumerate(kinds):
        left = room + panel_width * (index % across)
        above = panel_height * (index // across)
        axis = _loss_axis(measured, None, left + 8, left + panel_width - 14)
        heights = [above + top + row_height * (place + 0.5) for place in range(len(rows))]
        if index % across == 0:
            for name, height in zip(names, heights, strict=True):
                drawing.text(room - 4, height + 4, name, "row-name", "end")
        bottom = above + panel_height - 30
        drawing.text(left + 8, above + 15, fitted(kind, panel_width - 20, bold=True), "panel")
        for value in axis.ticks(4 if panel_width < 240 else 6):
            drawing.line(axis.at(value), above + top, axis.at(value), bottom, "grid")
            drawing.text(axis.at(value), bottom + 16, tick(value), "tick", "middle")
        for row, height in zip(rows, heights, strict=True):
            _domain_dot(drawing, row, kind, axis, height)
    drawing.text(room + (width - room) / 2, drawing.height - 6, LOSS, "name", "middle")
    return drawing


def _domain_summary(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    worst = []
    for row in rows[:12]:
        found = max((d for d in row.domains if d.kld), key=lambda d: d.kld.value if d.kld else 0)
        worst.append(f"{row.label} loses most on {found.name}, {with_error(found.kld)}")
    return f"KL divergence on {', '.join(kinds)}: {'; '.join(worst)}"


def _domain_dot(drawing: Drawing, row: Row, kind: str, axis: Axis, height: float) -> None:
    drawing.line(axis.start, height, axis.end, height, "rail")
    figure = next((domain.kld for domain in row.domains if domain.name == kind), None)
    if figure is None:
        return
    look = "best" if row.frontier else "other"
    ends = _bar(axis, figure)
    if ends is not None:
        drawing.line(ends[0], height, ends[1], height, f"bar {look}-bar")
    across = axis.at(figure.value) if figure.value > 0 else axis.start
    title = f"{row.label} on {kind}: KL {with_error(figure)}"
    drawing.marker(across, height, "circle", f"point {look} circle", title)
