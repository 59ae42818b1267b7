"""YAML that a stranger wrote: plain data only, bounded in size, depth and aliases."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from qtool.errors import UsageError, shortened

MAX_BYTES = 1 << 20  # of a recipe
MAX_NODES = 20_000  # with every alias written out
MAX_DEPTH = 32
MAX_DIGITS = 100  # of a number; no key takes one of more than 20
# What PyYAML's constructors raise besides its own errors where a text is not what its tag says.
FAULTS = (yaml.YAMLError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError)


class _Loader(yaml.SafeLoader):
    """YAML without constructors of objects, without duplicate keys, with 1e-3 as a number."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Counted as they come: a parser in Python takes long over a megabyte of them.
        self._composed += 1
        if self._composed > MAX_NODES:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None, None, f"it has more than {MAX_NODES} values", mark
            )
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        number = node.tag in {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
        if number and len(value) > MAX_DIGITS:
            raise _refusal(node, f"a number of {len(value)} digits")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _refusal(node, "half of a surrogate pair, which is no character")
        return value

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
    except (*FAULTS, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        lines = str(error).splitlines()
        why = getattr(error, "problem", None) or (lines[0] if lines else type(error).__name__)
        if isinstance(error, RecursionError):
            why = "it is nested too deeply"
        if isinstance(error, KeyError | TypeError | IndexError):
            why = "a value is not what its tag says"
        raise UsageError(f"{place}{line}: not YAML: {shortened(why)}", "correct it") from error


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
