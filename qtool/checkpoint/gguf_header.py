"""The table of contents of a GGUF file, read without its weights and without trusting it.

Every count and length is held against the bytes that are left before anything is made of it, so
no claim costs more memory than the file has header. A refusal names the file and the key or tensor.

Strings that stand alone must be UTF-8. Those in lists may hold any bytes, because vocabularies
have tokens that are parts of a character: they are decoded with `surrogateescape`, which encodes
back to the same bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from qtool.checkpoint.gguf_values import KINDS, Kind, Scalar, Value
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.untrusted import GET_AGAIN, open_regular, printable, shown_path
from qtool.errors import DamagedError, UnsupportedError
from qtool.ggml_types import TYPE_OF_NUMBER

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

# Letters of `struct`, little-endian.
SCALAR_FORMATS: Mapping[Kind, str] = {
    "u8": "B",
    "i8": "b",
    "u16": "H",
    "i16": "h",
    "u32": "I",
    "i32": "i",
    "f32": "f",
    "bool": "B",
    "u64": "Q",
    "i64": "q",
    "f64": "d",
}

# Far above every real file: a header of 2026's largest vocabulary has 20 MB and 1.3 M items.
MAX_HEADER_BYTES = 128 << 20
MAX_ITEMS = 1 << 23  # of all lists of a file together
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_NAME_BYTES = 65535  # of a key, by the specification
MAX_RANK = 4
MAX_ALIGNMENT = 1 << 20
FIRST_READ = 1 << 20

LEAST_KEY_BYTES = 8 + 1 + 4 + 1
LEAST_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8


@dataclass(frozen=True)
class GgufContents:
    """Everything that one GGUF file says before its tensors' bytes.

    Args:
        path: of the file.
        version: of the format.
        alignment: what the tensors' offsets are multiples of.
        metadata: key -> value, in the order of the file.
        tensors: in the order of the file, with shapes as (rows, columns).
        data_start: absolute byte offset that the tensors' offsets count from.
        file_bytes: size of the file.
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorRef, ...]
    data_start: int
    file_bytes: int


def is_gguf(path: Path) -> bool:
    """Tell a GGUF file by its name or, as other programs store it under a hash, its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        file, _ = open_regular(path)
    except DamagedError:
        return False
    with file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GgufContents:
    """Read what one GGUF file holds; its tensors' bytes are neither read nor mapped.

    Raises:
        DamagedError: the file is absent, truncated, malformed or absurd.
        UnsupportedError: another version, big-endian, or a tensor type that qtool does not know.
    """
    file, size = open_regular(path)
    with file:
        header = _Header(path, file, size)
        version, n_tensors, n_keys = _preamble(header)
        metadata = _metadata(header, n_keys)
        alignment = _alignment(path, metadata)
        entries = [_tensor_entry(header) for _ in range(n_tensors)]
    data_start = -(-header.position // alignment) * alignment
    tensors = tuple(_placed(path, entry, alignment, data_start, size) for entry in entries)
    _check_apart(path, tensors)
    return GgufContents(path, version, alignment, metadata, tensors, data_start, size)


class _Header:
    """The beginning of a file: as much of it in memory as was asked for, and a position.

    The buffer doubles, so a large vocabulary costs a few reads; it never outgrows the file.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self.items = 0
        self._file = file
        self._buffer = b""

    @property
    def left(self) -> int:
        """Bytes of the file that were not taken yet."""
        return self.size - self.position

    def refuse(self, what: str, hint: str = GET_AGAIN) -> NoReturn:
        """Raise the error of a malformed file."""
        raise DamagedError(f"{shown_path(self.path)}{what}", hint)

    def number(self, letter: str, what: str) -> int | float:
        """Take one number by its letter of `struct`."""
        return self.numbers(letter, 1, what)[0]

    def numbers(self, letter: str, count: int, what: str) -> tuple[int | float, ...]:
        """Take `count` numbers of one kind."""
        start = self.position
        self.position = self._reach(start + count * struct.calcsize(letter), what)
        return struct.unpack_from(f"<{count}{letter}", self._buffer, start)

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        """Take a string that must be UTF-8 and have at most `most` bytes."""
        length = int(self.number("Q", what))
        if length > most:
            self.refuse(f": {what} claims {length} bytes, more than the {most} qtool reads")
        start = self.position
        self.position = self._reach(start + length, what)
        try:
            return self._buffer[start : self.position].decode()
        except UnicodeDecodeError as error:
            self.refuse(f": {what} is not UTF-8 at byte {start + error.start}")

    def texts(self, count: int, what: str) -> tuple[str, ...]:
        """Take `count` strings of any bytes."""
        found = []
        buffer, position = self._buffer, self.position
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):  # hundreds of thousands: kept free of calls
            start = position + 8
            if start > len(buffer):
                self._reach(start, what)
                buffer = self._buffer
            position = start + unpack(buffer, position)[0]
            if position > len(buffer):
                self._reach(position, what)
                buffer = self._buffer
            found.append(buffer[start:position].decode("utf-8", "surrogateescape"))
        self.position = position
        return tuple(found)

    def _reach(self, stop: int, what: str) -> int:
        """Have the bytes before the absolute offset `stop` in the buffer, and return it."""
        if stop <= len(self._buffer):
            return stop
        if stop > self.size:
            self.refuse(f" is truncated: {what} ends at byte {stop} of {self.size}")
        if stop > MAX_HEADER_BYTES:
            self.refuse(
                f": {what} ends at byte {stop}; qtool reads headers of up to {MAX_HEADER_BYTES}"
            )
        wanted = min(max(stop, 2 * len(self._buffer), FIRST_READ), self.size, MAX_HEADER_BYTES)
        try:
            self._buffer += self._file.read(wanted - len(self._buffer))
        except OSError as error:
            self.refuse(f" cannot be read: {error.strerror}", "check the disk, or " + GET_AGAIN)
        if stop > len(self._buffer):  # it shrank since it was opened
            self.refuse(f" is cut short: {what} ends at byte {stop}, the file before")
        return stop


