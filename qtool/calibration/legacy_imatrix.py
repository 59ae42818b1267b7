"""The importance matrices that llama.cpp wrote before GGUF (`imatrix.dat`), read with bounds.

    int32 entries
    entries times: int32 length, name, int32 calls, int32 n, n float32 (mean x^2 times calls)
    optionally: int32 chunks, int32 length, name of the text

All little-endian. There are no token counts, and the experts of one tensor lie end to end. Layout:
llama.cpp b11549, common/imatrix-loader.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.untrusted import GET_AGAIN, open_regular, printable, shown_path
from qtool.errors import DamagedError

MOST_ENTRIES = 1 << 20
LONGEST_NAME = 512
MOST_VALUES = 1 << 26  # of an entry: all experts of a layer have a tenth of it
MAX_BYTES = 4 << 30
LEAST_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4


@dataclass(frozen=True)
class LegacyEntry:
    """What one tensor's inputs are like.

    Args:
        calls: how often it was summed up.
        sums: [n] float32, mean x^2 times `calls`.
    """

    calls: int
    sums: NDArray[np.float32]


@dataclass(frozen=True)
class LegacyMatrix:
    """A whole file; `chunks` is 0 and `dataset` empty where it does not say."""

    entries: Mapping[str, LegacyEntry]
    chunks: int
    dataset: str


def looks_legacy(beginning: bytes) -> bool:
    """Tell by the first bytes of a file whether it may be one.

    Args:
        beginning: at least `8 + LONGEST_NAME` bytes, or all there are.
    """
    if len(beginning) < 9:
        return False
    count, length = struct.unpack_from("<ii", beginning)
    if not (1 <= count <= MOST_ENTRIES and 1 <= length <= LONGEST_NAME):
        return False
    name = beginning[8 : 8 + length]
    return name.isascii() and name.decode("ascii").isprintable()


def read_legacy(path: Path) -> LegacyMatrix:
    """Read a file that `looks_legacy`.

    Raises:
        DamagedError: truncated or malformed.
    """
    file, size = open_regular(path)
    with file:
        return _read(_Position(path, file, size))


def _read(at: _Position) -> LegacyMatrix:
    if at.left > MAX_BYTES:
        at.refuse(f" has {at.left} bytes, more than the {MAX_BYTES} qtool reads")
    count = at.integer("its number of entries")
    if not 1 <= count <= MOST_ENTRIES or count * LEAST_ENTRY_BYTES > at.left:
        at.refuse(f" claims {count} entries in {at.left} bytes")
    entries: dict[str, LegacyEntry] = {}
    for index in range(count):
        name = at.text(f"the name of entry {index + 1} of {count}")
        calls = at.integer(f"'{printable(name)}'")
        if name in entries:
            at.refuse(f" has the entry '{printable(name)}' twice")
        entries[name] = LegacyEntry(calls, at.floats(f"'{printable(name)}'"))
    chunks = at.integer("its number of chunks") if at.left else 0
    dataset = at.text("the name of its text", empty=True) if at.left else ""
    return LegacyMatrix(entries, max(chunks, 0), dataset)


class _Position:
    """A place in the bytes of a file, and what is taken from there."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self.left = size

    def refuse(self, what: str) -> None:
        raise DamagedError(f"{shown_path(self._path)}{what}", GET_AGAIN)

    def integer(self, what: str) -> int:
        return int(struct.unpack("<i", self._take(4, what))[0])

    def text(self, what: str, *, empty: bool = False) -> str:
        length = self.integer(what)
        # A dataset is a path: it may be longer than the name of a tensor.
        if length > (LONGEST_NAME if not empty else self.left) or length < (0 if empty else 1):
            self.refuse(f": {what} claims {length} bytes")
        return self._take(length, what).decode(errors="replace")

    def floats(self, what: str) -> NDArray[np.float32]:
        count = self.integer(what)
        if count < 1 or (count > MOST_VALUES and 4 * count <= self.left):
            self.refuse(f": {what} claims {count} values")
        values = np.frombuffer(self._take(4 * count, what), "<f4")
        return values.astype(np.float32)

    def _take(self, n_bytes: int, what: str) -> bytes:
        found = self._file.read(n_bytes) if n_bytes <= self.left else b""
        if len(found) < n_bytes:
            self.refuse(f" is truncated: {what} ends beyond byte {self._size}")
        self.left -= n_bytes
        return found
