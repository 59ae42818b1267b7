"""The shape of a model from its directory: config.json, headers, and for GGUF its tokenizer.

The configuration says which tensors there must be, the headers what they are called, and of which
dtype they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qtool.checkpoint.gguf_bytes import key_entry
from qtool.checkpoint.gguf_values import Value, u32
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import Checkpoint
from qtool.formats.gguf_vocab import vocabulary
from qtool.formats.protocol import FORMATS
from qtool.memory.expected_tensors import check_tensors, llama_name
from qtool.memory.shape import ModelShape, TensorSpec
from qtool.memory.shape_of_config import shape_of_config
from qtool.memory.shape_of_gguf import shape_of_gguf
from qtool.model.family import FAMILIES
from qtool.model.gguf_metadata import model_metadata

__all__ = ["header_keys", "shape_of_gguf", "shape_of_headers", "with_tokenizer"]


def shape_of_headers(checkpoint: Checkpoint) -> ModelShape:
    """Return the shape of a directory or hub model, from config.json and what its headers say.

    Weights of the families that qtool quantizes get their names and dtypes in the checkpoint, so
    that sizes of directories are exact to the byte. Of others config.json alone decides.

    Raises:
        DamagedError: a number of config.json is missing or impossible, or a header contradicts it.
    """
    shape = shape_of_config(checkpoint.config, name=checkpoint.name)
    family = FAMILIES[str(checkpoint.config["model_type"])] if _has_family(checkpoint) else None
    if family is None or not checkpoint.refs:
        return shape
    declared = checkpoint.config.get("quantization_config")
    if declared:
        # How others than these formats call what they pack is not known here.
        if isinstance(declared, dict) and declared.get("quant_method") in tuple(FORMATS):
            check_tensors(checkpoint, family, shape)
        return shape
    check_tensors(checkpoint, family, shape)
    found = {llama_name(name, family): ref for name, ref in checkpoint.refs.items()}
    tensors = []
    for tensor in shape.tensors:
        ref = None if tensor.computed else found.get(tensor.name)
        tensors.append(tensor if ref is None else replace(tensor, stored=(ref.name, ref.dtype)))
    return replace(shape, tensors=_in_order(tensors, checkpoint.refs), source=checkpoint.source)


def _in_order(
    tensors: Sequence[TensorSpec], refs: Mapping[str, TensorRef]
) -> tuple[TensorSpec, ...]:
    """Return tensors in the checkpoint's order, then what it does not have."""
    places = {name: place for place, name in enumerate(refs)}
    last = len(places)
    return tuple(sorted(tensors, key=lambda t: places[t.stored[0]] if t.stored else last))


def _has_family(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") in FAMILIES


def with_tokenizer(
    shape: ModelShape,
    checkpoint: Checkpoint,
    *,
    card: Mapping[str, Any] | None = None,
    pre: str | None = None,
) -> ModelShape:
    """Return the shape for GGUF files whose keys are known to the byte, from the tokenizer's files.

    Rows of the embedding that no token uses are left out of such a file, and so they are here.

    Args:
        shape: from `shape_of_headers`.
        checkpoint: of the model; a family that qtool quantizes.
        card: front matter of the model's README, as the writer of the file takes it.
        pre: name of the pre-tokenizer, instead of recognising one.

    Raises:
        UnsupportedError: something that llama.cpp cannot express.
        DamagedError: tokenizer files are missing or malformed.
    """
    config = checkpoint.config
    family = FAMILIES[str(config["model_type"])]
    words = vocabulary(checkpoint.path, size=shape.vocabulary, config=config, pre=pre)
    metadata = model_metadata(
        config,
        family,
        name=checkpoint.name,
        vocabulary=words.size,
        parameters=sum(ref.n_elements for ref in checkpoint.refs.values()),
        card=card,
    )
    tensors = tuple(
        replace(tensor, shape=(words.size, *tensor.shape[1:]))
        if tensor.name in {"token_embd.weight", "output.weight"}
        else tensor
        for tensor in shape.tensors
    )
    keys = header_keys({**metadata, **words.metadata})
    return replace(shape, tensors=tensors, vocabulary=words.size, header_bytes=keys)


def header_keys(metadata: Mapping[str, Value]) -> int:
    """Return the bytes of a quantized GGUF file's keys, those that say its type included."""
    types = {"general.file_type": u32(0), "general.quantization_version": u32(2)}
    return sum(len(key_entry(key, value)) for key, value in {**metadata, **types}.items())
