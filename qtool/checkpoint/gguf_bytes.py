"""The bytes that a GGUF file has before its tensors, from typed values.

The inverse of `gguf_header`, kept apart from it so that each can be tested against the other and
against the gguf package.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from qtool.checkpoint.gguf_header import MAGIC, MAX_NAME_BYTES, SCALAR_FORMATS
from qtool.checkpoint.gguf_values import KINDS, Kind, Scalar, Value
from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError

VERSION = 3


def preamble(n_tensors: int, n_keys: int) -> bytes:
    """Return the first fields of a file."""
    return MAGIC + struct.pack("<IQQ", VERSION, n_tensors, n_keys)


def tensor_entry(name: str, number: int, shape: tuple[int, ...], offset: int) -> bytes:
    """Return what a file says of one tensor: `number` of its type, `shape` as (rows, columns)."""
    rank = len(shape)
    return _text(name, name) + struct.pack(f"<I{rank}QIQ", rank, *reversed(shape), number, offset)


def key_entry(key: str, value: Value) -> bytes:
    """Return a key with its value.

    Raises:
        DamagedError: a text is not Unicode.
        ValueError: a value outside its kind (a bug in the caller).
    """
    if not 0 < len(key.encode()) <= MAX_NAME_BYTES or value.kind == "array":
        raise ValueError(f"key '{key}' of kind {value.kind} cannot be stored")
    number = KINDS.index(value.kind)
    if not value.array:
        assert not isinstance(value.content, tuple)
        body = struct.pack("<I", number) + _items(key, value.kind, (value.content,))
    else:
        assert isinstance(value.content, tuple)
        body = struct.pack("<IIQ", KINDS.index("array"), number, len(value.content))
        body += _items(key, value.kind, value.content)
    return _text(key, key) + body


def _items(key: str, kind: Kind, content: Sequence[Scalar]) -> bytes:
    if kind == "string":
        return b"".join(_text(key, item) for item in content)
    try:
        return struct.pack(f"<{len(content)}{SCALAR_FORMATS[kind]}", *content)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"key '{key}' has a value that is no {kind}: {error}") from error


def _text(key: str, content: Scalar) -> bytes:
    """Return a string with its length; the surrogates of `read_gguf` become their bytes again."""
    if not isinstance(content, str):
        raise TypeError(f"key '{key}' has a value that is no string: {content}")
    try:
        raw = content.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DamagedError(
            f"the text of '{printable(key)}' is not Unicode at character {error.start}",
            "repair the model's tokenizer files, where it comes from",
        ) from error
    return struct.pack("<Q", len(raw)) + raw
