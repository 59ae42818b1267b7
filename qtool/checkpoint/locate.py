"""Find a model - a directory or a hub id - and read everything about it but its weights.

No torch, no transformers: config.json is parsed here, with bounds on the numbers that would
otherwise decide how much memory somebody else's library asks for.
"""

from __future__ import annotations

import errno
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtool.checkpoint.gguf_header import GgufContents, is_gguf
from qtool.checkpoint.gguf_split import model_stem, read_gguf_split
from qtool.checkpoint.header import (
    INDEX_FILE,
    PICKLE_SUFFIXES,
    TensorRef,
    checkpoint_refs,
    read_header,
    refuse_link_out,
)
from qtool.checkpoint.untrusted import (
    GET_AGAIN,
    printable,
    read_error,
    read_json_object,
    shown_path,
)
from qtool.errors import DamagedError, UnsupportedError, UsageError

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 16 << 20
MAX_DEPTH = 64  # of objects and lists inside each other

# Files that belong to a model beside its weights and are copied byte for byte.
KEPT_PATTERNS = (
    "*.json",
    "*.jinja",
    "*.tiktoken",
    "*.model",
    "merges.txt",
    "vocab.*",
    "added_tokens.*",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "additional_chat_templates/*.jinja",
)
# JSON that speaks of weights or of an earlier quantization, and what qtool itself writes.
DROPPED_PATTERNS = (
    CONFIG_FILE,
    "*.index.json",
    "quantize_config.json",
    "quantization_config.json",
    "quant_config.json",
    "quant_strategy.json",
    "hf_quant_config.json",
    "qtool-*.json",
)

# Programs and pickles, whatever they are called: never opened, never carried along.
CODE_SUFFIXES = PICKLE_SUFFIXES | {".py", ".pyc", ".pickle", ".npy", ".npz", ".so", ".dll", ".sh"}
MAX_COMPANION_BYTES = 512 << 20  # the largest tokenizer in use has 33 MB

# Key of config.json -> the largest value that is not absurd; all are positive integers.
LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 32,
}
# Families that give every layer its own size write these as lists.
MAY_BE_LISTS = frozenset({"intermediate_size", "num_attention_heads", "num_key_value_heads"})

LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine: where it is, what it says of itself, and where each tensor lies."""

    path: Path  # its directory
    name: str  # the last component of its id or path
    source: str  # as the user gave it: a hub id without revision, or a path
    revision: str | None  # the hub's commit hash; None for a directory
    config: Mapping[str, Any]  # config.json; empty for a lone .safetensors file
    refs: Mapping[str, TensorRef]
    extra_files: tuple[Path, ...]  # absolute; to be copied byte for byte, relative to `path`
    gguf: tuple[GgufContents, ...] = ()  # its parts where it is a GGUF file; then no config
    # File -> what would be another if somebody put other bytes there; files on the hub have none.
    marks: Mapping[Path, tuple[int, ...]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        files = {ref.file for ref in self.refs.values()} | set(self.extra_files)
        if not self.gguf:  # beside a GGUF file it is another model's
            files.add(self.path / CONFIG_FILE)
        found = {path: _mark(path) for path in sorted(files)}
        marks = {path: mark for path, mark in found.items() if mark is not None}
        object.__setattr__(self, "marks", marks)

    def check_unchanged(self) -> None:
        """Refuse what would be made from two models, when a file is not the one it was any more.

        Raises:
            DamagedError: names the file that was changed, replaced or removed since it was opened.
        """
        for path, mark in self.marks.items():
            if _mark(path) != mark:
                raise DamagedError(
                    f"{shown_path(path)} was changed while qtool worked",
                    "put back the file that was there when qtool started, or start over",
                    resumable=True,
                )

    @property
    def total_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(ref.n_bytes for ref in self.refs.values())

    @property
    def file_bytes(self) -> int:
        """The bytes of the files on this machine that hold the tensors, and of their index.

        Raises:
            DamagedError: one of them is gone.
        """
        if self.gguf:
            return sum(part.file_bytes for part in self.gguf)
        files = {ref.file for ref in self.refs.values()}
        index = self.path / INDEX_FILE
        if len(files) > 1 and index.is_file():
            files.add(index)
        try:
            return sum(file.stat().st_size for file in files)
        except OSError as error:
            raise DamagedError(
                f"cannot read the weights of {shown_path(self.path)}: {error.strerror}",
                "restore the file that was there when qtool started",
            ) from error


def locate(
    model: str,
    revision: str | None = None,
    offline: bool = False,
    *,
    headers_only: bool = False,
    gguf: bool = False,
) -> Checkpoint:
    """Find a model directory, or get a hub id, and read its configuration and headers.

    Args:
        model: a directory, a hub id, or a hub id with `@revision`.
        revision: branch, tag or commit on the hub.
        offline: use only what the hub's cache on this machine holds.
        headers_only: do not download weights, and accept a lone .safetensors file.
        gguf: accept a GGUF file, or any part of one in several; its metadata is in `gguf`.

    Raises:
        UsageError: no such path, or not a model.
        DamagedError: a file is missing, truncated, malformed or absurd.
        UnsupportedError: weights that qtool does not read.
        HubError: the hub, the network or authentication.
    """
    if not model:
        raise UsageError("no model was named", "give a directory or a hub id such as org/name")
    path = Path(model).expanduser()
    if _exists(path):
        if revision is not None:
            raise UsageError(
                f"{shown_path(path)} is on this machine, so it has no --revision",
                "leave --revision away, or give a hub id",
            )
        if path.is_dir():
            return _open_directory(path.resolve(), model)
        # A link keeps its name: blobs of the hub's cache are not called after the parts they are.
        named = path.parent.resolve() / path.name
        return _open_file(named, model, headers_only=headers_only, gguf=gguf)
    if _looks_like_a_path(model):
        raise UsageError(
            f"there is no {shown_path(path)}", "check the path, or give a hub id such as org/name"
        )
    from qtool.checkpoint.hub import fetch, remote_refs  # not needed for what is here already

    hub_id, _, tail = model.partition("@")
    directory = fetch(hub_id, tail or revision, offline=offline, headers_only=headers_only)
    refs = remote_refs(hub_id, directory, offline=offline) if headers_only else None
    found = _open_directory(directory, hub_id, refs)
    return replace(found, name=hub_id.rpartition("/")[2], revision=directory.name)


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json and refuse numbers that no model has.

    Raises:
        DamagedError: absent, not a JSON object, or a key with an absurd value.
    """
    path = directory / CONFIG_FILE
    if not path.exists():
        raise DamagedError(
            f"{shown_path(path)} is missing", "a model directory needs it; " + GET_AGAIN
        )
    config = read_json_object(path, max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise _absurd(path, "model_type", config.get("model_type"), "the name of a model family")
    _check_numbers(path, config, "")
    _check_values(path, config)
    inner = config.get("text_config")
    if isinstance(inner, dict):
        _check_numbers(path, inner, "text_config.")
    parts = [key for key in config if key.endswith("_config") and key != "quantization_config"]
    nested = any(isinstance(config[key], dict) for key in parts)
    if not nested and all(config.get(key) is None for key in LAYER_KEYS):
        raise _absurd(path, LAYER_KEYS[0], None, "a number of layers")
    declared = config.get("quantization_config")
    if declared is not None and not isinstance(declared, dict):
        raise _absurd(path, "quantization_config", declared, "an object")
    return config


def _check_numbers(path: Path, config: Mapping[str, Any], prefix: str) -> None:
    for key, largest in LARGEST.items():
        value = config.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) and value and key in MAY_BE_LISTS else [value]
        if not all(type(one) is int and 0 < one <= largest for one in values):
            expected = f"an integer from 1 to {largest}"
            raise _absurd(path, prefix + key, value, expected)
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise _absurd(path, prefix + "tie_word_embeddings", tied, "true or false")


