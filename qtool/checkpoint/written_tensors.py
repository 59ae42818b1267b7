"""Which tensors of planned files are written, and what their bytes are on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoint.reader import CHUNK_BYTES
from qtool.checkpoint.untrusted import GET_AGAIN, open_regular, shown_path
from qtool.errors import DamagedError


@dataclass(frozen=True)
class Place:
    """Where one tensor goes: file name and absolute byte range."""

    file: str
    start: int
    stop: int


class WrittenTensors:
    """Sees to it that every tensor of a plan is written once.

    Args:
        places: of all tensors, by name.
        path: tells where a file of the plan is now.
    """

    def __init__(self, places: Mapping[str, Place], path: Callable[[str], Path]) -> None:
        self._places = places
        self._path = path
        self._missing = set(places)
        self._recent: list[str] = []

    @property
    def missing(self) -> frozenset[str]:
        """The names of tensors not written yet."""
        return frozenset(self._missing)

    def place(self, name: str) -> Place:
        """Return where a tensor is to be written.

        Raises:
            RuntimeError: not planned, or written before (a bug in the caller).
        """
        if name not in self._missing:
            state = "written before" if name in self._places else "not planned"
            raise RuntimeError(f"'{name}' was {state}")
        return self._places[name]

    def note(self, name: str) -> None:
        """Count a tensor as written."""
        self._missing.discard(name)
        self._recent.append(name)

    def adopt(self, names: Iterable[str]) -> None:
        """Count tensors as written that an earlier writer wrote."""
        self._missing -= set(names)

    def recent(self) -> tuple[str, ...]:
        """Return the tensors that were written since this was last asked."""
        found, self._recent = tuple(self._recent), []
        return found

    def check_complete(self) -> None:
        """Raise RuntimeError if a tensor was never written (a bug in the caller)."""
        if self._missing:
            raise RuntimeError(f"never written: {', '.join(sorted(self._missing)[:5])}")

    def digest(self, names: Iterable[str]) -> str:
        """Return the SHA-256 of the bytes of tensors as they are in the files now, in hexadecimal.

        Raises:
            DamagedError: a file ends too early or cannot be read.
            KeyError: one is not planned.
        """
        digest = hashlib.sha256()
        for place in map(self._places.__getitem__, names):
            path = self._path(place.file)
            with open_regular(path)[0] as file:
                left = place.stop - place.start
                file.seek(place.start)
                while left:
                    chunk = file.read(min(CHUNK_BYTES, left))
                    if not chunk:
                        ended = f"{shown_path(path)} ends at byte {file.tell()}"
                        raise DamagedError(ended, GET_AGAIN)
                    digest.update(chunk)
                    left -= len(chunk)
        return digest.hexdigest()
