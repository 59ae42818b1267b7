"""Find a model's shape wherever it is described: a size, a name, config.json, or headers.

Nothing here imports torch or transformers, and no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qtool.checkpoint.gguf_split import model_stem
from qtool.checkpoint.header import INDEX_FILE, SINGLE_FILE, TensorRef, checkpoint_refs
from qtool.checkpoint.locate import CONFIG_FILE, Checkpoint, extra_files, locate, read_config
from qtool.checkpoint.untrusted import present, shown_path
from qtool.errors import HubError, QtoolError, UnsupportedError, UsageError
from qtool.memory.catalogue import find_shape
from qtool.memory.file_sizes import FormatBytes, existing_gguf
from qtool.memory.file_sizes import Part as BytesPart
from qtool.memory.shape import ModelShape
from qtool.memory.shape_of_files import shape_of_headers, with_tokenizer
from qtool.memory.shape_of_gguf import shape_of_gguf
from qtool.model.family import FAMILIES
from qtool.pipeline.card import original_card

# A larger tokenizer takes longer to read than an estimate may; its part of a GGUF file is known
# well enough without.
QUICK_TOKENIZER_BYTES = 1 << 20
BY_HAND = "give the shape by hand: a size such as 8b, or a directory with its config.json"


@dataclass(frozen=True)
class FoundModel:
    """A model as far as an estimate needs it.

    Args:
        given: as the user wrote it, for the next command.
        shape: of it.
        assumed: one sentence on what was assumed of a size; empty where a model was named.
        others: names of other models that may have been meant.
        stored: the bytes that it has, if it is quantized already.
        here: whether there is something that other commands can open.
    """

    given: str
    shape: ModelShape
    assumed: str = ""
    others: tuple[str, ...] = ()
    stored: FormatBytes | None = None
    here: bool = True


def find_model(
    text: str, *, revision: str | None = None, offline: bool = False, thorough: bool = False
) -> FoundModel:
    """Find the shape of a directory, a GGUF file, a hub id, or of the model that a size means.

    Args:
        text: as the user wrote it.
        revision: branch, tag or commit on the hub.
        offline: use only what the hub's cache on this machine holds.
        thorough: read tokenizers of any size, for headers of GGUF files that are exact.

    Raises:
        UsageError: none of these.
        DamagedError: a configuration or header is absurd.
        UnsupportedError: a file of another kind.
        HubError: the hub, the network or authentication; says how to do without.
    """
    if not text.strip():
        raise UsageError("no model was named", BY_HAND)
    path = Path(text).expanduser()
    kind = _kind(path)
    if kind == "directory" and not (path / CONFIG_FILE).exists():
        path, kind = _lone_gguf(path)
    if kind == "directory":
        directory = path.resolve()
        refs: Mapping[str, TensorRef] = {}
        if any(present(directory / name) for name in (SINGLE_FILE, INDEX_FILE)):
            refs = checkpoint_refs(directory)
        return _described(directory, directory.name, text, refs, thorough=thorough)
    if kind == "file":
        checkpoint = locate(str(path), revision, offline, headers_only=True, gguf=True)
        if not checkpoint.gguf:
            raise UsageError(
                f"{shown_path(path)} is one file of a model", f"give its directory; or {BY_HAND}"
            )
        return _of_gguf(checkpoint, text)
    if text.startswith((".", "/", "~")) or path.suffix in {".gguf", ".safetensors", ".json"}:
        raise UsageError(f"there is no {shown_path(path)}", f"check the path; or {BY_HAND}")
    if "/" in text:
        return _of_hub(text, revision, offline=offline, thorough=thorough)
    found = find_shape(text)
    return FoundModel(text, found.shape, found.assumed, found.others, here=False)


def _kind(path: Path) -> str:
    try:
        return "directory" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, ValueError):  # a name too long, a zero byte
        return ""


def _lone_gguf(directory: Path) -> tuple[Path, str]:
    """Return the GGUF file that a directory without config.json holds, if it is one model's."""
    files = sorted(directory.glob("*.gguf"))
    one = len({model_stem(file.name) for file in files}) == 1
    return (files[0], "file") if one else (directory, "directory")