def _check_values(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse NaN, which compares with nothing, and nesting that recursion would not survive."""
    waiting: list[tuple[str, object, int]] = [("", config, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if isinstance(value, float) and value != value:  # noqa: PLR0124 - only NaN is not itself
            raise _absurd(path, printable(key), value, "a number")
        if depth > MAX_DEPTH:
            raise DamagedError(
                f"{shown_path(path)} is nested more than {MAX_DEPTH} deep", GET_AGAIN
            )
        items: Iterable[tuple[object, object]] = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        waiting += [(f"{key}.{name}" if key else str(name), one, depth + 1) for name, one in items]


def _absurd(path: Path, key: str, value: object, expected: str) -> DamagedError:
    shown = "no value" if value is None else printable(repr(value))
    return DamagedError(f"{shown_path(path)}: {key} is {shown}, not {expected}", GET_AGAIN)


def _mark(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def extra_files(directory: Path) -> tuple[Path, ...]:
    """List the files beside the weights that a copy of the model keeps, byte for byte.

    Raises:
        DamagedError: one of them is a link out of the directory, which would carry a file of this
            machine into the result, or is absurdly large.
    """
    found = {path for pattern in KEPT_PATTERNS for path in directory.glob(pattern)}
    kept = [
        path
        for path in sorted(found)
        if not any(fnmatch.fnmatch(path.name, p) for p in DROPPED_PATTERNS)
        and path.suffix.lower() not in CODE_SUFFIXES
        and path.is_file()  # False for a loop of links
    ]
    for path in kept:
        refuse_link_out(path, directory)
        size = path.stat().st_size
        if size > MAX_COMPANION_BYTES:
            raise DamagedError(
                f"{shown_path(path)} has {size} bytes, more than the {MAX_COMPANION_BYTES} that "
                "qtool carries along",
                "remove it from the directory if the model does not need it",
            )
    return tuple(kept)


def _open_directory(
    directory: Path, source: str, refs: Mapping[str, TensorRef] | None = None
) -> Checkpoint:
    try:
        refs = checkpoint_refs(directory) if refs is None else refs
        config = read_config(directory)
        extra = extra_files(directory)
    except OSError as error:
        raise read_error(Path(error.filename or directory), error) from error
    return Checkpoint(directory, directory.name, source, None, config, refs, extra)


def _open_file(path: Path, source: str, *, headers_only: bool, gguf: bool) -> Checkpoint:
    if is_gguf(path):
        if not gguf:
            raise UnsupportedError(
                f"{shown_path(path)} is a GGUF file, which qtool reads for inspect, export and "
                "eval only",
                "give the safetensors directory that it was made from",
            )
        parts = read_gguf_split(path)
        refs = {ref.name: ref for part in parts for ref in part.tensors}
        stem = model_stem(path.name)
        return Checkpoint(path.parent, stem, source, None, {}, refs, (), parts)
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{shown_path(path)} is a file, not a model",
            "give a model directory, a hub id, or to `qtool inspect` a .safetensors or .gguf file",
        )
    if not headers_only:
        raise UsageError(
            f"{shown_path(path)} is one file of a model",
            f"give its directory: {shown_path(path.parent)}",
        )
    refs = {ref.name: ref for ref in read_header(path)}
    return Checkpoint(path.parent, path.stem, source, None, {}, refs, ())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except ValueError:  # a zero byte
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise read_error(path, error) from error


def _looks_like_a_path(model: str) -> bool:
    """Tell a path that is not there from a hub id that may be."""
    return (
        not HUB_ID.fullmatch(model)
        or model.startswith(".")
        or model.endswith((".safetensors", ".gguf", ".json", ".bin"))
    )
