"""Tensors between a Hugging Face checkpoint and GGUF: names, order of rows, what norms add.

Both directions read the same literals, `Family.gguf`; llama.cpp's names come from the gguf
package. What llama.cpp expects: its conversion/ and src/models/ at b11549.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from qtool.checkpoint.untrusted import GET_AGAIN, printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.model.config_values import key_value_heads, whole
from qtool.model.family import Family
from qtool.model.gguf_rope import FACTOR_TENSORS, read_rope, rope_factors

EMBEDDING, FINAL_NORM = "model.embed_tokens", "model.norm"
MOST_BLOCKS = 512
# Buffers that checkpoints of older releases hold; both programs compute them again.
BUFFERS = re.compile(r"(\.rotary_emb\.inv_freq|\.attention\.bias|\.attention\.masked_bias)$")


class Shaped(Protocol):
    """Anything with a shape, such as a TensorRef."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows before columns."""


@dataclass(frozen=True)
class ConvertedTensor:
    """One tensor of a GGUF file and how it comes from the checkpoint.

    Args:
        name: llama.cpp's.
        source: the checkpoint's name of it; None for a tensor that is computed.
        shape: in the GGUF file, rows before columns.
        permuted_heads: the stored rows are `source[row_order(rows, permuted_heads)]`; 0 if they
            keep their order.
        offset: the stored values are the source's plus this, added in float32.
        rows: of the source that are stored, counted from the first.
        values: of a computed tensor.
        always_float: stored as F32 whatever the file's type.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    permuted_heads: int = 0
    offset: float = 0.0
    rows: int = 0
    values: tuple[float, ...] | None = None
    always_float: bool = False


@dataclass(frozen=True)
class RestoredTensor:
    """One tensor of a checkpoint and how it comes from a GGUF file.

    Args:
        name: in the checkpoint.
        source: llama.cpp's name of it.
        shape: in both.
        permuted_heads: the checkpoint's rows are `source[source_order(rows, permuted_heads)]`.
        offset: subtract it from the stored values.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    permuted_heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class _Slot:
    """A tensor that a model of the family may have, in both namings."""

    name: str  # llama.cpp's
    source: str  # the checkpoint's
    required: bool
    permuted_heads: int = 0
    offset: float = 0.0
    always_float: bool = False


def row_order(rows: int, heads: int) -> list[int]:
    """Return for each stored row the source row that it holds.

    llama.cpp's NORM rotation turns neighbours, transformers a head's first half with its second:
    row 2j of a stored head is row j of the source, row 2j + 1 is row j of the second half. Order
    weights, biases, codes and scales alike: `stored = source[row_order(rows, heads)]`.
    """
    half = rows // heads // 2
    return [
        head * 2 * half + part * half + row
        for head in range(heads)
        for row in range(half)
        for part in range(2)
    ]


def source_order(rows: int, heads: int) -> list[int]:
    """Return the inverse of `row_order`: `source = stored[source_order(rows, heads)]`."""
    order = [0] * rows
    for stored, source in enumerate(row_order(rows, heads)):
        order[source] = stored
    return order


def is_tied(config: Mapping[str, Any], family: Family) -> bool:
    """Return whether the embedding is the head, too.

    Raises:
        UnsupportedError: it is not, but llama.cpp reads no other head.
    """
    stated = config.get("tie_word_embeddings")
    tied = family.gguf.tied if stated is None else bool(stated)
    if not tied and family.gguf.head == "never":
        raise UnsupportedError(
            f"llama.cpp takes the embedding of {family.name} for its head, but here they differ",
            "run this model with transformers",
        )
    return tied


def converted_tensors(
    config: Mapping[str, Any],
    family: Family,
    refs: Mapping[str, Shaped],
    *,
    vocabulary: int | None = None,
) -> tuple[ConvertedTensor, ...]:
    """Return the tensors of the GGUF file: embedding, blocks, final norm, head, position factors.

    Args:
        config: config.json.
        family: of the model.
        refs: the checkpoint's tensors, logical ones: weights as if they were not quantized.
        vocabulary: tokens that the GGUF file will list, where they are fewer than the embedding's
            rows; rows beyond them are left out. None: all rows stay.

    Raises:
        UnsupportedError: a tensor that llama.cpp has no place for, or a vocabulary larger than the
            embedding.
        DamagedError: a tensor is missing, or its rows are not the heads of config.json.
    """
    slots = _slots(config, family)
    tied = is_tied(config, family)
    known = {slot.source for slot in slots}
    for name in refs:
        if name not in known and not BUFFERS.search(name):
            raise UnsupportedError(
                f"llama.cpp has no place for tensor '{printable(name)}' of {family.name}",
                "GGUF files hold the language model only; leave this tensor out of the checkpoint",
            )
    kept = _kept_rows(config, refs, vocabulary)
    found = []
    for slot in slots:
        source = slot.source
        if source == f"{family.head}.weight":
            if tied and family.gguf.head != "always":
                continue
            source = f"{EMBEDDING}.weight" if tied else source
        if source not in refs:
            if slot.required:
                raise DamagedError(f"the checkpoint has no tensor '{source}'", GET_AGAIN)
            continue
        found.append(_converted(slot, source, refs[source].shape, kept))
    for name, values in rope_factors(read_rope(config, family)).items():
        shape = (len(values),)
        found.append(ConvertedTensor(name, None, shape, values=values, always_float=True))
    return tuple(found)


