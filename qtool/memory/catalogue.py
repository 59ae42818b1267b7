"""Find the shape of a well-known model by its name, or a real model of a size such as `70b`.

`catalogue.json` holds what its config.json says of each model, and where that stands. A size
without a model of its own gives a shape between those of its neighbours, labelled as not exact.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import UsageError
from qtool.memory.shape import ModelShape
from qtool.memory.shape_of_config import shape_of_config
from qtool.registry import nearest

EXAMPLES = "write a size such as 8b, 70b, 0.5b, 8x7b or 30b-a3b, or a name such as llama-3.1-8b"
SIZE = re.compile(r"(\d{1,4}(?:\.\d{1,3})?)([bmt])(-a\d{1,3}(?:\.\d{1,3})?b)?")
MIXTURE = re.compile(r"\d{1,3}x\d{1,3}b")
UNITS = {"m": 10**6, "b": 10**9, "t": 10**12}
SMALLEST, LARGEST = 10**7, 4 * 10**12

# Which of several models of a size is meant, where nothing else is said: one that many people run.
USUAL = {
    "1b": "Llama-3.2-1B",
    "1.5b": "Qwen2.5-1.5B",
    "1.7b": "Qwen3-1.7B",
    "2b": "Gemma-2-2B",
    "3b": "Llama-3.2-3B",
    "3.8b": "Phi-4-mini",
    "4b": "Qwen3-4B",
    "7b": "Qwen2.5-7B",
    "8b": "Llama-3.1-8B",
    "9b": "Gemma-2-9B",
    "12b": "Gemma-3-12B",
    "13b": "Llama-2-13B",
    "14b": "Qwen3-14B",
    "27b": "Gemma-3-27B",
    "30b": "Qwen3-30B-A3B",
    "32b": "Qwen3-32B",
    "34b": "Yi-34B",
    "70b": "Llama-3.3-70B",
    "671b": "DeepSeek-V3",
}
# Endings of names that say nothing of a model's shape.
PLAIN_ENDINGS = re.compile(
    r"-(instruct|it|chat|base|hf|gguf|thinking|v0\.1|fp8|bf16|pt|awq|gptq|int4|int8)$"
)
DENSE = frozenset({"llama", "qwen2", "qwen3"})  # shapes that may be stretched to other sizes
MOST_OTHERS = 6


@dataclass(frozen=True)
class Row:
    """One model of the catalogue.

    Args:
        name: for people.
        size: as people write it, such as `30b-a3b`.
        aliases: other names, in lower case.
        config: the keys of its config.json that its shape follows from.
        tokenizer: name in the catalogue's list of tokenizers.
        source: where the config.json stands.
        recipe: year of the llama.cpp of its published files.
        parameters: that its publisher states; None where only the shape tells.
    """

    name: str
    size: str
    aliases: tuple[str, ...]
    config: Mapping[str, Any]
    tokenizer: str
    source: str
    recipe: int
    parameters: int | None


@dataclass(frozen=True)
class Found:
    """A shape and how it was found.

    Args:
        shape: the model's.
        assumed: one sentence on what was assumed; empty where the name left no choice.
        others: names of models that may have been meant.
    """

    shape: ModelShape
    assumed: str
    others: tuple[str, ...]


@cache
def rows() -> tuple[Row, ...]:
    """Return the catalogue."""
    return tuple(
        Row(
            row["name"],
            row["size"],
            tuple(row.get("aliases", ())),
            row["config"],
            row["tokenizer"],
            row["source"],
            row.get("recipe", 2026),
            row.get("parameters"),
        )
        for row in _content()["models"]
    )


@cache
def _content() -> dict[str, Any]:
    text = files("qtool.memory").joinpath("catalogue.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


@cache
def shape_of_row(row_name: str) -> ModelShape:
    """Return the shape of the catalogue's model of that name."""
    row = next(row for row in rows() if row.name == row_name)
    known = _content()["tokenizers"].get(row.tokenizer)
    return replace(
        shape_of_config(row.config, name=row.name),
        header_bytes=None if known is None else int(known["bytes"]),
        recipe=row.recipe,
        source=row.source,
    )


