"""How configurations name modules, so that every engine finds the same rule for the same module.

vLLM merges linears that read one input and then looks rules up under the merged name: a rule for
`q_proj` alone would silently miss `qkv_proj`. Every rule written here therefore matches both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError

MERGED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def pattern_of(name: str) -> str:
    """Return an anchored regular expression for module `name` and for what it is merged into."""
    parent, dot, leaf = name.rpartition(".")
    tail = f"(?:{leaf}|{MERGED[leaf]})" if leaf in MERGED else re.escape(leaf)
    return f"^{re.escape(parent + dot)}{tail}$"


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches from the start of `name`, as engines apply it.

    Raises:
        DamagedError: the pattern is not a regular expression.
    """
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise DamagedError(
            f"config.json: '{pattern}' is not a regular expression ({error})",
            "repair the quantization_config, or download the model again",
        ) from error


def skip_rules(kept: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return GPTQModel's `dynamic` rules that leave the modules `kept` unquantized.

    The output head needs none: `lm_head: false` says it already.
    """
    inner = (name for name in kept if name.rpartition(".")[2] != "lm_head")
    return {f"-:{pattern_of(name)}": {} for name in inner}


def override_for(dynamic: object, name: str) -> Mapping[str, Any]:
    """Return what GPTQModel's `dynamic` rules override for module `name`; the first match wins.

    `-:` rules (left unquantized) say nothing about a module that is stored packed. A rule without
    a sign counts as `+:`.

    Raises:
        DamagedError: the rules are not a mapping of regular expressions to mappings.
    """
    if not isinstance(dynamic or {}, Mapping):
        raise DamagedError(
            f"config.json: the dynamic rules are {printable(dynamic)}, not an object",
            "repair the quantization_config, or download the model again",
        )
    rules: Mapping[str, Any] = dynamic or {}  # type: ignore[assignment]
    for key, override in rules.items():
        if key.startswith("-:") or not matches(key.removeprefix("+:"), name):
            continue
        if not isinstance(override, Mapping):
            raise DamagedError(
                f"config.json: the dynamic rule '{key}' holds {override!r}, not settings",
                "repair the quantization_config, or download the model again",
            )
        return override
    return {}
