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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qtool.checkpoint.output import write_error
from qtool.errors import UsageError
from qtool.pipeline.progress import LayerReport

JOURNAL = "journal.jsonl"
MAX_LINE_BYTES = 64 << 20
SHOWN_DIFFERENCES = 4


@dataclass(frozen=True)
class StateFile:
    """A file in the directory of states."""

    name: str
    sha256: str


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
        changed: tensors that a transform rewrote; None where there are none.
        hidden: hidden states behind the block, by stream; empty where none are needed.
    """

    index: int
    tensors: tuple[tuple[str, ...], ...]
    digests: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    warnings: tuple[tuple[str, str], ...]
    seconds: float
    changed: StateFile | None = None
    hidden: Mapping[str, StateFile] = field(default_factory=dict)


class Journal:
    """The journal of one run in a file, which is made if there is none.

    Args:
        path: of the file.
        identity: nested mappings of everything that decides the bytes of the result.

    Raises:
        UsageError: the file is of a run with another identity; says what differs.
        CapacityError, DamagedError: it cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity = json.loads(json.dumps(identity))
        self._run = hashlib.sha256(_canonical(self._identity)).hexdigest()
        self.blocks: dict[int, FinishedBlock] = {}
        self.damaged = 0  # lines that cannot be read
        self._load()

    def _load(self) -> None:
        lines, whole = _lines(self._path)
        found = [line for line in map(_parsed, lines) if line is not None]
        self.damaged = len(lines) - len(found)
        head = next((line["identity"] for line in found if "identity" in line), None)
        if any(line["run"] != self._run and "block" in line for line in found):
            raise UsageError(
                f"an unfinished run in {self._path.parent} is another: "
                + _shown_differences(head, self._identity),
                "run with the settings of before, or start over with --no-resume",
            )
        for line in found:
            if line["run"] == self._run and "block" in line:
                block = _block(line["block"])
                self.blocks[block.index] = block
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
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND
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
    """Return a value of the identity that the journal at `path` was begun with, None if unknown."""
    found = map(_parsed, _lines(path)[0])
    return next((line["identity"].get(key) for line in found if line and "identity" in line), None)


def _lines(path: Path) -> tuple[list[bytes], bool]:
    """Return the lines of a file, and whether the last one was written to its end."""
    try:
        content = path.read_bytes()
        return [line for line in content.split(b"\n") if line], content.endswith(b"\n")
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise write_error(path, error) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a line, None where the checksum does not fit."""
    checksum, _, body = line.partition(b" ")
    if len(line) > MAX_LINE_BYTES or hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    try:
        entry = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("run"), str) else None


def _block(entry: Mapping[str, Any]) -> FinishedBlock:
    changed = entry["changed"]
    return FinishedBlock(
        index=int(entry["index"]),
        tensors=tuple(tuple(names) for names in entry["tensors"]),
        digests=tuple(entry["digests"]),
        layers=tuple(LayerReport(**layer) for layer in entry["layers"]),
        warnings=tuple((code, message) for code, message in entry["warnings"]),
        seconds=float(entry["seconds"]),
        changed=None if changed is None else StateFile(**changed),
        hidden={name: StateFile(**file) for name, file in entry["hidden"].items()},
    )


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
        return f"{key} is {'new' if old is None else 'gone'}"
    if key.endswith("sha256"):
        return f"{key.rpartition('.')[0]} has changed"
    return f"{key} was {old}, is {new}"


def _flat(value: Any, prefix: str = "") -> Sequence[tuple[str, Any]]:
    """Return the leaves of nested mappings and lists under dotted names."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return [(prefix, value)]
    return [leaf for key, item in items for leaf in _flat(item, f"{prefix}.{key}".lstrip("."))]
