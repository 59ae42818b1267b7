"""What is odd about a GGUF file: where its name, its keys and its tensors disagree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import Checkpoint
from qtool.formats.gguf_file_types import FILE_TYPES
from qtool.ggml_types import FLOAT_TYPES, GGML_TYPES

# Types of files that the mixtures do not know, because nobody asks for them by name.
OTHER_FILE_TYPES = {38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0"}
NAMES = {kind.number: kind.name for kind in FILE_TYPES.values()} | OTHER_FILE_TYPES
SIZE_LETTER = re.compile(r"(?<=_K)_[SML]$")
BLOCK_NUMBER = re.compile(r"blk\.(\d{1,6})\.")


def file_type_name(metadata: Mapping[str, Value]) -> str | None:
    """Return what a file calls its mix of types, such as `Q4_K_M`; None where it does not say."""
    value = metadata.get("general.file_type")
    number = None if value is None else value.content
    return NAMES.get(number) if type(number) is int else None


def base_type(file_type: str) -> str:
    """Return the tensor type that most weights of a file type have."""
    if file_type in FILE_TYPES:
        return FILE_TYPES[file_type].base
    return SIZE_LETTER.sub("", file_type).removesuffix("_MOE")


def find_warnings(
    checkpoint: Checkpoint, architecture: Mapping[str, Any], bits_per_weight: float
) -> list[dict[str, str]]:
    """List where a GGUF file contradicts itself.

    Args:
        checkpoint: with its GGUF contents.
        architecture: as inspect reports it.
        bits_per_weight: over all tensors.
    """
    metadata, refs = checkpoint.gguf[0].metadata, checkpoint.refs
    general = metadata.get("general.type")
    if general is not None and general.content != "model":
        return []
    found = _type_warnings(refs, file_type_name(metadata), bits_per_weight)
    found += _block_warnings(refs, architecture["layers"])
    found += _vocabulary_warnings(refs, metadata)
    if "general.architecture" not in metadata:
        found.append(("no_architecture", "no general.architecture: no program can load it"))
    for part in checkpoint.gguf:
        end = max((ref.stop for ref in part.tensors), default=part.data_start)
        extra = part.file_bytes - end
        if extra >= part.alignment:
            found.append(
                ("extra_bytes", f"{part.path.name} has {extra} bytes after its last tensor")
            )
    return [{"code": code, "message": message} for code, message in found]


def _type_warnings(
    refs: Mapping[str, TensorRef], file_type: str | None, bits_per_weight: float
) -> list[tuple[str, str]]:
    """Tell a file type that the tensors do not bear out."""
    linears = {name: ref for name, ref in refs.items() if len(ref.shape) > 1}
    if file_type is None or not linears:
        return []
    base = GGML_TYPES[base_type(file_type)]
    really = f"it has {bits_per_weight:.2f} bits per weight"
    fallen = [
        ref
        for ref in linears.values()
        if ref.dtype not in {base.name, *FLOAT_TYPES} and not base.fits(ref.shape[-1])
    ]
    if fallen:
        kinds = ", ".join(sorted({ref.dtype for ref in fallen}))
        return [
            (
                "fallback_types",
                f"called {file_type}, but {len(fallen)} of {len(linears)} weights have rows that "
                f"are no multiple of {base.block} and are {kinds} instead: {really}",
            )
        ]
    quantized = {ref.dtype for ref in linears.values()} - FLOAT_TYPES
    if base.name in FLOAT_TYPES and quantized:
        kinds = ", ".join(sorted(quantized))
        return [("file_type", f"called {file_type}, but has weights in {kinds}: {really}")]
    if all(ref.dtype != base.name for ref in linears.values()):
        return [("file_type", f"called {file_type}, but no weight is {base.name}: {really}")]
    return []


def _block_warnings(refs: Mapping[str, TensorRef], declared: object) -> list[tuple[str, str]]:
    matches = map(BLOCK_NUMBER.match, refs)
    stored = len({int(match[1]) for match in matches if match})
    if type(declared) is int and stored and stored != declared:
        return [("layers", f"the metadata says {declared} blocks, the tensors have {stored}")]
    return []


def _vocabulary_warnings(
    refs: Mapping[str, TensorRef], metadata: Mapping[str, Value]
) -> list[tuple[str, str]]:
    if not refs:
        return []
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None or not isinstance(tokens.content, tuple):
        return [("no_tokenizer", "no tokens: the file needs a tokenizer from elsewhere")]
    found = []
    model, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model is not None and model.content == "gpt2":
        if pre is None or pre.content == "default":
            found.append(
                ("pretokenizer", "no tokenizer.ggml.pre: llama.cpp splits text by its default")
            )
        if "tokenizer.ggml.merges" not in metadata:
            found.append(("no_merges", "a BPE vocabulary without merges"))
    embedding = refs.get("token_embd.weight")
    if embedding is not None and embedding.shape[:1] != (len(tokens.content),):
        found.append(
            (
                "embedding",
                f"{len(tokens.content)} tokens, but embeddings of {list(embedding.shape)}",
            )
        )
    return found