def find_shape(text: str) -> Found:
    """Return the shape of a model by its name, or of a usual model of a size.

    Raises:
        UsageError: neither a size nor a known name; the hint has examples, or the nearest name.
    """
    wanted = _plain(text)
    named = _by_name(wanted)
    if named is not None:
        return Found(shape_of_row(named.name), "", ())
    if SIZE.fullmatch(wanted) or MIXTURE.fullmatch(wanted):
        return _by_size(wanted)
    names = {alias: row.name for row in rows() for alias in (row.name.lower(), *row.aliases)}
    beginning = [row.name for row in rows() if wanted and row.name.lower().startswith(wanted)]
    if beginning:
        shown = f"'{printable(text)}' may be {', '.join(beginning[:MOST_OTHERS])}"
        raise UsageError(shown, "write one of these names")
    hint = EXAMPLES if not wanted or wanted[0].isdigit() else _hint(wanted, names)
    raise UsageError(f"'{printable(text)}' is neither a size nor a known model", hint)


def _hint(wanted: str, names: Mapping[str, str]) -> str:
    close = nearest(wanted, list(names))
    return close if close.startswith("did you mean") else EXAMPLES


def _plain(text: str) -> str:
    """Return a name in lower case, without its owner."""
    plain = text.strip().lower().replace("_", "-").replace(" ", "-")
    return plain.rpartition("/")[2]


def _by_name(wanted: str) -> Row | None:
    """Return the model of that name, with or without an ending that says nothing of its shape."""
    known = {_plain(name): row for row in rows() for name in (row.name, *row.aliases)}
    while wanted not in known:
        shorter = PLAIN_ENDINGS.sub("", wanted)
        if shorter == wanted:
            return None
        wanted = shorter
    return known[wanted]


def _by_size(wanted: str) -> Found:
    same = [row for row in rows() if row.size == wanted]
    # `30b` may be a mixture whose name goes on, such as `30b-a3b`.
    same = same or [row for row in rows() if row.size.partition("-")[0] == wanted]
    if not same:
        return _between(wanted)
    usual = next((row for row in same if row.name == USUAL.get(wanted)), same[0])
    shape = shape_of_row(usual.name)
    others = tuple(row.name for row in same if row is not usual)[:MOST_OTHERS]
    return Found(shape, f"{wanted} is taken for {usual.name}", others)


def _between(wanted: str) -> Found:
    """Return a stretched shape for a size that no model of the catalogue has.

    Raises:
        UsageError: no model has that size, or it is a mixture of experts.
    """
    match = SIZE.fullmatch(wanted)
    target = float(match[1]) * UNITS[match[2]] if match else 0.0
    near = _nearest_rows(target) if target else rows()
    offered = tuple(row.name for row in near[:3])
    if match is None or match[3] or not SMALLEST <= target <= LARGEST:
        raise UsageError(
            f"no known model has the size '{printable(wanted)}'",
            f"nearest: {', '.join(offered)}; or name a directory with a config.json",
        )
    row = next(row for row in near if row.config["model_type"] in DENSE)
    whole = shape_of_row(row.name)
    blocks = sum(t.weights for t in whole.tensors if t.name.startswith("blk."))
    count = round((target - (whole.parameters - blocks)) / (blocks / whole.blocks))
    count = min(max(count, 1), 1000)
    config = {**row.config, "num_hidden_layers": count}
    shape = replace(
        shape_of_config(config, name=wanted),
        exact=False,
        source=f"{row.name} with {count} blocks instead of {whole.blocks}",
    )
    assumed = f"no known model has {wanted}: {row.name} with {count} blocks is taken for it"
    return Found(shape, assumed, offered)


def _nearest_rows(target: float) -> tuple[Row, ...]:
    """Return all models, those of the nearest size first."""

    def distance(row: Row) -> float:
        match = SIZE.match(row.size)
        size = float(match[1]) * UNITS[match[2]] if match else shape_of_row(row.name).parameters
        return abs(math.log(size / target))

    return tuple(sorted(rows(), key=distance))
