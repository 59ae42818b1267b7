"""Draw in SVG: axes, text, and labels that do not lie on each other.

Colours are classes of `report_plot.css`, so that one drawing serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate

from qtool.evaluation.report_numbers import tick

FONT = 12.0  # pixels
NOTE = 11.0
HEADING = 15.0
GAP = 3.0
MARGIN = 16.0  # around a drawing in a file of its own
_SLIM, _BROAD = frozenset(" !'(),-./:;I[\\]fijlrt|⁰¹²³⁴⁵⁶⁷⁸⁹·"), frozenset("%@MWmw…")


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two share more than an edge."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        """Whether all of this box lies in the other."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value; values beyond the axis land on its end."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values on the axis."""
        found = self._decades(most) if self.logarithmic else []
        return found or self._steps(most)

    def _decades(self, most: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [digit * 10.0**power for power in powers for digit in digits]
            inside = [value for value in values if self.low <= value <= self.high]
            if 2 <= len(inside) <= most:
                return inside
        thinned = [10.0**power for power in powers if self.low <= 10.0**power <= self.high]
        return thinned[:: max(1, math.ceil(len(thinned) / most))] if len(thinned) > 1 else []

    def _steps(self, most: int) -> list[float]:
        rough = (self.high - self.low) / max(1, most - 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step) - first + 1
        return [(first + index) * step for index in range(count)]


def axis_for(
    values: Sequence[float], start: float, end: float, *, logarithmic: bool, margin: float = 0.08
) -> Axis:
    """Return an axis that holds all values with a margin on both sides."""
    if logarithmic:
        low, high = math.log10(min(values)), math.log10(max(values))
        spread = max(high - low, 0.3)
        middle = (low + high) / 2
        reach = spread * (0.5 + margin)
        return Axis(10 ** (middle - reach), 10 ** (middle + reach), start, end, logarithmic=True)
    low, high = min(values), max(values)
    spread = max(high - low, abs(high) * 0.1, 1e-12)
    middle, reach = (low + high) / 2, spread * (0.5 + margin)
    return Axis(middle - reach, middle + reach, start, end)


@dataclass
class Drawing:
    """SVG elements in the order in which they are drawn."""

    width: float
    height: float
    title: str  # what somebody who cannot see it should know
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Draw a straight line of class `kind`."""
        self.parts.append(
            f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def path(
        self, points: Sequence[tuple[float, float]], kind: str, *, close: bool = False
    ) -> None:
        """Draw a line through points, or what it encloses."""
        route = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M{route}{"Z" if close else ""}"/>')

    def box(self, box: Box, kind: str, title: str = "") -> None:
        """Draw a rectangle; `title` shows when the pointer rests on it."""
        shape = (
            f'<rect class="{kind}" x="{box.left:.1f}" y="{box.top:.1f}" '
            f'width="{box.right - box.left:.1f}" height="{box.bottom - box.top:.1f}"'
        )
        self.parts.append(
            f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"
        )

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Write text on the base line `y`."""
        attributes = f' class="{kind}"' if kind else ""
        side = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{attributes}{side}>{escape(text)}</text>')

    def upright(
        self, x: float, y: float, text: str, kind: str = "name", anchor: str = "middle"
    ) -> None:
        """Write text from below upwards."""
        self.parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
            f'transform="rotate(-90 {x:.1f} {y:.1f})">{escape(text)}</text>'
        )

    def marker(self, x: float, y: float, shape: str, kind: str, title: str = "") -> None:
        """Draw a circle, square, diamond, triangle or cross around a point."""
        inner = f"<title>{escape(title)}</title>" if title else ""
        if shape == "circle":
            self.parts.append(
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{inner}</circle>'
            )
            return
        route = {
            "square": "m-4.5-4.5h9v9h-9z",
            "diamond": "m0-6l6 6l-6 6l-6-6z",
            "triangle": "m0-6l6 10.5h-12z",
            "down": "m0 6l6-10.5h-12z",
            "cross": "m-4.5-4.5l9 9m0-9l-9 9",
        }[shape]
        self.parts.append(f'<path class="{kind}" d="M{x:.1f} {y:.1f}{route}">{inner}</path>')

    def svg(self) -> str:
        """Return the drawing to be put into a page."""
        return f"{self._start(0, 0, self.width, self.height)}>{''.join(self.parts)}</svg>"

    def svg_file(self, style: str, heading: str, words: str) -> str:
        """Return the drawing as a file of its own, which says what it shows and has a margin."""
        lines = _broken(words, self.width)
        head = HEADING + 8 + (FONT + 4) * len(lines) + 10
        left, top = -MARGIN, -MARGIN - head
        width, height = self.width + 2 * MARGIN, self.height + 2 * MARGIN + head
        size = f' width="{width:.0f}" height="{height:.0f}"'
        paper = f'<rect class="paper" x="{left:.0f}" y="{top:.0f}" width="100%" height="100%"/>'
        above = Drawing(self.width, head, "")
        shown = fitted(heading, self.width * FONT / HEADING, bold=True)
        above.text(0, HEADING - head, shown, "heading")
        for index, line in enumerate(lines):
            above.text(0, HEADING + 4 + (FONT + 4) * (index + 1) - head, line, "name")
        body = "\n".join([*above.parts, *self.parts])
        start = self._start(left, top, width, height)
        return f"{start}{size}>\n<style>{style}</style>\n{paper}\n{body}\n</svg>\n"

    def _start(self, left: float, top: float, width: float, height: float) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" '
            f'viewBox="{left:.0f} {top:.0f} {width:.0f} {height:.0f}" '
            f'aria-label="{escape(self.title)}"'
        )


def text_width(text: str, *, bold: bool = False) -> float:
    """Return about how wide a sans-serif font draws text, rather too wide than too narrow."""
    return sum(map(_letter_width, text)) * FONT * (1.13 if bold else 1)


def _letter_width(letter: str) -> float:
    """Return a share of the font's size, after DejaVu Sans, one of the widest."""
    if letter in _SLIM:
        return 0.42
    if letter in _BROAD or ord(letter) >= 0x2E80:
        return 1.05
    return 0.82 if letter.isupper() or letter in "#+<=>^~&" or ord(letter) >= 0x370 else 0.65


def _broken(text: str, width: float) -> list[str]:
    """Return a paragraph as lines of at most `width`, but for words that are longer."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if text_width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]


def fitted(text: str, width: float, *, bold: bool = False) -> str:
    """Return text cut to a width."""
    if text_width(text, bold=bold) <= width:
        return text
    ends = accumulate(text_width(letter, bold=bold) for letter in f"…{text}")
    return f"{text[: max(1, sum(end <= width for end in ends) - 1)]}…"


def grid(drawing: Drawing, x: Axis, y: Axis, *, names: tuple[str, str]) -> None:
    """Draw tick lines with their values, and the names of both axes."""
    for value in y.ticks():
        drawing.line(x.start, y.at(value), x.end, y.at(value), "grid")
        drawing.text(x.start - 6, y.at(value) + 4, tick(value), "tick", "end")
    drawing.line(x.start, y.start, x.end, y.start, "axis")
    drawing.text((x.start + x.end) / 2, y.start + 38, names[0], "name", "middle")
    drawing.upright(14, (y.start + y.end) / 2, names[1])


@dataclass(frozen=True)
class Label:
    """Where a label went.

    Args:
        box: what it covers.
        anchor: which end of the text is held fast, for fonts of another width than supposed.
        led: whether it is so far from its point that it needs a leader.
    """

    box: Box
    anchor: str
    led: bool = False

    @property
    def held(self) -> float:
        """The pixel of the end that is held fast."""
        sides = {"start": self.box.left, "end": self.box.right}
        return sides.get(self.anchor, (self.box.left + self.box.right) / 2)


def place_labels(
    points: Sequence[tuple[float, float]],
    widths: Sequence[float],
    taken: Sequence[Box],
    bounds: Box,
) -> list[Label | None]:
    """Find a place beside each point where its label meets nothing else; None where there is none.

    Args:
        points: pixels.
        widths: of one line of text for each point.
        taken: what labels must keep clear of: markers, error bars, other text.
        bounds: where labels may lie.
    """
    filled = list(taken)
    placed: list[Label | None] = []
    for (x, y), width in zip(points, widths, strict=True):
        height = FONT + 2
        found = next(
            (
                label
                for label in _candidates(x, y, width, height)
                if label.box.within(bounds) and not any(label.box.meets(box) for box in filled)
            ),
            None,
        )
        placed.append(found)
        if found is not None:
            filled.append(found.box)
    return placed


def beside_line(
    names: Sequence[str], height: float, x: Axis, taken: Sequence[Box], lines: Sequence[Box]
) -> tuple[str, Label]:
    """Return the longest name that meets nothing at an end of a level line, and its place there.

    Where that cannot be, it lies on another level line rather than on what is `taken`.
    """
    tall = NOTE + 3
    places = []
    for top in (height - 2 - tall, height + 2):
        for name in names:
            wide = text_width(name) * NOTE / FONT
            right = Box(x.end - 2 - wide, top, x.end - 2, top + tall)
            left = Box(x.start + 2, top, x.start + 2 + wide, top + tall)
            places += [(name, Label(right, "end")), (name, Label(left, "start"))]
    for avoided in ([*taken, *lines], taken):
        for name, label in places:
            if not any(label.box.meets(box) for box in avoided):
                return name, label
    return places[2 * len(names) - 2]


def _candidates(x: float, y: float, width: float, height: float) -> list[Label]:
    """Return places around a point, the best first: right, left, above, below, then farther."""
    found = []
    for distance in (9.0, 16.0, 26.0, 38.0, 54.0, 72.0):
        diagonal = 0.75 * distance
        for dx, dy in (
            (distance, 0.0),
            (-distance, 0.0),
            (0.0, -distance),
            (0.0, distance),
            (diagonal, -diagonal),
            (diagonal, diagonal),
            (-diagonal, -diagonal),
            (-diagonal, diagonal),
        ):
            left = x + dx if dx > 0 else x + dx - width if dx < 0 else x - width / 2
            top = y + dy - height / 2 if dx else (y + dy if dy > 0 else y + dy - height)
            anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
            box = Box(left, top, left + width, top + height)
            found.append(Label(box, anchor, led=distance > 16))
    return found


def spread_out(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move heights apart until neighbours differ by `least`, each as near to its own as it can."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    least = min(least, (high - low) / max(1, len(wanted) - 1)) if len(wanted) > 1 else least
    heights = [0.0] * len(wanted)
    previous = low - least
    for index in order:
        previous = heights[index] = max(wanted[index], previous + least)
    following = high + least
    for index in reversed(order):
        following = heights[index] = min(heights[index], following - least)
    return heights
