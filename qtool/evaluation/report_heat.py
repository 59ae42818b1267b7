"""The heat map of a report: the error that rounding made in every linear of every block."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from qtool.evaluation.report_facts import Facts, Layer, Row
from qtool.evaluation.report_numbers import plain
from qtool.evaluation.report_svg import FONT, Box, Drawing, text_width

MOST_MAPS = 6
MOST_BLOCKS = 256
MOST_LINEARS = 24
STEPS = 9
_BLOCK = re.compile(r"(?:^|\.)(\d{1,6})\.(.+)$")


@dataclass(frozen=True)
class HeatMap:
    """Errors by block and linear; where there are many experts, the worst of them."""

    row: Row
    blocks: tuple[int, ...]
    linears: tuple[str, ...]
    errors: dict[tuple[int, str], float]

    @property
    def typical(self) -> float:
        """The median error."""
        return median(self.errors.values())


def heat_map(row: Row) -> HeatMap | None:
    """Arrange a model's layers by block; None where no name has a block's number in it."""
    errors: dict[tuple[int, str], float] = {}
    for layer in row.layers:
        match = _BLOCK.search(layer.name.removesuffix(".weight"))
        if match is not None:
            key = (int(match[1]), re.sub(r"\.\d+(?=\.)", ".*", match[2]))
            errors[key] = max(layer.error, errors.get(key, 0.0))
    linears = tuple(dict.fromkeys(linear for _, linear in errors))[:MOST_LINEARS]
    blocks = tuple(sorted({block for block, _ in errors})[:MOST_BLOCKS])
    return HeatMap(row, blocks, linears, errors) if blocks else None


def heat_maps(facts: Facts) -> list[HeatMap]:
    """Return the maps that are drawn, those of models on the frontier before others."""
    rows = sorted(facts.rows, key=lambda row: (not row.frontier, row.number))
    found = [made for row in rows if (made := heat_map(row)) is not None][:MOST_MAPS]
    return sorted(found, key=lambda made: made.row.number)


def worst_layers(row: Row, count: int = 3) -> list[Layer]:
    """Return the linears with the largest errors."""
    return sorted(row.layers, key=lambda layer: -layer.error)[:count]


def shade(error: float, typical: float) -> int:
    """Return the step of an error: the middle one at `typical`, and two steps for each doubling.

    Of one model's errors, because what matters is which of its linears stand out: from 8 to 3 bits
    all errors grow a hundredfold, and on one scale for all models none would differ visibly.
    """
    if error <= 0 or typical <= 0:
        return 0 if error <= 0 else STEPS - 1
    step = STEPS // 2 + round(2 * math.log2(error / typical))
    return min(max(step, 0), STEPS - 1)


def error_heat(maps: Sequence[HeatMap], width: int) -> Drawing | None:
    """Draw the maps below each other: blocks to the right, or downwards where it is narrow."""
    if not maps:
        return None
    narrow = width < 600
    drawing = Drawing(width, 0, _summary(maps))
    height = _legend(drawing, width)
    for made in maps:
        title = f"{made.row.number}. {made.row.label}"
        drawing.text(0, height + 14, title, "panel")
        room = text_width(title, bold=True) + 12
        drawing.text(room, height + 14, f"median {plain(made.typical)}", "tick")
        draw = _downwards if narrow else _to_the_right
        height = draw(drawing, made, height + 22) + 12
    drawing.height = height
    return drawing


def _summary(maps: Sequence[HeatMap]) -> str:
    worst = []
    for made in maps:
        (block, linear), error = max(made.errors.items(), key=lambda item: item[1])
        worst.append(f"{made.row.label} at most {plain(error)} in block {block}, {linear}")
    return f"Relative error of every linear by block: {'; '.join(worst)}"


def _legend(drawing: Drawing, width: float) -> float:
    side = min(40.0, (width - 20) / STEPS)
    drawing.text(0, 13, "relative error, compared with the model's own median", "name")
    names = ("1/4 x", "1/2 x", "median", "2 x", "4 x")
    for step in range(STEPS):
        box = Box(side * step, 20, side * (step + 1), 32)
        drawing.box(box, f"heat h{step}")
        if step % 2 == 0:
            anchor = {0: "start", STEPS - 1: "end"}.get(step, "middle")
            x = {"start": box.left, "end": box.right}.get(anchor, (box.left + box.right) / 2)
            drawing.text(x, 46, names[step // 2], "tick", anchor)
    return 58.0


def _cell(drawing: Drawing, made: HeatMap, key: tuple[int, str], box: Box) -> None:
    error = made.errors.get(key)
    if error is not None:
        title = f"block {key[0]}, {key[1]}: {plain(error)}"
        drawing.box(box, f"heat h{shade(error, made.typical)}", title)


def _to_the_right(drawing: Drawing, made: HeatMap, top: float) -> float:
    room = max(text_width(linear) for linear in made.linears) + 8
    room = min(room, drawing.width / 3)
    side = min(24.0, (drawing.width - room) / len(made.blocks))
    tall = 15.0
    for down, linear in enumerate(made.linears):
        above = top + tall * down
        drawing.text(room - 6, above + 12, linear, "row-name", "end")
        for across, block in enumerate(made.blocks):
            left = room + side * across
            _cell(drawing, made, (block, linear), Box(left, above, left + side, above + tall))
    bottom = top + tall * len(made.linears)
    step = max(1, math.ceil(26 / side))
    for across, block in enumerate(made.blocks):
        if across % step == 0:
            drawing.text(room + side * (across + 0.5), bottom + 15, str(block), "tick", "middle")
    drawing.text(room - 6, bottom + 15, "block", "tick", "end")
    return bottom + 20


def _downwards(drawing: Drawing, made: HeatMap, top: float) -> float:
    room = 34.0
    side = (drawing.width - room) / len(made.linears)
    tall = 10.0
    short = [linear.rpartition(".")[2] for linear in made.linears]
    # Names stand on end where columns are narrower than they are.
    upright = max(text_width(name) for name in short) > side - 4
    head = max(text_width(name) for name in short) + 10 if upright else FONT + 6
    for across, name in enumerate(short):
        middle = room + side * (across + 0.5)
        if upright:
            drawing.upright(middle + 4, top + head - 7, name, "row-name", "start")
        else:
            drawing.text(middle, top + FONT, name, "row-name", "middle")
    step = max(1, math.ceil(16 / tall))
    for down, block in enumerate(made.blocks):
        above = top + head + tall * down
        if down % step == 0:
            drawing.text(room - 6, above + 9, str(block), "tick", "end")
        for across, linear in enumerate(made.linears):
            left = room + side * across
            _cell(drawing, made, (block, linear), Box(left, above, left + side, above + tall))
    return top + head + tall * len(made.blocks) + 6