def _preamble(header: _Header) -> tuple[int, int, int]:
    """Take the first fields; return the version and how many tensors and keys there are."""
    if header.size < len(MAGIC):
        header.refuse(f" is truncated: {header.size} bytes are no GGUF file")
    magic = int(header.number("I", "its first field")).to_bytes(4, "little")
    if magic != MAGIC:
        header.refuse(" is not a GGUF file: it does not begin with GGUF")
    version = int(header.number("I", "its version"))
    if version not in VERSIONS:
        if version & 0xFFFF == 0 and version:
            raise UnsupportedError(
                f"{shown_path(header.path)} is a big-endian GGUF file",
                "convert it with gguf-convert-endian of the gguf package",
            )
        raise UnsupportedError(
            f"{shown_path(header.path)} has GGUF version {version}; qtool reads 2 and 3",
            "get a newer copy of the model" if version < 2 else "look for a newer qtool",
        )
    counts = []
    for what, most, least in (
        ("tensors", MAX_TENSORS, LEAST_TENSOR_BYTES),
        ("keys", MAX_KEYS, LEAST_KEY_BYTES),
    ):
        count = int(header.number("Q", f"its number of {what}"))
        if count > most:
            header.refuse(f" claims {count} {what}; the limit is {most}")
        if count * least > header.left:
            header.refuse(f" is truncated: {count} {what} in {header.left} bytes")
        counts.append(count)
    return version, counts[0], counts[1]


def _metadata(header: _Header, count: int) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for i in range(count):
        key = header.text(f"the name of key {i + 1} of {count}", MAX_NAME_BYTES)
        if not key:
            header.refuse(f": key {i + 1} of {count} has no name")
        if key in found:
            header.refuse(f" has the key '{printable(key)}' twice")
        found[key] = _value(header, f"key '{printable(key)}'")
    return found


def _kind(header: _Header, where: str) -> Kind:
    number = int(header.number("I", where))
    if number >= len(KINDS):
        header.refuse(f": {where} has the unknown kind of value {number}")
    return KINDS[number]


def _value(header: _Header, where: str) -> Value:
    kind = _kind(header, where)
    if kind == "array":
        return _array(header, where)
    if kind == "string":
        return Value(kind, header.text(where))
    number = header.number(SCALAR_FORMATS[kind], where)
    if kind == "bool":
        return Value(kind, _truths(header, (number,), where)[0])
    return Value(kind, number)