def checkpoint_tensors(
    config: Mapping[str, Any], family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[RestoredTensor, ...]:
    """Return the checkpoint's tensors that the tensors of a GGUF file become.

    Args:
        config: what `checkpoint_config` made of the file's metadata.
        family: of the model.
        shapes: of the GGUF file's tensors, rows before columns, by llama.cpp's name.

    Raises:
        UnsupportedError: a tensor that transformers has no place for.
        DamagedError: a tensor is missing, or its rows are not the heads of the metadata.
    """
    slots = {slot.name: slot for slot in _slots(config, family)}
    for name in shapes:
        if name not in slots and name not in FACTOR_TENSORS:
            raise UnsupportedError(
                f"transformers has no place for tensor '{printable(name)}' of {family.name}",
                "convert this model back with the program that made it",
            )
    missing = [slot.name for slot in slots.values() if slot.required and slot.name not in shapes]
    missing = [name for name in missing if slots[name].source != f"{family.head}.weight"]
    if missing:
        raise DamagedError(f"the GGUF file has no tensor '{missing[0]}'", GET_AGAIN)
    found = []
    for slot in slots.values():
        if slot.name in shapes:
            shape = shapes[slot.name]
            _check_heads(slot.name, shape, slot.permuted_heads)
            found.append(
                RestoredTensor(slot.source, slot.name, shape, slot.permuted_heads, slot.offset)
            )
    return tuple(found)


def _slots(config: Mapping[str, Any], family: Family) -> tuple[_Slot, ...]:
    """Return every tensor that the family knows, in the order of the GGUF file."""
    gguf = family.gguf
    blocks = whole(config, "num_hidden_layers")
    if blocks > MOST_BLOCKS:
        raise UnsupportedError(
            f"llama.cpp runs at most {MOST_BLOCKS} blocks, not {blocks}",
            "check 'num_hidden_layers'",
        )
    counts = {
        "num_attention_heads": whole(config, "num_attention_heads"),
        "num_key_value_heads": key_value_heads(config),
    }
    heads = {path: counts[key] for path, key in gguf.interleaved}
    block_paths = [
        (f"{family.blocks}.{block}.{path}", path)
        for block in range(blocks)
        for path in gguf.tensors
    ]
    ends = [(FINAL_NORM, "norm"), (family.head, "")]
    paths = [EMBEDDING, *(full for full, _ in block_paths), FINAL_NORM]
    names = module_names(family, blocks, paths)
    names[family.head] = "output"
    slots = []
    for full, path in [(EMBEDDING, ""), *block_paths, *ends]:
        is_norm = path.endswith("norm")
        slots.append(
            _Slot(
                f"{names[full]}.weight",
                f"{full}.weight",
                required=True,
                permuted_heads=heads.get(path, 0),
                offset=family.norm_offset if is_norm else 0.0,
                always_float=is_norm,
            )
        )
        if path in gguf.biases:
            bias = f"{names[full]}.bias", f"{full}.bias"
            slots.append(_Slot(*bias, False, heads.get(path, 0), always_float=True))
    return tuple(slots)


def module_names(family: Family, blocks: int, paths: Iterable[str]) -> dict[str, str]:
    """Return llama.cpp's name of each module, from the gguf package."""
    import gguf

    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[family.gguf_architecture], blocks)
    names = {path: table.get_name(path) for path in paths}
    unknown = [path for path, name in names.items() if name is None]
    if unknown:
        raise UnsupportedError(
            f"the installed gguf package has no name for '{unknown[0]}' of {family.name}",
            "update it: pip install --upgrade gguf",
        )
    return {path: str(name) for path, name in names.items()}


def _kept_rows(
    config: Mapping[str, Any], refs: Mapping[str, Shaped], vocabulary: int | None
) -> int:
    """Return how many tokens the embedding and the head keep."""
    name = f"{EMBEDDING}.weight"
    if name not in refs:
        raise DamagedError(f"the checkpoint has no tensor '{name}'", GET_AGAIN)
    rows, declared = refs[name].shape[0], whole(config, "vocab_size")
    if rows != declared:
        raise DamagedError(
            f"'{name}' has {rows} rows where config.json declares a vocabulary of {declared}",
            GET_AGAIN,
        )
    if vocabulary is not None and vocabulary > rows:
        raise UnsupportedError(
            f"the tokenizer has {vocabulary} tokens, but '{name}' has only {rows} rows",
            "resize the embedding, or remove the tokens that were added to the tokenizer",
        )
    return rows if vocabulary is None else vocabulary


def _converted(slot: _Slot, source: str, shape: tuple[int, ...], kept: int) -> ConvertedTensor:
    _check_heads(source, shape, slot.permuted_heads)
    rows = kept if slot.name in {"token_embd.weight", "output.weight"} else shape[0]
    if rows > shape[0]:
        raise DamagedError(f"'{source}' has {shape[0]} rows for {rows} tokens", GET_AGAIN)
    return ConvertedTensor(
        slot.name,
        source,
        (rows, *shape[1:]),
        permuted_heads=slot.permuted_heads,
        offset=slot.offset,
        rows=rows,
        always_float=slot.always_float,
    )


def _check_heads(name: str, shape: tuple[int, ...], heads: int) -> None:
    if not shape or (heads and shape[0] % (2 * heads)):
        raise DamagedError(f"'{name}' has the shape {shape}, which is not {heads} heads", GET_AGAIN)
