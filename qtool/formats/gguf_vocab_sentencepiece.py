"""The pieces of a SentencePiece tokenizer.model, read without the library.

The file is one protocol buffer, of which five fields matter here.
Source: src/sentencepiece_model.proto of https://github.com/google/sentencepiece
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoint.untrusted import open_regular, shown_path
from qtool.errors import DamagedError

MAX_MODEL_BYTES = 64 << 20
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types of the file
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_Field = int | bytes


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its number."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says.

    Args:
        kind: "bpe", "unigram", "word" or "char".
        prefix: a space is put before every text.
        normalizes: characters are rewritten by rules that llama.cpp does not have.
        squeezes: runs of spaces become one.
    """

    pieces: tuple[Piece, ...]
    kind: str
    prefix: bool
    normalizes: bool
    squeezes: bool


class _NotAModelError(ValueError):
    """The bytes do not follow the wire format."""


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
        DamagedError: it is not one.
    """
    file, size = open_regular(path)
    with file:
        if size > MAX_MODEL_BYTES:
            raise _refused(path, f"it has {size} bytes")
        raw = file.read(MAX_MODEL_BYTES)
    try:
        return _model(raw)
    except (_NotAModelError, UnicodeDecodeError) as error:
        raise _refused(path, str(error)) from error


def _refused(path: Path, reason: str) -> DamagedError:
    return DamagedError(
        f"{shown_path(path)} is not a SentencePiece model: {reason}",
        "download or copy the model again, or remove the file if tokenizer.json is whole",
    )


def _model(raw: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, _Field] = {}
    normalizer: dict[int, _Field] = {}
    for number, value in _fields(raw):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    if not pieces:
        raise _NotAModelError("it has no pieces")
    kind = trainer.get(3, 1)
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=MODEL_TYPES.get(kind, "other") if isinstance(kind, int) else "other",
        prefix=bool(normalizer.get(3, 1)),
        normalizes=bool(normalizer.get(2)),
        squeezes=bool(normalizer.get(4, 1)),
    )


def _piece(raw: bytes) -> Piece:
    fields = dict(_fields(raw))
    score, kind = fields.get(2, 0), fields.get(3, NORMAL)
    if not isinstance(kind, int):
        raise _NotAModelError("a piece has no type")
    number = struct.unpack("<f", score)[0] if isinstance(score, bytes) and len(score) == 4 else 0.0
    return Piece(_message(fields.get(1, b"")).decode(), number, kind)


def _message(value: _Field) -> bytes:
    if isinstance(value, int):
        raise _NotAModelError("a number stands where a message should")
    return value


def _fields(raw: bytes) -> Iterator[tuple[int, _Field]]:
    """Yield (field number, value): numbers as int, everything else as its bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(raw, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise _NotAModelError(f"unknown wire type {wire} at byte {at}")
        if at + length > len(raw):
            raise _NotAModelError(f"a field ends after the file at byte {at}")
        yield number, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            raise _NotAModelError("it ends within a number")
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _NotAModelError(f"a number has no end at byte {at}")
