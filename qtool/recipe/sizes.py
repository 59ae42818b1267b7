"""Sizes as people write them: `5GB`, `24GiB`, `24g`. Bytes are bytes; G is 10^9, Gi is 2^30."""

from __future__ import annotations

import re

from qtool.errors import UsageError, shortened

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.I)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
MOST = 2**31 - 1  # windows, and tokens of one: more than any model or text has
LONGEST_SIZE = 64  # characters
MOST_BYTES = 2**63  # no file or memory has so many


def parse_size(text: str) -> int:
    """Return the bytes that a size such as `5GB`, `2 GiB`, `24g` or `1000` stands for.

    Raises:
        UsageError: not a size, or less than a byte, or beyond 63 bits.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) <= LONGEST_SIZE else None
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"'{shortened(text)}' is not a size", "write it like 24GB, 24GiB or 24g")
    wanted = float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()]
    if not 1 <= wanted < MOST_BYTES:
        raise UsageError(f"'{shortened(text)}' is no size to work with", "write it like 24GB")
    return int(wanted)


def shown_size(n_bytes: float) -> str:
    """Return bytes as people read them, in decimal units: `4.92 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