def _array(header: _Header, where: str) -> Value:
    kind = _kind(header, where)
    if kind == "array":
        raise UnsupportedError(
            f"{shown_path(header.path)}: {where} is a list of lists, which no model needs",
            "remove the key, for example with gguf-new-metadata of the gguf package",
        )
    count = int(header.number("Q", where))
    header.items += count
    if header.items > MAX_ITEMS:
        header.refuse(f": {where} claims {count} items; the limit for all lists is {MAX_ITEMS}")
    least = 8 if kind == "string" else struct.calcsize(SCALAR_FORMATS[kind])
    if count * least > header.left:
        header.refuse(f" is truncated: {where} claims {count} items in {header.left} bytes")
    if kind == "string":
        return Value(kind, header.texts(count, where), array=True)
    content: tuple[Scalar, ...] = header.numbers(SCALAR_FORMATS[kind], count, where)
    if kind == "bool":
        content = _truths(header, content, where)
    return Value(kind, content, array=True)


def _truths(header: _Header, content: tuple[Scalar, ...], where: str) -> tuple[bool, ...]:
    if not set(content) <= {0, 1}:
        header.refuse(f": {where} has a truth value that is neither 0 nor 1")
    return tuple(map(bool, content))


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.content
    plain = value.kind == "u32" and type(number) is int
    if plain and 8 <= number <= MAX_ALIGNMENT and number.bit_count() == 1:  # type: ignore[operator,union-attr]
        return number  # type: ignore[return-value]
    raise DamagedError(
        f"{shown_path(path)}: key '{ALIGNMENT_KEY}' is {printable(number)}, not a power of two "
        f"from 8 to {MAX_ALIGNMENT}",
        GET_AGAIN,
    )


@dataclass(frozen=True)
class _Entry:
    """One tensor as the header has it: dimensions reversed, its offset after `data_start`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def _tensor_entry(header: _Header) -> _Entry:
    """Take one tensor's entry and check it by itself."""
    name = header.text("the name of a tensor", MAX_NAME_BYTES)
    where = f"tensor '{printable(name)}'"
    if not name:
        header.refuse(" has a tensor without a name")
    rank = int(header.number("I", where))
    if rank > MAX_RANK:
        header.refuse(f": {where} claims {rank} dimensions; the limit is {MAX_RANK}")
    dimensions = header.numbers("Q", rank, where)
    shape = tuple(int(size) for size in reversed(dimensions))
    number = int(header.number("I", where))
    offset = int(header.number("Q", where))
    if not all(shape) or math.prod(shape) >= 2**63:
        header.refuse(f": {where} has the impossible shape {list(shape)}")
    if number not in TYPE_OF_NUMBER:
        raise UnsupportedError(
            f"{shown_path(header.path)}: {where} has the tensor type {number}, which qtool does "
            "not know",
            "look for a newer qtool, or get the model in another type",
        )
    kind = TYPE_OF_NUMBER[number]
    if not kind.fits(shape[-1] if shape else 1):
        header.refuse(f": {where} has rows of {shape[-1:]} weights, not blocks of {kind.block}")
    return _Entry(name, kind.name, shape, offset, kind.n_bytes(shape))


def _placed(path: Path, entry: _Entry, alignment: int, data_start: int, size: int) -> TensorRef:
    """Check that a tensor's bytes lie inside the file."""
    where = f"{shown_path(path)}: tensor '{printable(entry.name)}'"
    if entry.offset % alignment:
        raise DamagedError(
            f"{where} has the offset {entry.offset}, not a multiple of {alignment}", GET_AGAIN
        )
    start = data_start + entry.offset
    stop = start + entry.n_bytes
    if stop > size:
        raise DamagedError(
            f"{shown_path(path)} is truncated: tensor '{printable(entry.name)}' ends at byte "
            f"{stop} of {size}",
            GET_AGAIN,
        )
    return TensorRef(entry.name, entry.kind, entry.shape, path, start, stop)


def _check_apart(path: Path, tensors: tuple[TensorRef, ...]) -> None:
    """Refuse two tensors of one name, or that share bytes."""
    names: set[str] = set()
    for ref in tensors:
        if ref.name in names:
            raise DamagedError(
                f"{shown_path(path)} has the tensor '{printable(ref.name)}' twice", GET_AGAIN
            )
        names.add(ref.name)
    position, before = 0, ""
    for ref in sorted(tensors, key=lambda one: one.start):
        if ref.start < position:
            raise DamagedError(
                f"{shown_path(path)}: tensors '{printable(before)}' and '{printable(ref.name)}' "
                "overlap",
                GET_AGAIN,
            )
        position, before = ref.stop, ref.name
