"""YAML that a stranger wrote: plain data only, bounded in size, depth and aliases."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from qtool.errors import UsageError

MAX_BYTES = 1 << 20  # of a recipe
MAX_NODES = 20_000  # with every alias written out
MAX_DEPTH = 32


class _Loader(yaml.SafeLoader):
    """YAML without constructors of objects, without duplicate keys, with 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                why = "stands twice" if isinstance(key, yaml.ScalarNode) else "is not a word"
                shown = key.value if isinstance(key, yaml.ScalarNode) else "of several words"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{shown}' {why}", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str, place: str) -> Any:
    """Return the one document of a text; `place` is where it comes from, for messages.

    Raises:
        UsageError: not YAML, or more of it than a recipe can need.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_extent(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        lines = str(error).splitlines()
        why = getattr(error, "problem", None) or (lines[0] if lines else type(error).__name__)
        if isinstance(error, RecursionError):
            why = "it is nested too deeply"
        raise UsageError(f"{place}{line}: not YAML: {why}", "correct it") from error


def _check_extent(root: yaml.Node) -> None:
    """Refuse nesting without end, and aliases that stand for more than anybody would write."""
    sizes: dict[int, int] = {}
    # Each node is visited twice: on the way down, and when its children's sizes are known.
    waiting: list[tuple[yaml.Node, int, bool]] = [(root, 0, False)]
    above: set[int] = set()
    while waiting:
        node, depth, finished = waiting.pop()
        if id(node) in sizes:
            continue
        children = _children(node)
        if finished:
            above.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > MAX_NODES:
                raise _refusal(node, f"aliases make more than {MAX_NODES} values of it")
            continue
        if depth > MAX_DEPTH:
            raise _refusal(node, f"it is nested more than {MAX_DEPTH} deep")
        above.add(id(node))
        waiting.append((node, depth, True))
        for child in children:
            if id(child) in above:
                raise _refusal(child, "an alias stands for what it is in itself")
            waiting.append((child, depth + 1, False))


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refusal(node: yaml.Node, why: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)
