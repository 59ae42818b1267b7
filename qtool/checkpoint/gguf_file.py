"""Lay a GGUF file out before a weight exists: the plan knows every header byte and every offset.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtool.checkpoint.gguf_bytes import key_entry, preamble, tensor_entry
from qtool.checkpoint.gguf_header import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAX_RANK
from qtool.checkpoint.gguf_split import (
    MAX_PARTS,
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    part_name,
)
from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.written_tensors import Place
from qtool.errors import UsageError
from qtool.ggml_types import GGML_TYPES

MOST_NAME_BYTES = 63  # of a tensor; llama.cpp refuses longer names


@dataclass(frozen=True)
class GgufTensor:
    """One tensor to be written; `kind` as ggml names it, `shape` as (rows, columns)."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """The length of its bytes."""
        return GGML_TYPES[self.kind].n_bytes(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """One file: its name, everything before the tensors' bytes, and its full size."""

    file: str
    header: bytes  # padded to the alignment
    n_bytes: int


@dataclass(frozen=True)
class GgufPlan:
    """Every byte of a GGUF model but the weights themselves."""

    files: tuple[GgufFile, ...]
    tensors: Mapping[str, GgufTensor]
    places: Mapping[str, Place]

    @property
    def tensor_bytes(self) -> int:
        """The bytes of all tensors, without headers and padding."""
        return sum(place.stop - place.start for place in self.places.values())

    @property
    def n_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.n_bytes for file in self.files)


def plan_gguf(
    metadata: Mapping[str, Value],
    tensors: Sequence[GgufTensor],
    *,
    file: str,
    max_bytes: int | None = None,
) -> GgufPlan:
    """Lay tensors out, in their order, in one file or in several of at most `max_bytes`.

    Args:
        metadata: key -> value; `general.alignment` is obeyed, and left out where it is 32.
        tensors: with distinct names; one larger than `max_bytes` gets a file of its own.
        file: name, ending in `.gguf`; of several, the parts are numbered before that ending.
        max_bytes: the most that one file may have, header included.

    Raises:
        DamagedError: a text of the metadata is not Unicode.
        UsageError: `max_bytes` would take more than 65535 files.
        ValueError: a name twice, a row that is no whole number of blocks, a value outside its kind
            (a bug in the caller).
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    if len(by_name) != len(tensors):
        raise ValueError("tensors to be stored need distinct names")
    if not file.endswith(".gguf") or file == ".gguf" or "/" in file:
        raise ValueError(f"'{file}' is not the name of a GGUF file")
    for tensor in tensors:
        _check_tensor(tensor)
    alignment = _alignment(metadata)
    keys = {
        key: key_entry(key, value)
        for key, value in metadata.items()
        if key != ALIGNMENT_KEY or alignment != DEFAULT_ALIGNMENT
    }
    packed = _pack(keys, tensors, alignment, max_bytes)
    files: list[GgufFile] = []
    places: dict[str, Place] = {}
    for i, group in enumerate(packed):
        named, own = file, keys
        if len(packed) > 1:
            named = part_name(file.removesuffix(".gguf"), i + 1, len(packed))
            own = (keys if i == 0 else {}) | _split_keys(i, len(packed), len(tensors), alignment)
        header = _header(own, group, alignment)
        position = len(header)
        for tensor in group:
            places[tensor.name] = Place(named, position, position + tensor.n_bytes)
            position += _aligned(tensor.n_bytes, alignment)
        files.append(GgufFile(named, header, position))
    return GgufPlan(tuple(files), by_name, places)


def _check_tensor(tensor: GgufTensor) -> None:
    n_name = len(tensor.name.encode())
    if not 0 < n_name <= MOST_NAME_BYTES:
        raise ValueError(f"'{tensor.name}': llama.cpp reads names of 1 to {MOST_NAME_BYTES} bytes")
    if not 0 < len(tensor.shape) <= MAX_RANK or min(tensor.shape) < 1:
        raise ValueError(f"'{tensor.name}' has the shape {tensor.shape}")
    if not GGML_TYPES[tensor.kind].fits(tensor.shape[-1]):
        raise ValueError(f"'{tensor.name}': rows of {tensor.shape[-1]} are no {tensor.kind} blocks")


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.content
    if value.kind != "u32" or type(number) is not int or number < 8 or number.bit_count() != 1:
        raise ValueError(f"{ALIGNMENT_KEY} is {value}")
    return number


def _aligned(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _pack(
    keys: Mapping[str, bytes],
    tensors: Sequence[GgufTensor],
    alignment: int,
    max_bytes: int | None,
) -> list[list[GgufTensor]]:
    """Distribute tensors over files, in their order."""
    whole = len(_header(keys, tensors, alignment))
    whole += sum(_aligned(tensor.n_bytes, alignment) for tensor in tensors)
    if max_bytes is None or whole <= max_bytes or len(tensors) < 2:
        return [list(tensors)]
    split = _split_keys(0, 2, len(tensors), alignment)
    bare = len(_header(split, (), 1))
    header = bare + sum(map(len, keys.values()))
    groups: list[list[GgufTensor]] = [[]]
    body = 0
    for tensor in tensors:
        entry, data = len(_tensor_entry(tensor, 0)), _aligned(tensor.n_bytes, alignment)
        if groups[-1] and _aligned(header + entry, alignment) + body + data > max_bytes:
            groups.append([])
            header, body = bare, 0
        groups[-1].append(tensor)
        header += entry
        body += data
    if len(groups) > MAX_PARTS:
        raise UsageError(
            f"files of at most {max_bytes} bytes would be {len(groups)}; GGUF has at most "
            f"{MAX_PARTS} parts",
            "allow larger files",
        )
    return groups


def _header(keys: Mapping[str, bytes], group: Sequence[GgufTensor], alignment: int) -> bytes:
    """Return everything before the tensors' bytes, padded so that those are aligned."""
    parts = [preamble(len(group), len(keys)), *keys.values()]
    offset = 0
    for tensor in group:
        parts.append(_tensor_entry(tensor, offset))
        offset += _aligned(tensor.n_bytes, alignment)
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _tensor_entry(tensor: GgufTensor, offset: int) -> bytes:
    return tensor_entry(tensor.name, GGML_TYPES[tensor.kind].number, tensor.shape, offset)


def _split_keys(number: int, count: int, n_tensors: int, alignment: int) -> dict[str, bytes]:
    values = {
        SPLIT_NUMBER: Value("u16", number),
        SPLIT_COUNT: Value("u16", count),
        SPLIT_TENSORS: Value("i32", n_tensors),
    }
    if alignment != DEFAULT_ALIGNMENT:
        values[ALIGNMENT_KEY] = Value("u32", alignment)
    return {key: key_entry(key, value) for key, value in values.items()}
