"""The table of contents of a safetensors checkpoint, read from its headers alone.

Everything is checked before a byte of weights is believed: a refusal names the file and the
tensor. This module never imports torch, so a bad directory is refused in milliseconds.

Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian header length, a JSON
object, then the tensors' bytes without holes).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.checkpoint.untrusted import (
    GET_AGAIN,
    open_regular,
    parse_json_object,
    present,
    printable,
    read_error,
    read_json_object,
    shown_path,
)
from qtool.errors import DamagedError, UnsupportedError, UsageError

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
SUB_BYTE_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2"})  # in the format, but no model uses them

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_INDEX_BYTES = 100_000_000
MAX_RANK = 32
LENGTH_BYTES = 8
MAX_NAME_BYTES = 255  # of a file, on every system that qtool runs on

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies."""

    name: str
    dtype: str  # as safetensors writes it, such as "BF16"
    shape: tuple[int, ...]
    file: Path
    start: int  # absolute byte offset of the first byte
    stop: int  # and of the byte after the last

    @property
    def n_bytes(self) -> int:
        """The length of its byte range."""
        return self.stop - self.start

    @property
    def n_elements(self) -> int:
        """The product of its shape, 1 for a scalar."""
        return math.prod(self.shape)


def read_header(path: Path) -> list[TensorRef]:
    """Read the tensors of one safetensors file, in the order of their bytes.

    Raises:
        DamagedError: the file is absent, truncated or malformed; names file and tensor.
        UnsupportedError: a dtype that takes less than a byte.
    """
    file, size = open_regular(path)
    with file:
        prefix = file.read(LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise _truncated(path, f"{size} bytes are no safetensors file")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise DamagedError(
                f"{shown_path(path)} claims a header of {length} bytes; the limit is "
                f"{MAX_HEADER_BYTES}",
                f"it is not a safetensors file or is corrupt; {GET_AGAIN}",
            )
        if LENGTH_BYTES + length > size:
            raise _truncated(path, f"header of {length} bytes in a file of {size}")
        raw = file.read(length)
    where = f"the header of {shown_path(path)}"
    if not raw.startswith(b"{"):
        raise DamagedError(f"{where} is not a JSON object", GET_AGAIN)
    entries = parse_json_object(raw, where)
    _check_metadata(entries.pop("__metadata__", {}), where)
    body = LENGTH_BYTES + length
    refs = [_tensor_ref(path, name, entry, body) for name, entry in entries.items()]
    refs.sort(key=lambda ref: (ref.start, ref.stop))
    _check_tiling(path, refs, body, size)
    return refs


def checkpoint_refs(directory: Path) -> dict[str, TensorRef]:
    """Read the tensors of a model directory: one file, or the shards that an index names.

    Raises:
        DamagedError: a file is absent, truncated or malformed, or index and shards disagree.
        UnsupportedError: there are only pickle weights, which qtool never opens.
        UsageError: there are no weights at all.
    """
    if present(directory / SINGLE_FILE):
        refuse_link_out(directory / SINGLE_FILE, directory)
        refs = {ref.name: ref for ref in read_header(directory / SINGLE_FILE)}
        place = directory / SINGLE_FILE
    elif present(directory / INDEX_FILE):
        refuse_link_out(directory / INDEX_FILE, directory)
        refs = _indexed_refs(directory)
        place = directory / INDEX_FILE
    else:
        raise _no_weights(directory)
    if not refs:
        raise DamagedError(f"{shown_path(place)} holds no tensors", GET_AGAIN)
    return refs


def _truncated(path: Path, detail: str) -> DamagedError:
    return DamagedError(f"{shown_path(path)} is truncated: {detail}", GET_AGAIN)


def _check_metadata(metadata: object, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedError(f"{where}: __metadata__ is not an object of strings", GET_AGAIN)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_shape(value: object) -> bool:
    """Tell a list of sizes whose strides fit 64 bits, which a dimension of 0 does not excuse."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_RANK
        and all(map(_is_size, value))
        and _is_size(math.prod(max(1, size) for size in value))
    )


def _tensor_ref(path: Path, name: str, entry: Any, body: int) -> TensorRef:
    """Check one entry of a header by itself."""
    where = f"{shown_path(path)}: tensor '{printable(name)}'"
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise DamagedError(f"{where} has a name that is not Unicode", GET_AGAIN)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DamagedError(
            f"{where} does not have exactly dtype, shape and data_offsets", GET_AGAIN
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in SUB_BYTE_DTYPES:
        raise UnsupportedError(
            f"{where} has dtype {dtype}, which qtool cannot read", "use a BF16 or F16 copy"
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise DamagedError(
            f"{where} has the unknown dtype '{printable(dtype)}'",
            f"safetensors has {', '.join(DTYPE_BYTES)}",
        )
    if not _is_shape(shape):
        raise DamagedError(f"{where} has the impossible shape {printable(shape)}", GET_AGAIN)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise DamagedError(
            f"{where} has the impossible data_offsets {printable(offsets)}", GET_AGAIN
        )
    start, stop = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if stop - start != needed:
        raise DamagedError(
            f"{where}: {dtype} {printable(shape)} takes {needed} bytes, its data_offsets "
            f"span {stop - start}",
            GET_AGAIN,
        )
    return TensorRef(name, dtype, tuple(shape), path, body + start, body + stop)


def _check_tiling(path: Path, refs: list[TensorRef], body: int, size: int) -> None:
    """Refuse tensors that overlap, leave holes, or do not end where the file does."""
    position = body
    for ref in refs:
        where = f"{shown_path(path)}: tensor '{printable(ref.name)}'"
        if ref.stop > size:
            raise _truncated(
                path, f"tensor '{printable(ref.name)}' ends at byte {ref.stop} of {size}"
            )
        if ref.start < position:
            raise DamagedError(f"{where} overlaps the one before it", GET_AGAIN)
        if ref.start > position:
            raise DamagedError(
                f"{where} begins {ref.start - position} bytes after the one before it ends",
                GET_AGAIN,
            )
        position = ref.stop
    if position != size:
        raise DamagedError(
            f"{shown_path(path)} has {size - position} bytes after its last tensor", GET_AGAIN
        )


def _indexed_refs(directory: Path) -> dict[str, TensorRef]:
    """Read every shard that the index names and hold both against each other."""
    index = directory / INDEX_FILE
    weight_map = _weight_map(index)
    shards = [_shard_path(index, name) for name in sorted(set(weight_map.values()))]
    refs: dict[str, TensorRef] = {}
    for shard in shards:
        for ref in read_header(shard):
            where = f"{shown_path(shard)}: tensor '{printable(ref.name)}'"
            if ref.name in refs:
                raise DamagedError(
                    f"{where} is also in {shown_path(refs[ref.name].file)}", GET_AGAIN
                )
            if ref.name not in weight_map:
                raise DamagedError(f"{where} is not in {INDEX_FILE}", GET_AGAIN)
            if weight_map[ref.name] != shard.name:
                elsewhere = printable(weight_map[ref.name])
                raise DamagedError(f"{where} belongs in {elsewhere} by {INDEX_FILE}", GET_AGAIN)
            refs[ref.name] = ref
    for name, shard_name in weight_map.items():
        if name not in refs:
            raise DamagedError(
                f"{shown_path(directory / shard_name)} lacks the tensor '{printable(name)}' that "
                f"{INDEX_FILE} places there",
                GET_AGAIN,
            )
    return refs


def _weight_map(index: Path) -> Mapping[str, str]:
    content = read_json_object(index, max_bytes=MAX_INDEX_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise DamagedError(f"{shown_path(index)} has no object 'weight_map'", GET_AGAIN)
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise DamagedError(
                f"{shown_path(index)}: tensor '{printable(name)}' has no file name", GET_AGAIN
            )
    return weight_map


def _shard_path(index: Path, name: str) -> Path:
    """Return where a shard lies, refusing an index that points out of its own directory."""
    plain = name.endswith(".safetensors") and not set(name) & set("/\\\0") and name.isprintable()
    if not plain or len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise DamagedError(
            f"{shown_path(index)} names the shard '{printable(name)}', which is not a plain "
            ".safetensors file name",
            "do not trust this model; get it from its original source",
        )
    shard = index.parent / name
    if not shard.exists():
        raise DamagedError(
            f"{shown_path(shard)} is missing, though {INDEX_FILE} names it",
            "download the missing file, or the model again",
        )
    refuse_link_out(shard, index.parent)
    return shard


def refuse_link_out(path: Path, directory: Path) -> None:
    """Refuse a file that is a link to somewhere outside its model's directory.

    Raises:
        DamagedError: it is, and not into the hub's own cache.
    """
    try:
        target, home = path.resolve(strict=True), directory.resolve()
    except (FileNotFoundError, RuntimeError) as error:  # or a loop
        raise DamagedError(f"{shown_path(path)} is a link to nothing", GET_AGAIN) from error
    except OSError as error:
        raise read_error(path, error) from error
    # The hub's cache keeps files in models--x/blobs and links to them from models--x/snapshots/y.
    in_hub_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith(
        "models--"
    )
    inside = target.parent == path.parent.resolve() and target.is_relative_to(home)
    if not inside and not in_hub_cache:
        raise DamagedError(
            f"{shown_path(path)} is a link that leaves the model's directory",
            "put the file itself into the directory if you trust it",
        )


def _no_weights(directory: Path) -> UnsupportedError | DamagedError | UsageError:
    """Say what a directory without readable weights has instead."""
    names = sorted(path.name for path in directory.iterdir())
    stray = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if stray:
        return DamagedError(
            f"{shown_path(directory)} has {printable(stray[0])} but neither {SINGLE_FILE} nor "
            f"{INDEX_FILE}",
            f"the index is missing; {GET_AGAIN}",
        )
    if pickles:
        return UnsupportedError(
            f"{shown_path(directory)} has only pickle weights ({printable(pickles[0])}), which "
            "qtool never opens: loading them runs code",
            "use a safetensors copy, or convert the model with save_pretrained() on a machine "
            "you can lose",
        )
    if ggufs:
        return UnsupportedError(
            f"{shown_path(directory)} is no model directory but holds GGUF files "
            f"({printable(ggufs[0])})",
            "name the file itself to inspect, export or eval it; to quantize, use the safetensors "
            "directory that it was made from",
        )
    if "config.json" in names:
        return DamagedError(
            f"{shown_path(directory)} has a config.json but no weights: {SINGLE_FILE} is missing",
            GET_AGAIN,
        )
    return UsageError(
        f"{shown_path(directory)} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}",
        "give the directory of a model in Hugging Face layout",
    )
