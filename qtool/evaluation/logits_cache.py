"""A reference's shortened logits on disk, so that they are computed once.

    DIR/KEY/WINDOW.logits    one window: SHA-256 of what follows, then safetensors
    DIR/KEY/reference.json   what KEY stands for, for people
    DIR/weights.json         SHA-256 of weight files, so that a file is hashed once

KEY is a hash of everything that decides the logits: the reference's weights and configuration, the
dtype, the versions of the libraries. WINDOW is a hash of the token ids, so a longer run over the
same text finds what a shorter one left. A window is written whole or not at all, and one whose hash
is not right is computed again.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qtool.checkpoint.locate import CONFIG_FILE, Checkpoint
from qtool.checkpoint.output import FULL_DISK
from qtool.checkpoint.untrusted import open_regular, read_json_object, shown_path
from qtool.errors import CapacityError, DamagedError, QtoolError, UsageError
from qtool.evaluation.rows import PIECE_ROWS, ReferenceRows
from qtool.evaluation.short_rows import DRAWN, TOP, ShortRows, shortened

LAYOUT = 1
NAME_LENGTH = 32  # hexadecimal digits of a hash that name a file
DIGEST_BYTES = 32
ROWS_PER_WHOLE_ONE = 256  # one row in so many is kept whole, to measure the error
CHUNK_BYTES = 1 << 22
WEIGHTS_FILE = "weights.json"
MAX_HEADER_BYTES = 1 << 16
MAX_WEIGHTS_BYTES = 16 << 20  # of the hashes of weight files
SMALL_IDS = 1 << 16  # vocabularies up to this need two bytes for a token


class LogitsCache:
    """The windows of one reference.

    Args:
        directory: of all caches; made if need be.
        key: what decides the logits beside the token ids; JSON values.
        windows: token ids [windows, length].
        vocabulary: tokens that the reference predicts.

    Raises:
        UsageError, CapacityError: the directory cannot be written.
    """

    def __init__(
        self, directory: Path, key: Mapping[str, Any], windows: Tensor, vocabulary: int
    ) -> None:
        whole = {**key, "layout": LAYOUT, "top": TOP, "drawn": DRAWN, "vocabulary": vocabulary}
        text = json.dumps(whole, sort_keys=True, indent=2)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._folder = directory / digest[:NAME_LENGTH]
        self._windows, self._vocabulary = windows, vocabulary
        self._names = [_window_name(ids) for ids in windows]
        if self._folder.is_symlink():
            raise UsageError(f"the logits cache {shown_path(self._folder)} is a link", "remove it")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(self._folder / "reference.json", text.encode())
        except OSError as error:
            raise write_error(self._folder, error) from error

    def missing(self) -> tuple[list[int], int]:
        """Return the windows that are still to be computed, and how many of them are damaged."""
        absent = [index for index in range(len(self._names)) if not self._path(index).exists()]
        damaged = [
            index
            for index in range(len(self._names))
            if index not in absent and self._load(index) is None
        ]
        return sorted([*absent, *damaged]), len(damaged)

    def save(self, index: int, pieces: Iterator[Tensor]) -> bool:
        """Take the reference's next pieces of logits for a window, shorten them and keep them.

        Returns:
            Whether they are finite; others are not kept.

        Raises:
            UsageError, CapacityError: the directory cannot be written.
        """
        ids = self._windows[index]
        draw = torch.Generator().manual_seed(int(self._names[index][:8], 16))
        parts = []
        for start in range(0, len(ids), PIECE_ROWS):
            logits = next(pieces)
            targets = torch.zeros(len(logits), dtype=torch.int64)
            following = ids[start + 1 : start + 1 + len(logits)]
            targets[: len(following)] = following
            kept = _kept(start, start + len(logits), len(ids))
            parts.append(shortened(logits, targets, kept, draw))
        if not all(bool(torch.isfinite(part.losses).all()) for part in parts):
            return False
        path = self._path(index)
        try:
            _write(path, _sealed(_content(parts, self._vocabulary)))
        except OSError as error:
            raise write_error(path, error) from error
        return True

    def pieces(self) -> Iterator[ReferenceRows]:
        """Yield what is kept of every window, in pieces of PIECE_ROWS.

        Raises:
            DamagedError: a window was changed since `missing` looked.
        """
        for index, ids in enumerate(self._windows):
            rows = self._load(index)
            if rows is None:
                raise DamagedError(
                    f"{shown_path(self._path(index))} was changed while qtool worked",
                    "run the same command again: the window is computed anew",
                )
            for start in range(0, len(ids), PIECE_ROWS):
                yield rows.rows(start, start + PIECE_ROWS)

    def _path(self, index: int) -> Path:
        return self._folder / f"{self._names[index]}.logits"

    def _load(self, index: int) -> ShortRows | None:
        """Read a window; None if it is not what was written."""
        try:
            file, size = open_regular(self._path(index))
            with file:
                if size > self._most_bytes(len(self._windows[index])):
                    return None
                raw = file.read(size)
        except (OSError, DamagedError):
            return None
        if hashlib.sha256(raw[DIGEST_BYTES:]).digest() != raw[:DIGEST_BYTES]:
            return None
        try:
            return self._rows(load(raw[DIGEST_BYTES:]), len(self._windows[index]))
        except (SafetensorError, KeyError):
            return None

    def _most_bytes(self, length: int) -> int:
        """Return what the file of a window never exceeds."""
        row = 16 * (TOP + DRAWN) + 64
        kept = len(_kept(0, length, length)) * (8 * self._vocabulary + 8)
        return length * row + kept + MAX_HEADER_BYTES

    def _rows(self, found: Mapping[str, Tensor], length: int) -> ShortRows | None:
        """Return what a file holds, None if that does not fit the window."""
        names = ("ids", "likeliest", "logs", "tail", "losses", "kept", "whole")
        ids, likeliest, logs, tail, losses, kept, whole = (found[name] for name in names)
        n_top = min(TOP, self._vocabulary)
        width = n_top + (DRAWN if n_top < self._vocabulary else 0)
        expected = _kept(0, length, length)
        if (
            ids.shape != (length, width)
            or logs.shape != ids.shape
            or likeliest.shape != (length,)
            or tail.shape != (length,)
            or losses.shape != (length,)
            or not torch.equal(kept, expected)
            or whole.shape != (len(expected), self._vocabulary)
            or not all(x.is_floating_point() for x in (logs, tail, losses, whole))
            or any(x.is_floating_point() or x.is_complex() for x in (ids, likeliest))
            or not bool(torch.isfinite(losses).all())
        ):
            return None
        wide = ids.to(torch.int64)
        if int(wide.min()) < 0 or int(wide.max()) >= self._vocabulary:
            return None
        return ShortRows(wide, likeliest.to(torch.int64), logs, tail, losses, n_top, kept, whole)


def _window_name(ids: Tensor) -> str:
    raw = ids.contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(raw).hexdigest()[:NAME_LENGTH]


def _kept(start: int, stop: int, length: int) -> Tensor:
    """Return which rows of `start` to `stop` are kept whole, counted from `start`; one at least.

    They stand in the middle of every ROWS_PER_WHOLE_ONE rows.
    """
    step = min(ROWS_PER_WHOLE_ONE, length)
    rows = torch.arange(step // 2, length, step)
    return rows[(rows >= start) & (rows < stop)] - start


def _content(parts: list[ShortRows], vocabulary: int) -> bytes:
    """Return the pieces of a window as safetensors."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts]).contiguous()

    starts = torch.tensor([0, *(len(part.ids) for part in parts[:-1])]).cumsum(0)
    kept = [part.kept + start for part, start in zip(parts, starts, strict=True)]
    narrow = torch.uint16 if vocabulary <= SMALL_IDS else torch.int32
    tensors = {name: joined(name) for name in ("logs", "tail", "losses", "whole")}
    tokens = {name: joined(name).to(narrow) for name in ("ids", "likeliest")}
    return save({**tensors, **tokens, "kept": torch.cat(kept)})


