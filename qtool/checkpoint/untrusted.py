"""Take text and JSON from files that strangers wrote: bounded, and safe to show on a terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from qtool.errors import CapacityError, DamagedError, QtoolError

MAX_SHOWN_CHARACTERS = 200
# Below this a JSON text cannot blow up into more than some hundred megabytes of Python objects.
SMALL_JSON_BYTES = 8 << 20

GET_AGAIN = "download or copy the model again"

# What the system has too little of for one process or for all.
SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
GET_MORE = "raise the limits of this process (ulimit -a), or close other programs"


def printable(text: object) -> str:
    """Return `text` with control, bidi and other invisible characters spelled out as escapes."""
    shown = str(text)
    if len(shown) > MAX_SHOWN_CHARACTERS:
        shown = f"{shown[: MAX_SHOWN_CHARACTERS - 3]}..."
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def shown_path(path: Path) -> str:
    """Return a path for a message: whole, however long, with nothing a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def read_error(path: Path, error: OSError) -> QtoolError:
    """Return the refusal that tells a user why `path` could not be read."""
    message = f"cannot read {shown_path(path)}: {error.strerror or error}"
    if error.errno in SCARCE:
        return CapacityError(message, GET_MORE, resumable=True)
    if error.errno == errno.EACCES:
        return DamagedError(message, "check the path and its permissions", resumable=True)
    return DamagedError(message, "check the disk, the path and its permissions", resumable=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failure of the system while `path` is read into a refusal that names it.

    Raises:
        DamagedError, CapacityError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise read_error(path, error) from error


class _NamedFile(io.FileIO):
    """A file whose failed reads name it; Python's own know only the number of the error."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._path = path

    def readinto(self, buffer: Any) -> int | None:
        with reading(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with reading(self._path):
            return super().readall()

    def close(self) -> None:
        with suppress(OSError):  # nothing was written: all that it could say is known
            super().close()


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a file for reading and return it with its size in bytes; failed reads name the file.

    Raises:
        DamagedError: absent, unreadable, or something other than a file, such as a pipe that
            would block for ever.
        CapacityError: the process may open no more files.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise DamagedError(f"{shown_path(path)} is not a file", GET_AGAIN)
        file = io.BufferedReader(_NamedFile(path))
        return file, os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise DamagedError(f"{shown_path(path)} is missing", GET_AGAIN) from error
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError as error:
        raise DamagedError(
            f"cannot read {shown_path(path)}: not a valid path", "check the path"
        ) from error


def present(path: Path) -> bool:
    """Tell whether there is anything of that name, be it a link that leads nowhere."""
    return path.is_symlink() or path.exists()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a path before what a refusal says, unless it names the file itself."""
    try:
        yield
    except QtoolError as error:
        where = shown_path(path)
        if where in error.message:
            raise
        raise type(error)(f"{where}: {error.message}", error.hint) from error


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object from a file of at most `max_bytes`.

    Raises:
        DamagedError: absent, too large, not UTF-8, not JSON, not an object, or a key twice.
    """
    file, size = open_regular(path)
    with file:
        if size > max_bytes:
            raise DamagedError(
                f"{shown_path(path)} has {size} bytes, more than the {max_bytes} qtool reads",
                GET_AGAIN,
            )
        return parse_json_object(file.read(max_bytes), shown_path(path))


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; `where` names the place in messages.

    Raises:
        DamagedError: not UTF-8, not JSON, not an object, or a key twice.
    """
    refuse_bomb(raw, where)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{where} is not UTF-8 at byte {error.start}", GET_AGAIN) from error
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except _RepeatedKeyError as error:
        raise DamagedError(f"{where} has the key '{printable(error)}' twice", GET_AGAIN) from error
    except RecursionError as error:
        raise DamagedError(f"{where} is nested too deeply", GET_AGAIN) from error
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        raise DamagedError(f"{where} is not JSON: {printable(error)}", GET_AGAIN) from error
    if not isinstance(value, dict):
        raise DamagedError(f"{where} is not a JSON object", GET_AGAIN)
    return value


class _RepeatedKeyError(ValueError):
    """A JSON object has one key twice: readers disagree about which of them counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        raise _RepeatedKeyError(next(k for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return made


def refuse_bomb(raw: bytes, where: str) -> None:
    """Refuse large JSON made of nothing but brackets and commas before it fills the memory.

    An entry of a header or index has at least 20 bytes and a handful of commas; `[[],[],...]`
    of 100 MB would become several gigabytes of lists.

    Raises:
        DamagedError: it is such.
    """
    if is_bomb(raw):
        raise DamagedError(f"{where} is not made of tensor entries", GET_AGAIN)


def is_bomb(raw: bytes) -> bool:
    """Tell whether large JSON consists of brackets and commas more than of words."""
    entries = len(raw) // 20
    marks = (b"{", 1), (b"[", 1), (b",", 4)
    return len(raw) > SMALL_JSON_BYTES and any(raw.count(m) // n > entries for m, n in marks)
