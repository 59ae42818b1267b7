"""Which rule of a recipe applies to a module: the first whose pattern matches its name.

A pattern is a glob over the module's full name (`model.layers.0.*`) or over its last parts
(`lm_head`, `down_proj`, `mlp.*_proj`), or, after `re:`, a regular expression that must match from
the start of the name. `*` also crosses dots. The name
may end in `.weight`, and a glob too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qtool.errors import UsageError, shortened
from qtool.ggml_types import GGML_TYPES
from qtool.recipe.load import validated
from qtool.recipe.schema import Rule
from qtool.recipe.yaml_text import read_yaml

OVERRIDE_FORM = "for example --override 'down_proj=bits:8,group_size:32' or 'attn_v=Q6_K'"


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a module's or its weight's name."""
    module = name.removesuffix(".weight")
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    pattern = pattern.removesuffix(".weight")
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def first_match(rules: Sequence[Rule], name: str) -> Rule | None:
    """Return the rule that applies to a module, None if none does."""
    return next((rule for rule in rules if matches(rule.match, name)), None)


def unmatched(rules: Sequence[Rule], names: Iterable[str]) -> list[Rule]:
    """Return the rules whose pattern matches none of the names; each is a mistake to report."""
    names = list(names)
    return [rule for rule in rules if not any(matches(rule.match, name) for name in names)]


def parse_override(text: str) -> Rule:
    """Read `PATTERN=key:value,key:value`, or `PATTERN=TYPE` for GGUF, as `--override` takes it.

    Raises:
        UsageError: not of that form, an unknown key, or a value that does not fit.
    """
    place = f"--override '{shortened(text)}'"
    pattern, separator, settings = text.rpartition("=")
    if not separator or not pattern or not settings:
        raise UsageError(f"{place}: not PATTERN=KEY:VALUE", OVERRIDE_FORM)
    data: dict[str, Any] = {"match": pattern}
    if ":" not in settings and settings.strip().upper() in {name.upper() for name in GGML_TYPES}:
        return validated(Rule, {"match": pattern, "type": settings.strip()}, place)
    for setting in settings.split(","):
        key, colon, value = setting.partition(":")
        if not colon or not value.strip():
            raise UsageError(
                f"{place}: '{shortened(setting)}' is neither KEY:VALUE nor a type of ggml",
                OVERRIDE_FORM,
            )
        if key.strip() in data:
            raise UsageError(
                f"{place}: the key '{shortened(key.strip())}' stands twice", OVERRIDE_FORM
            )
        data[key.strip()] = read_yaml(value, place)
    return validated(Rule, data, place)


def parse_ignore(pattern: str) -> Rule:
    """Read a pattern as `--ignore` takes it: leave those modules as they are.

    Raises:
        UsageError: an empty pattern or a bad regular expression.
    """
    return validated(Rule, {"match": pattern, "keep": True}, f"--ignore '{shortened(pattern)}'")
