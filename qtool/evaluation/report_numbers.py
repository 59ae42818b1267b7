"""Numbers as people read them: as many digits as the standard error supports."""

from __future__ import annotations

import math

from qtool.evaluation.report_facts import Figure
from qtool.recipe.sizes import shown_size

NONE = "-"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, without e-notation where it is short."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if -4 <= power < 6:
        return f"{value:.{max(0, digits - 1 - power)}f}"
    return f"{mantissa}·{power_of_ten(power)}"


def power_of_ten(power: int) -> str:
    """Return `10⁻⁵` for -5."""
    return f"10{str(power).translate(_SUPERSCRIPT)}"


def with_error(figure: Figure | None, digits: int = 3) -> str:
    """Return `0.0578 ± 0.0018`: two digits of the error, and the value to the same place."""
    if figure is None:
        return NONE
    if figure.error is None:
        return plain(figure.value, digits)
    power = int(f"{figure.error:.1e}".partition("e")[2])
    if figure.value and math.floor(math.log10(abs(figure.value))) < -4:  # both with one power
        return f"{plain(figure.value, digits)} ± {plain(figure.error, 2)}"
    places = min(12, max(0, 1 - power))
    return f"{figure.value:.{places}f} ± {figure.error:.{places}f}"


def percent(value: float | None) -> str:
    """Return a fraction as a percentage with one digit behind the point."""
    return NONE if value is None else f"{100 * value:.1f} %"


def percent_with_error(figure: Figure | None) -> str:
    """Return a fraction and its error as percentages."""
    if figure is None or figure.error is None:
        return percent(None if figure is None else figure.value)
    places = max(1, min(6, -math.floor(math.log10(100 * figure.error))))
    return f"{100 * figure.value:.{places}f} ± {100 * figure.error:.{places}f} %"


def size(n_bytes: int | None) -> str:
    """Return bytes in decimal units."""
    return NONE if n_bytes is None else shown_size(n_bytes)


def seconds(value: float | None) -> str:
    """Return a duration as `31 s` or `12 min`."""
    if value is None:
        return NONE
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s" if value < 600 else _minutes(value)


def _minutes(value: float) -> str:
    return f"{value / 60:.0f} min" if value < 36_000 else f"{value / 3600:.1f} h"


def tick(value: float) -> str:
    """Return the label of a tick: as short as it goes."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    if -4 <= power < 6:
        text = f"{value:.{max(0, 2 - power)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa = round(value / 10.0**power, 2)
    return power_of_ten(power) if mantissa == 1 else f"{mantissa:g}·{power_of_ten(power)}"


def place(tokens: int) -> str:
    """Return a place in a window: `512`, `8k`."""
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
