"""Find a table entry by name and import its module only then."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from qtool.errors import QtoolError, UsageError

Entry = TypeVar("Entry")


def nearest(name: str, choices: Iterator[str] | list[str]) -> str:
    """Return a hint that names the closest choice, or all of them when none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(choices)}"


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A mapping from names to entries whose modules are imported on first use.

    Args:
        kind: what one entry is called in messages, such as "format".
        places: name -> "package.module:attribute".
        error: the QtoolError class that an unknown name raises.
    """

    def __init__(
        self, kind: str, places: Mapping[str, str], error: type[QtoolError] = UsageError
    ) -> None:
        self._kind = kind
        self._places = dict(places)
        self._error = error

    def __getitem__(self, name: str) -> Entry:
        """Import and return the entry called `name`.

        Raises:
            QtoolError: of the registry's class, for a name that is not in the table.
        """
        if name not in self._places:
            raise self._error(f"unknown {self._kind} '{name}'", nearest(name, list(self._places)))
        module, attribute = self._places[name].split(":")
        entry: Entry = getattr(importlib.import_module(module), attribute)
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
