"""Find the errors of single layers in the report that `quantize` left beside a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool.checkpoint.gguf_split import model_stem
from qtool.checkpoint.untrusted import read_json_object
from qtool.errors import DamagedError

NAME = "qtool-report.json"
MAX_BYTES = 64 << 20
KEYS = ("name", "relative_error", "bits_per_weight")


def layers_beside(model: Path) -> list[dict[str, Any]]:
    """Return the layers that a model's report tells of; none where there is no such report.

    Args:
        model: a directory, or a GGUF file, whose report is NAME.qtool-report.json beside it or,
            in a directory of its own, qtool-report.json.
    """
    folder = model if model.is_dir() else model.parent
    for path in (folder / f"{model_stem(model.name)}.{NAME}", folder / NAME):
        try:
            found = read_json_object(path, max_bytes=MAX_BYTES)
        except DamagedError:  # absent, as a rule; and a bad one must not cost the evaluation
            continue
        layers = found.get("layers")
        if isinstance(layers, Sequence) and not isinstance(layers, str):
            rows = [layer for layer in layers if isinstance(layer, Mapping)]
            return [{key: layer.get(key) for key in KEYS} for layer in rows]
    return []


def with_layers(result: Mapping[str, Any], models: Sequence[Path | None]) -> dict[str, Any]:
    """Return the object of `qtool eval` with `layers` in each result that has a report beside it.

    Args:
        result: the object that `qtool eval --json` prints.
        models: where the model of each result lies, None where it is not on this machine.
    """
    found = []
    for item, model in zip(result["results"], models, strict=True):
        layers = [] if model is None else layers_beside(model)
        found.append({**item, "layers": layers} if layers else item)
    return {**result, "results": found}
