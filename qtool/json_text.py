"""Write JSON that every reader takes: no NaN, nothing but ASCII."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON text; numbers that JSON does not have (no estimate) become null.

    Escaped to ASCII: names come from files, and a terminal must not obey them.
    """
    return json.dumps(
        _without_nan(value), ensure_ascii=True, allow_nan=False, default=str, indent=indent
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
