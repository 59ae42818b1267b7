"""Lay a safetensors checkpoint out before a weight is read, then fill in each tensor once.

The plan knows every header byte and every offset. The writer creates the files at their full
size with an empty (sparse) body, so finished tensors go straight to their final place in any
order and memory never holds more than one of them.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.header import DTYPE_BYTES, INDEX_FILE, LENGTH_BYTES, SINGLE_FILE, TensorRef
from qtool.checkpoint.reader import CHUNK_BYTES, DTYPE_NAMES, TensorReader, tensor_bytes
from qtool.checkpoint.untrusted import open_regular
from qtool.checkpoint.work_directory import sync
from qtool.checkpoint.written_tensors import Place, WrittenTensors

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
HEADER_ALIGNMENT = 8
METADATA = {"format": "pt"}  # transformers refuses a file that does not say so


@dataclass(frozen=True)
class StoredTensor:
    """One tensor to be written; `dtype` as safetensors writes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """The length of its bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One file: its name, everything before the tensors' bytes, and its full size."""

    file: str
    header: bytes  # with the 8 length bytes
    n_bytes: int


@dataclass(frozen=True)
class ShardPlan:
    """Every byte of a checkpoint's weight files but the weights themselves."""

    shards: tuple[Shard, ...]
    tensors: Mapping[str, StoredTensor]
    places: Mapping[str, Place]

    @property
    def tensor_bytes(self) -> int:
        """The bytes of all tensors, without headers."""
        return sum(place.stop - place.start for place in self.places.values())

    @property
    def n_bytes(self) -> int:
        """The bytes of all files, the index included."""
        return sum(shard.n_bytes for shard in self.shards) + len(self.index_bytes or b"")

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of the index file; None where one file holds everything."""
        if len(self.shards) == 1:
            return None
        return {
            "metadata": {"total_size": self.tensor_bytes},
            "weight_map": {name: place.file for name, place in self.places.items()},
        }

    @property
    def index_bytes(self) -> bytes | None:
        """The index file as it is written; None where one file holds everything."""
        index = self.index
        return None if index is None else (json.dumps(index, indent=2) + "\n").encode()


def plan_shards(
    tensors: Sequence[StoredTensor], max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
) -> ShardPlan:
    """Pack tensors, in their order, into files of at most `max_shard_bytes`, header included.

    A tensor larger than that gets a file of its own.

    Raises:
        ValueError: two tensors have one name, or there is no tensor.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    if len(by_name) != len(tensors) or not tensors:
        raise ValueError("tensors to be stored need distinct names, and there must be one")
    packed = _pack(tensors, max_shard_bytes)
    shards: list[Shard] = []
    places: dict[str, Place] = {}
    for number, group in enumerate(packed, start=1):
        file = SINGLE_FILE if len(packed) == 1 else _shard_name(number, len(packed))
        header = _header(group)
        position = len(header)
        for tensor in group:
            places[tensor.name] = Place(file, position, position + tensor.n_bytes)
            position += tensor.n_bytes
        shards.append(Shard(file, header, position))
    return ShardPlan(tuple(shards), by_name, places)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _pack(tensors: Sequence[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    groups: list[list[StoredTensor]] = []
    empty = LENGTH_BYTES + HEADER_ALIGNMENT + len(_json({"__metadata__": METADATA}))
    used = 0
    for tensor in tensors:
        # The offsets of an entry are not known yet: count them with the most digits they can have.
        entry = _json({tensor.name: _entry(tensor, 10**15, 10**15)})
        needed = len(entry) + tensor.n_bytes
        if not groups or used + needed > max_shard_bytes:
            groups.append([])
            used = empty
        groups[-1].append(tensor)
        used += needed
    return groups


def _entry(tensor: StoredTensor, start: int, stop: int) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def _header(group: Iterable[StoredTensor]) -> bytes:
    """Return the length bytes and the JSON of one file, padded so that its body is aligned."""
    content: dict[str, Any] = {"__metadata__": METADATA}
    position = 0
    for tensor in group:
        content[tensor.name] = _entry(tensor, position, position + tensor.n_bytes)
        position += tensor.n_bytes
    text = _json(content)
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


class ShardWriter:
    """Create the files of a plan in `directory` and fill in every tensor exactly once.

    A context manager: leaving it without an exception calls `close`.

    Args:
        plan: where everything goes.
        directory: an existing one.
        resume: take over what an earlier writer left under the same plan; see `tensors`.

    Raises:
        CapacityError: the disk is full.
        DamagedError: the disk failed.
    """

    def __init__(self, plan: ShardPlan, directory: Path, *, resume: bool = False) -> None:
        self._plan = plan
        self._directory = directory
        self.tensors = WrittenTensors(plan.places, directory.joinpath)
        for shard in plan.shards:
            path = directory / shard.file
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (0 if resume else os.O_EXCL)
                with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
                    file.write(shard.header)
                    file.truncate(shard.n_bytes)
            except OSError as error:
                raise write_error(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one CPU tensor to its place.

        Raises:
            RuntimeError: not planned so, or written before (a bug in the caller).
            CapacityError: the disk is full.
        """
        planned = self._plan.tensors.get(name)
        got = StoredTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        if got != planned:
            raise RuntimeError(f"planned {planned}, asked to write {got}")
        if tensor.device.type != "cpu":
            raise RuntimeError(f"'{name}' is on {tensor.device}, not on the CPU")
        self._put(name, [tensor_bytes(tensor.detach().contiguous())])

    def write_from(self, ref: TensorRef, name: str | None = None) -> None:
        """Copy one tensor's bytes from another file, under `name` if given.

        Raises:
            RuntimeError: not planned so, or written before (a bug in the caller).
            CapacityError: the disk is full.
            DamagedError: the source cannot be read to its end.
        """
        name = name or ref.name
        planned = self._plan.tensors.get(name)
        got = StoredTensor(name, ref.dtype, ref.shape)
        if got != planned:
            raise RuntimeError(f"planned {planned}, asked to copy {got}")
        with TensorReader({ref.name: ref}) as reader:
            self._put(name, reader.chunks(ref.name))

    def _put(self, name: str, chunks: Iterable[memoryview]) -> None:
        place = self.tensors.place(name)
        path = self._directory / place.file
        try:
            with path.open("r+b", buffering=0) as file:
                file.seek(place.start)
                for chunk in chunks:
                    written = 0
                    while written < len(chunk):
                        written += file.write(chunk[written:])
                if file.tell() != place.stop:
                    raise RuntimeError(f"'{name}' ended at {file.tell()}, not {place.stop}")
        except OSError as error:
            raise write_error(path, error) from error
        self.tensors.note(name)

    def close(self) -> None:
        """Put everything on the disk for good, and write the index if there are several files.

        Raises:
            RuntimeError: a tensor was never written (a bug in the caller).
            CapacityError: the disk is full.
        """
        self.tensors.check_complete()
        index = self._plan.index_bytes
        path = self._directory / INDEX_FILE
        try:
            if index is not None:
                path.write_bytes(index)
                sync(path)
            for shard in self._plan.shards:
                path = self._directory / shard.file
                sync(path)
        except OSError as error:
            raise write_error(path, error) from error

    def digests(self) -> dict[str, str]:
        """Return file name -> SHA-256 of every weight file, as read back from the disk."""
        return {
            shard.file: file_digest(self._directory / shard.file) for shard in self._plan.shards
        }


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading 16 MiB at a time.

    Raises:
        DamagedError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path)[0] as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