def _sealed(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not _writes_on(left.suffix[1:]):
            left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # of a process that had the same number, or a link
        partial.touch(exist_ok=False)
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # gone with its new name; else the next process tries
            partial.unlink(missing_ok=True)


def _writes_on(process: str) -> bool:
    """Tell whether a process, by its number, is still there to finish what it writes."""
    if not process.isdigit():
        return True  # not one of ours
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()


def write_error(path: Path, error: OSError) -> QtoolError:
    """Return the refusal that tells a user why the cache could not be written."""
    message = f"cannot write the logits cache {shown_path(path)}: {error.strerror or error}"
    if error.errno in FULL_DISK or error.errno == errno.ENOMEM:
        # What is in it already is found again.
        hint = "free some space or choose another --logits-cache"
        return CapacityError(message, hint, resumable=True)
    return UsageError(message, "choose a directory for --logits-cache that you may write to")


def identity(checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Return what tells a model's weights and configuration from any other's.

    A model from the hub is known by its commit. Files on this machine are hashed, once for each
    size and time of change; the hashes are noted in `directory`.

    Raises:
        UsageError, CapacityError: the directory cannot be written.
        DamagedError: a weight file cannot be read.
    """
    if checkpoint.revision is not None:
        return {"model": checkpoint.source, "revision": checkpoint.revision}
    files = sorted({ref.file for ref in checkpoint.refs.values()})
    if not checkpoint.gguf:
        files.append(checkpoint.path / CONFIG_FILE)
    known = _known_weights(directory)
    found: dict[str, str] = {}
    for file in files:
        try:
            found[file.name] = _hashed(file, known)
        except OSError as error:
            raise DamagedError(
                f"cannot read {shown_path(file)}: {error.strerror}", "check its permissions"
            ) from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / WEIGHTS_FILE, json.dumps(known, indent=2).encode())
    except OSError as error:
        raise write_error(directory, error) from error
    return {"files": found}


def _hashed(file: Path, known: dict[str, Any]) -> str:
    """Return a file's SHA-256, from `known` if it has not changed since."""
    state = file.stat()
    mark = [state.st_size, state.st_mtime_ns]
    entry = known.get(str(file))
    if isinstance(entry, list) and entry[:2] == mark and len(entry) == 3:
        noted = str(entry[2])
        if re.fullmatch("[0-9a-f]{64}", noted):
            return noted
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
    known[str(file)] = [*mark, digest.hexdigest()]
    return digest.hexdigest()


def _known_weights(directory: Path) -> dict[str, Any]:
    """Return the hashes noted earlier; none if the file is not what was written."""
    try:
        return read_json_object(directory / WEIGHTS_FILE, max_bytes=MAX_WEIGHTS_BYTES)
    except DamagedError:
        return {}
