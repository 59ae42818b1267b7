"""A reference's shortened logits on disk, so that they are computed once.

    DIR/KEY/WINDOW.logits    one window: SHA-256 of what follows, then safetensors

KEY stands for the reference, see `cache_directory`. WINDOW is a hash of the token ids, so a longer
run over the same text finds what a shorter one left. A window whose hash is not right is computed
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qtool.checkpoint.untrusted import open_regular, shown_path
from qtool.errors import DamagedError
from qtool.evaluation.cache_directory import NAME_LENGTH, cache_folder, write_error, write_whole
from qtool.evaluation.rows import PIECE_ROWS, ReferenceRows
from qtool.evaluation.short_rows import DRAWN, TOP, ShortRows, shortened

LAYOUT = 1
DIGEST_BYTES = 32
ROWS_PER_WHOLE_ONE = 256  # one row in so many is kept whole, to measure the error
MAX_HEADER_BYTES = 1 << 16
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
        self._folder = cache_folder(directory, whole)
        self._windows, self._vocabulary = windows, vocabulary
        self._names = [_window_name(ids) for ids in windows]

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
            write_whole(path, _sealed(_content(parts, self._vocabulary)))
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
