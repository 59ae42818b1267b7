"""What quantizing cost each linear, as the report beside a model tells it."""

from __future__ import annotations

import math
from typing import Any

from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import read_json_object
from qtool.errors import DamagedError
from qtool.pipeline.artifact import REPORT_FILE

MAX_REPORT_BYTES = 64 << 20
NUMBERS = ("relative_error", "bits_per_weight")


def layer_errors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return name, relative error and bits per weight of each linear; none without a report.

    A report that is not what qtool writes is passed over: the figures of an evaluation do not
    depend on it.
    """
    names = [REPORT_FILE]
    if checkpoint.gguf:  # a lone file has its companions' names begin with its own
        names.insert(0, f"{checkpoint.gguf[0].path.stem}.{REPORT_FILE}")
    path = next((p for name in names if (p := checkpoint.path / name).is_file()), None)
    if path is None:
        return []
    try:
        layers = read_json_object(path, max_bytes=MAX_REPORT_BYTES).get("layers")
    except DamagedError:
        return []
    rows = layers if isinstance(layers, list) else []
    return [
        {"name": row["name"], **{key: float(row[key]) for key in NUMBERS}}
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("name"), str) and _has_numbers(row)
    ]


def _has_numbers(row: dict[str, Any]) -> bool:
    values = [row.get(key) for key in NUMBERS]
    try:
        return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    except OverflowError:  # an integer beyond every float
        return False