def _of_hub(text: str, revision: str | None, *, offline: bool, thorough: bool) -> FoundModel:
    from qtool.checkpoint.hub import fetch, remote_refs

    hub_id, _, tail = text.partition("@")
    try:
        directory = fetch(hub_id, tail or revision, offline=offline, headers_only=True)
    except HubError as error:
        known = ""
        with suppress(UsageError):
            known = f"{find_shape(hub_id).shape.name} is known by its name; "
        raise HubError(error.message, f"{known}{BY_HAND}; {error.hint}") from error
    refs: Mapping[str, TensorRef] = {}
    try:
        refs = remote_refs(hub_id, directory, offline=offline)
    except (HubError, UnsupportedError):  # config.json alone is enough
        refs = {}
    return _described(directory, hub_id.rpartition("/")[2], text, refs, thorough=thorough)


def _described(
    directory: Path, name: str, given: str, refs: Mapping[str, TensorRef], *, thorough: bool
) -> FoundModel:
    """Return what config.json says, and headers and tokenizer where they are there."""
    config = read_config(directory)
    checkpoint = Checkpoint(directory, name, given, None, config, refs, extra_files(directory))
    shape = shape_of_headers(checkpoint)
    if refs and config.get("quantization_config"):
        return FoundModel(given, shape, stored=stored_directory(shape, refs, config))
    tokenizer = directory / "tokenizer.json"
    quick = tokenizer.exists() and (thorough or tokenizer.stat().st_size <= QUICK_TOKENIZER_BYTES)
    if quick and config.get("model_type") in FAMILIES:
        try:
            known = with_tokenizer(shape, checkpoint, card=original_card(directory))
        except QtoolError:  # a file of it cannot be made: its header is estimated then
            known = shape
        shape = shape if known.vocabulary != shape.vocabulary else known
    return FoundModel(given, shape)


def stored_directory(
    shape: ModelShape, refs: Mapping[str, TensorRef], config: Mapping[str, object]
) -> FormatBytes:
    """Return the bytes of a quantized directory as its headers tell them."""
    declared = config.get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    total = sum(ref.n_bytes for ref in refs.values())
    starts: dict[Path, int] = {}
    for ref in refs.values():
        starts[ref.file] = min(ref.start, starts.get(ref.file, ref.start))
    headers = sum(starts.values())
    return FormatBytes(
        name=str(method or "quantized"),
        bits_per_weight=8 * total / shape.parameters,
        file_bytes=total + headers,
        weights_bytes=total,
        parts=(
            BytesPart("tensors", total, f"{len(refs)} tensors, from their headers"),
            BytesPart("headers", headers, f"of {len(starts)} files"),
        ),
        exact=True,
        block_bytes=_blocks(refs, shape.blocks),
    )


def _blocks(refs: Mapping[str, TensorRef], count: int) -> tuple[int, ...]:
    """Add up what lies in each block; the first number in a name says which that is."""
    found = [0] * count
    for name, ref in refs.items():
        block = next((int(part) for part in name.split(".") if part.isdecimal()), count)
        if block < count:
            found[block] += ref.n_bytes
    return tuple(found)


def _of_gguf(checkpoint: Checkpoint, given: str) -> FoundModel:
    """Return the shape and the bytes of a GGUF file, exact from its header."""
    from qtool.pipeline.inspect_gguf import inspect_gguf

    container = inspect_gguf(checkpoint)["gguf"]
    if container["statistics"]:
        raise UsageError(f"{shown_path(Path(given))} holds statistics, not a model", BY_HAND)
    shape, stored = shape_of_gguf(checkpoint.gguf)
    whole = sum(part.file_bytes for part in checkpoint.gguf)
    exact = existing_gguf(shape, stored, whole, f"gguf:{container['file_type'] or 'mixed'}")
    return FoundModel(given, replace(shape, name=checkpoint.name), stored=exact)
