"""Decide from its header whether a GGUF file may be converted or run; nothing here imports torch.

The header is well-formed when it comes here. Now its parts are held against each other, before
llama.cpp, which ends the process where they disagree, sees the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qtool.checkpoint.gguf_header import GgufContents
from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.untrusted import GET_AGAIN, naming, printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.evaluation.gguf_contents import check_is_model
from qtool.formats.gguf_tensors import block_of
from qtool.formats.gguf_tokenizer_files import tokenizer_files
from qtool.memory.expected_tensors import INTEGERS, OTHER_MODEL
from qtool.memory.shape_of_config import shape_of_config
from qtool.model.config_check import check_config
from qtool.model.conversion import checkpoint_tensors
from qtool.model.family import FAMILIES
from qtool.model.gguf_config import METADATA, checkpoint_config
from qtool.model.gguf_rope import FACTOR_TENSORS

TOKENIZER = "tokenizer.ggml."
TOKENS = TOKENIZER + "tokens"
TEMPLATE = "tokenizer.chat_template"
# Lists beside the tokens -> what their items are.
LISTS: Mapping[str, type] = {"token_type": int, "scores": float, "merges": str}
AS_MANY = frozenset({"token_type", "scores"})  # as there are tokens
KINDS = range(7)  # of tokens, in llama.cpp
NO_TOKEN = frozenset({-1, 2**32 - 1})  # how llama.cpp writes that there is none
COUNTS = ("block_count", "expert_count", "attention.head_count", "attention.head_count_kv")
MOST_FACTORS = 1 << 16
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def admit_gguf(parts: tuple[GgufContents, ...]) -> None:
    """Check a GGUF file, or one model in several, beyond what a header says by itself.

    Raises:
        UnsupportedError: it holds something else than a language model.
        DamagedError: tokenizer, settings and tensors contradict each other.
    """
    first = parts[0]
    refs = {ref.name: ref for part in parts for ref in part.tensors}
    for part in parts:
        with naming(part.path):
            _check_no_gaps(part)
    with naming(first.path):
        check_is_model(first)
        tokens = _check_tokenizer(first.metadata)
        embedding = refs.get(EMBEDDING)
        if tokens and embedding is not None and embedding.shape[0] != tokens:
            raise DamagedError(
                f"'{TOKENS}' lists {tokens} tokens, '{EMBEDDING}' has {embedding.shape[0]} rows",
                OTHER_MODEL,
            )
        _check_counts(first.metadata)
        _check_family(first.metadata, refs)


def check_restorable(parts: tuple[GgufContents, ...]) -> None:
    """Check that an admitted GGUF file can be written as a float directory for transformers.

    Raises:
        UnsupportedError: transformers has no such model or tokenizer.
        DamagedError: metadata are missing or impossible.
    """
    metadata = parts[0].metadata
    refs = {ref.name: ref for part in parts for ref in part.tensors}
    with naming(parts[0].path):
        config = _config(metadata, refs)
        shapes = {name: tuple(ref.shape) for name, ref in refs.items()}
        checkpoint_tensors(config, FAMILIES[config["model_type"]], shapes)
        tokenizer_files(metadata)


def _config(metadata: Mapping[str, Value], refs: Mapping[str, TensorRef]) -> dict[str, Any]:
    shapes = {name: tuple(ref.shape) for name, ref in refs.items()}
    factors = {name: _numbers(refs[name]) for name in FACTOR_TENSORS if name in refs}
    return checkpoint_config(metadata, shapes, factors)


def _check_no_gaps(part: GgufContents) -> None:
    """Refuse bytes that belong to no tensor, as llama.cpp does.

    A type or shape that was altered to a smaller one leaves them, and nothing else shows it.
    """
    position = part.data_start
    for ref in part.tensors:
        if ref.start != position:
            raise DamagedError(
                f"tensor '{printable(ref.name)}' begins at byte {ref.start}, where what stands "
                f"before it ends at {position}",
                GET_AGAIN,
            )
        position += -(-(ref.stop - ref.start) // part.alignment) * part.alignment


def _check_counts(metadata: Mapping[str, Value]) -> None:
    """Check that what an export counts by is a number, or one for each block."""
    architecture = metadata.get("general.architecture")
    for name in COUNTS:
        key = f"{architecture.content if architecture else ''}.{name}"
        value = metadata.get(key)
        content = () if value is None else value.content
        items = content if isinstance(content, tuple) else (content,)
        if value is not None and not all(type(one) is int for one in items):
            raise _wrong(key, value, "a whole number")


def _check_tokenizer(metadata: Mapping[str, Value]) -> int:
    """Check what the file says of its tokenizer; return how many tokens it has."""
    for key in (f"{TOKENIZER}model", f"{TOKENIZER}pre", TEMPLATE, "general.name"):
        value = metadata.get(key)
        if value is not None and not isinstance(value.content, str):
            raise _wrong(key, value, "a text")
    kind = metadata.get(f"{TOKENIZER}model")
    if kind is None:
        raise DamagedError(f"it has no tokenizer: no key '{TOKENIZER}model'", GET_AGAIN)
    if kind.content in {"no_vocab", "none"}:
        return 0
    tokens = _items(metadata, "tokens", str)
    if not tokens:
        raise DamagedError(f"it has no tokenizer: '{TOKENS}' lists no tokens", GET_AGAIN)
    if len(set(tokens)) != len(tokens):
        raise DamagedError(f"'{TOKENS}' lists a token twice", GET_AGAIN)
    _check_lists(metadata, len(tokens))
    for key, value in metadata.items():
        if not (key.startswith(TOKENIZER) and key.endswith("_token_id")):
            continue
        number = value.content
        if type(number) is not int or not (0 <= number < len(tokens) or number in NO_TOKEN):
            raise _wrong(key, value, f"one of {len(tokens)} tokens")
    return len(tokens)


def _check_lists(metadata: Mapping[str, Value], tokens: int) -> None:
    """Check the lists beside the tokens: as many items, of the right kind and range."""
    for name, item in LISTS.items():
        items = _items(metadata, name, item)
        if items is not None and name in AS_MANY and len(items) != tokens:
            raise DamagedError(
                f"'{TOKENIZER}{name}' has {len(items)} items for {tokens} tokens", GET_AGAIN
            )
    kinds = _items(metadata, "token_type", int) or ()
    if any(one not in KINDS for one in kinds):
        raise DamagedError(f"'{TOKENIZER}token_type' has a type of token beyond 6", GET_AGAIN)
    scores: Any = _items(metadata, "scores", float) or ()
    if not all(map(math.isfinite, scores)):
        raise DamagedError(f"'{TOKENIZER}scores' has a score that is not finite", GET_AGAIN)


def _items(metadata: Mapping[str, Value], name: str, kind: type) -> tuple[object, ...] | None:
    value = metadata.get(TOKENIZER + name)
    if value is None:
        return None
    content = value.content
    if not isinstance(content, tuple) or not all(type(one) is kind for one in content):
        raise _wrong(TOKENIZER + name, value, f"a list of {kind.__name__}")
    return content


def _check_family(metadata: Mapping[str, Value], refs: Mapping[str, TensorRef]) -> None:
    """Hold settings and tensors of a family that qtool knows against each other."""
    architecture = metadata["general.architecture"].content
    if all(FAMILIES[name].gguf_architecture != architecture for name in FAMILIES):
        return
    try:
        config = _config(metadata, refs)
    except UnsupportedError:  # a variant that llama.cpp may run all the same
        _check_vectors(refs)
        return
    check_config(config, FAMILIES[config["model_type"]], METADATA)
    _check_tensors(config, refs)


def _check_vectors(refs: Mapping[str, TensorRef]) -> None:
    """Refuse a matrix under the name of a bias, which is whose weight is then missing."""
    for name, ref in refs.items():
        if name.endswith(".bias") and len(ref.shape) > 1 and f"{name[:-5]}.weight" not in refs:
            raise DamagedError(
                f"tensor '{printable(name)}' has the shape {list(ref.shape)}, and there is no "
                f"'{printable(name[:-5])}.weight'",
                OTHER_MODEL,
            )


def _check_tensors(config: Mapping[str, Any], refs: Mapping[str, TensorRef]) -> None:
    """Check names, shapes and types of the tensors of a family that qtool knows."""
    shapes = {name: tuple(ref.shape) for name, ref in refs.items()}
    for tensor in shape_of_config(config, name="").tensors:
        if tensor.computed or tensor.name == HEAD:
            continue
        if tensor.name not in shapes:
            raise DamagedError(f"it has no tensor '{tensor.name}'", OTHER_MODEL)
        if shapes[tensor.name] != tuple(tensor.shape):
            raise DamagedError(
                f"tensor '{tensor.name}' has the shape {list(shapes[tensor.name])}, where "
                f"{METADATA} say {list(tensor.shape)}",
                OTHER_MODEL,
            )
    blocks = int(config["num_hidden_layers"])
    for name, ref in refs.items():
        if block_of(name) >= blocks:
            raise DamagedError(
                f"tensor '{printable(name)}' is of a block beyond the {blocks} that {METADATA} "
                "declare",
                OTHER_MODEL,
            )
        if ref.dtype in INTEGERS:
            raise DamagedError(
                f"tensor '{printable(name)}' is stored as {ref.dtype}, where weights belong",
                OTHER_MODEL,
            )
    head = shapes.get(HEAD)
    if head is not None and head != shapes[EMBEDDING]:
        raise DamagedError(
            f"tensor '{HEAD}' has the shape {list(head)}, '{EMBEDDING}' {list(shapes[EMBEDDING])}",
            OTHER_MODEL,
        )


def _numbers(ref: TensorRef) -> list[float]:
    """Return the values of a short vector of float32; none of anything else."""
    if ref.dtype != "F32" or ref.n_elements > MOST_FACTORS:
        raise DamagedError(f"tensor '{printable(ref.name)}' is no short vector of F32", GET_AGAIN)
    try:
        return [float(x) for x in np.fromfile(ref.file, "<f4", ref.n_elements, offset=ref.start)]
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}", GET_AGAIN) from error


def _wrong(key: str, value: Value, wanted: str) -> DamagedError:
    return DamagedError(
        f"key '{printable(key)}' is {printable(value.content)}, not {wanted}", GET_AGAIN
    )
