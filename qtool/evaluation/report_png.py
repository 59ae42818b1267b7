"""Plots as PNG files, for pull requests, chats and model cards that do not show SVG.

Drawn by resvg, in the light theme. It brings no font and leaves text out where it finds none, so
letters are those that matplotlib brings, and never those of the machine: the same figures then make
the same picture everywhere. Both are an extra of the package.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

SCALE = 2  # pixels of the file for one of the drawing
FAMILY = "DejaVu Sans"
EXTRA = "pip install 'qtool-llm[plots]'"

_DARK = re.compile(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}")
_VALUE = re.compile(r"(--[\w-]+):([^;}]+);\s*")
_USE = re.compile(r"var\((--[\w-]+)\)")
_FAMILIES = re.compile(r"(?<=[{;])(font:[^;}\"]*?px )[^;}]+")


def can_draw() -> bool:
    """Whether what draws PNG files is installed."""
    try:
        import resvg_py  # noqa: F401  may be installed and yet not load
    except ImportError:
        return False
    return bool(font_files())


def font_files() -> tuple[Path, ...]:
    """Return the regular and the bold font that matplotlib brings, or nothing without them."""
    spec = find_spec("matplotlib")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        folder = Path(place) / "mpl-data" / "fonts" / "ttf"
        found = (folder / "DejaVuSans.ttf", folder / "DejaVuSans-Bold.ttf")
        if all(font.is_file() for font in found):
            return found
    return ()


def plain_style(style: str) -> str:
    """Return a style sheet without what resvg does not know: variables and media queries.

    Args:
        style: whose variables are set in one rule outside of media queries.
    """
    light = _DARK.sub("", style)
    values = dict(_VALUE.findall(light))
    named = _USE.sub(lambda use: values[use[1]], _VALUE.sub("", light))
    return _FAMILIES.sub(rf"\g<1>{FAMILY}", named)


def png(svg: str) -> bytes:
    """Return a PNG file of a drawing, at twice its size, on white; where `can_draw`.

    Args:
        svg: with a `plain_style`.

    Raises:
        ValueError: not an SVG that can be drawn.
    """
    import resvg_py

    drawn = resvg_py.svg_to_bytes(
        svg_string=svg,
        zoom=SCALE,
        background="#fff",
        skip_system_fonts=True,
        font_files=[str(font) for font in font_files()],
        font_family=FAMILY,
        sans_serif_family=FAMILY,
    )
    return bytes(drawn)
