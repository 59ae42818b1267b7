"""The journal of a run: which blocks are finished, and what would make it another run.

One JSON object a line, each with its own checksum, so that a torn or flipped line spoils itself
alone. The first says what the run is; every other names it by digest and tells of one block: which
tensors it wrote and their SHA-256, what became of each linear, and where the hidden states behind
it are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.untrusted import open_regular, printable, refuse_bomb, shown_path
from qtool.errors import DamagedError, UsageError
from qtool.pipeline.progress import LayerReport

JOURNAL = "journal.jsonl"
MAX_LINE_BYTES = 64 << 20
MAX_HEAD_BYTES = 4 << 20  # of the line that says what the run is
MAX_BYTES = 512 << 20  # of a journal; one of 70,000 experts has 50 MB
MOST_BLOCKS = 100_000
SHOWN_DIFFERENCES = 4
SHOWN_LEVELS = 12  # of nested settings


@dataclass(frozen=True)
class StateFile:
    """A file in the directory of states."""

    name: Annotated[str, Field(pattern=r"^[a-z_]+-[0-9]{5}\.(bin|safetensors)$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FinishedBlock:
    """What the journal knows of a block.

    Args:
        index: of the block.
        tensors: per output, the names of stored tensors that were written.
        digests: per output, the SHA-256 of their bytes.
        layers: one line for each linear.
        warnings: (code, message) that it gave.
        seconds: from the start of the run, those of earlier processes included.
        kept: tensors that a transform rewrote, or what was measured; None where there are none.
        hidden: hidden states behind the block, by stream; empty where none are needed.
    """

    index: Annotated[int, Field(ge=0, lt=MOST_BLOCKS)]
    tensors: tuple[tuple[str, ...], ...]
    digests: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    warnings: tuple[tuple[str, str], ...]
    seconds: Annotated[float, Field(ge=0, le=1e12)]
    kept: StateFile | None = None
    hidden: Mapping[str, StateFile] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """A line: what a run is, or one of its blocks."""

    run: str
    identity: dict[str, Any] | None = None
    block: FinishedBlock | None = None


class Journal:
    """The journal of one run in a file, which is made if there is none.

    Args:
        path: of the file.
        identity: nested mappings of everything that decides the bytes of the result.

    Raises:
        UsageError: the file is of a run with another identity; says what differs.
        CapacityError, DamagedError: it cannot be read or written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self._run = hashlib.sha256(_canonical(self._identity)).hexdigest()
        self.blocks: dict[int, FinishedBlock] = {}
        self.damaged = 0  # lines that cannot be read
        self._load()

    def _load(self) -> None:
        head: Mapping[str, Any] | None = None
        other, whole = False, True
        for line in _lines(self._path):
            whole = line.endswith(b"\n")
            entry = _parsed(line)
            if entry is None:
                self.damaged += 1
                continue
            head = entry.identity if head is None else head
            if entry.block is not None and entry.run == self._run:
                self.blocks[entry.block.index] = entry.block
            other = other or (entry.block is not None and entry.run != self._run)
        if other:
            raise UsageError(
                f"an unfinished run in {shown_path(self._path.parent)} is another: "
                + _shown_differences(head, self._identity),
                "run with the settings of before, or start over with --no-resume",
            )
        if self.damaged or not whole or not self.blocks or head is None:
            self._rewrite()

    def _rewrite(self) -> None:
        """Write what is known anew: a torn line would swallow what is written behind it."""
        entries = [{"run": self._run, "block": asdict(block)} for block in self.blocks.values()]
        whole = [{"run": self._run, "identity": self._identity}, *entries]
        self._write(b"".join(_line(entry) for entry in whole), truncate=True)

    def note(self, block: FinishedBlock) -> None:
        """Note a finished block; it is on the disk when this returns.

        Raises:
            CapacityError, DamagedError: the disk is full or failed.
        """
        self._append({"run": self._run, "block": asdict(block)})
        self.blocks[block.index] = block

    def forget(self, index: int) -> None:
        """Count a block as not finished."""
        self.blocks.pop(index, None)

    def forget_states(self) -> None:
        """Count the hidden states of all blocks as lost."""
        self.blocks = {i: replace(block, hidden={}) for i, block in self.blocks.items()}

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._write(_line(entry), truncate=False)

    def _write(self, content: bytes, *, truncate: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND | os.O_NONBLOCK
        try:
            descriptor = os.open(self._path, flags | (os.O_TRUNC if truncate else 0), 0o666)
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(self._path, error) from error


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry with its checksum in front, as one line."""
    # NaN, which a report may hold, is fine here: nobody else reads this.
    body = json.dumps(entry, separators=(",", ":")).encode()
    return b"%s %s\n" % (hashlib.sha256(body).hexdigest().encode(), body)


def begun_with(path: Path, key: str) -> Any:
    """Return a value of the identity that the journal at `path` was begun with, None if unknown.

    Raises:
        DamagedError: it cannot be read, or is larger than any journal.
    """
    with closing(_lines(path)) as lines:  # not by whoever collects garbage: signals would be lost
        found = filter(None, map(_parsed, lines))
        return next((e.identity.get(key) for e in found if e.identity is not None), None)


def _lines(path: Path) -> Generator[bytes]:
    """Yield the lines of a file with their ends, if there is such a file; overlong ones cut."""
    if not path.exists():
        return
    file, size = open_regular(path)
    with file:
        if size > MAX_BYTES:
            raise DamagedError(
                f"{shown_path(path)} has {size} bytes, more than any journal",
                "start over with --no-resume",
            )
        try:
            inside = False
            while line := file.readline(MAX_LINE_BYTES + 1):
                if not inside and line != b"\n":
                    yield line
                inside = not line.endswith(b"\n")
        except OSError as error:
            raise write_error(path, error) from error


@cache
def _entries() -> TypeAdapter[_Entry]:
    return TypeAdapter(_Entry)


def _parsed(line: bytes) -> _Entry | None:
    """Return the entry of a line, None where the checksum does not fit or the shape is another."""
    checksum, _, body = line.removesuffix(b"\n").partition(b" ")
    if len(line) > MAX_LINE_BYTES or hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    try:
        refuse_bomb(body, "a line")
        entry = _entries().validate_json(body, strict=True)
    except (ValidationError, DamagedError):
        return None
    return None if entry.identity is not None and len(body) > MAX_HEAD_BYTES else entry


def _shown_differences(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    if before is None:
        return "what it was begun with cannot be read"
    old, new = dict(_flat(before)), dict(_flat(now))
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    lines = [_difference(key, old.get(key), new.get(key)) for key in differing]
    more = f", {len(lines) - SHOWN_DIFFERENCES} more" if len(lines) > SHOWN_DIFFERENCES else ""
    return ", ".join(lines[:SHOWN_DIFFERENCES]) + more


def _difference(key: str, old: Any, new: Any) -> str:
    if old is None or new is None:
        return f"{printable(key)} is {'new' if old is None else 'gone'}"
    if key.endswith("sha256"):
        return f"{printable(key.rpartition('.')[0])} has changed"
    return f"{printable(key)} was {printable(old)}, is {printable(new)}"


def _flat(value: Any, prefix: str = "", levels: int = SHOWN_LEVELS) -> Sequence[tuple[str, Any]]:
    """Return the leaves of nested mappings and lists under dotted names."""
    if isinstance(value, Mapping) and levels:
        items = list(value.items())
    elif isinstance(value, list) and levels:
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return [(prefix, "something nested" if isinstance(value, dict | list) else value)]
    found = (_flat(item, f"{prefix}.{key}".lstrip("."), levels - 1) for key, item in items)
    return [leaf for leaves in found for leaf in leaves]
