"""Bytes of a model's GGUF file, tensor by tensor: the writer's own table of mixes decides.

Published files are older than the table. What llama.cpp did otherwise: before 2026 it had another
rule for fused queries, keys and values, and none for the latents of MLA, which it stored as one
tensor until April 2025; in 2023 Q2_K had more bits, and experts were tensors of their own that
the rules did not see. Sources: llama-quant.cpp of b11549, and the sizes of published files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from qtool.errors import UsageError
from qtool.formats.gguf_file_types import (
    EIGHT_EXPERTS,
    FALCON,
    FileType,
    file_type_named,
)
from qtool.formats.gguf_mixes import COUNTED, ModelFacts, TensorShape, tensor_types
from qtool.formats.gguf_tensors import is_quantized, kept_type, slot_of
from qtool.ggml_types import GGML_TYPES
from qtool.memory.shape import ModelShape, TensorSpec

TODAY, FIRST = 2026, 2023
ALIGNMENT = 32
PREAMBLE = 24  # bytes of a file before its keys
# Of the key `general.quantization_version`: length of the name, name, type, 32-bit number.
VERSION_BYTES = 8 + len("general.quantization_version") + 4 + 4
# Not in the table because qtool does not write it; gpt-oss is published as it.
MXFP4 = "MXFP4"

# Before 2026: type of fused queries, keys and values; the base type in the others.
FUSED = {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}

# Rows of the embedding -> bytes of the keys in published files, nearly all of them the tokenizer.
KNOWN_KEYS = {
    32000: 724_000,
    32064: 726_000,
    32768: 742_000,
    49152: 1_770_000,
    100352: 3_550_000,
    102400: 3_980_000,
    128256: 7_815_000,
    131072: 7_860_000,
    151936: 5_935_000,
    152064: 5_935_000,
    201088: 13_000_000,
    256000: 6_030_000,
    262144: 6_380_000,
}
TOKEN_BYTES = 40  # of a token with its share of the merges, in other vocabularies


@dataclass(frozen=True)
class StoredType:
    """One tensor in a file.

    Args:
        tensor: what it is.
        type: ggml's name of how it is stored.
        n_bytes: without padding.
    """

    tensor: TensorSpec
    type: str
    n_bytes: int

    @property
    def padded(self) -> int:
        """Bytes with the padding behind it."""
        return -(-self.n_bytes // ALIGNMENT) * ALIGNMENT


def stored_types(
    shape: ModelShape, file_type: str, *, importance: bool, recipe: int = TODAY
) -> tuple[StoredType, ...]:
    """Return every tensor of a model's file with its type.

    Args:
        shape: of the model.
        file_type: name of a mix, or MXFP4.
        importance: whether it is made with an importance matrix.
        recipe: year of the llama.cpp that makes it.

    Raises:
        UsageError: an unknown type, or a year before 2023.
    """
    if recipe < FIRST:
        raise UsageError(
            f"there are no GGUF files of {recipe}", f"give a year from {FIRST} to {TODAY}"
        )
    tensors = _with_joined_latents(shape.tensors) if recipe < 2025 else shape.tensors
    own_experts = shape.architecture == "gpt-oss"
    if file_type.upper().removeprefix("GGUF:") == MXFP4:
        return tuple(_as_mxfp4(tensors))
    kind = file_type_named(file_type)
    speakers = _speakers(tensors, kind)
    chosen = tensor_types(
        kind.name,
        list({name: TensorShape(name, size) for name, size in speakers.values()}.values()),
        facts_of(shape),
        importance=importance,
        overrides=_overrides(shape, kind, recipe, own_experts=own_experts),
    )
    names = {name: chosen[speaker].type for name, (speaker, _) in speakers.items()}
    return tuple(_stored(tensor, names.get(tensor.name), recipe) for tensor in tensors)


def _speakers(
    tensors: Iterable[TensorSpec], kind: FileType
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for each quantized tensor one that gets the same type, by name, and its shape.

    Where no rule asks for a tensor's place among its like, the first of them speaks for all: large
    models have hundreds, and a table of all file types would take a second.
    """
    found = {}
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    for tensor in tensors:
        if len(tensor.shape) < 2:
            continue
        stem = tensor.name
        if stem.startswith("blk."):
            stem = stem.split(".", 2)[2]
        key = (stem, tensor.shape)
        if key in first:
            speaker = first[key]
        elif is_quantized(TensorShape(tensor.name, tensor.shape)):
            slot = slot_of(tensor.name)
            alike = slot not in COUNTED or (slot not in kind.rules and kind.name not in FALCON)
            first[key] = speaker = tensor.name if alike else ""
        else:
            first[key] = speaker = "-"
        if speaker != "-":
            found[tensor.name] = (speaker or tensor.name, tensor.shape)
    return found


def facts_of(shape: ModelShape) -> ModelFacts:
    """Return what the rules of a mix ask for."""
    return ModelFacts(
        shape.architecture,
        shape.blocks + shape.extra_blocks,
        shape.heads,
        shape.key_value_heads,
        shape.experts,
    )


def keys_estimate(vocabulary: int) -> int:
    """Return about how many bytes a file's keys take."""
    return KNOWN_KEYS.get(vocabulary, 20_000 + TOKEN_BYTES * vocabulary)


def entries_bytes(stored: Iterable[StoredType]) -> int:
    """Return the bytes of what a file says of each tensor: name, dimensions, type, offset."""
    return sum(24 + len(x.tensor.name.encode()) + 8 * len(x.tensor.shape) for x in stored)


def _stored(tensor: TensorSpec, chosen: str | None, recipe: int) -> StoredType:
    name = chosen or _kept_float(tensor, recipe)
    return StoredType(tensor, name, GGML_TYPES[name].n_bytes(tensor.shape))


@lru_cache(maxsize=1 << 14)
def _kept_float(tensor: TensorSpec, recipe: int) -> str:
    """Return the type of a tensor that is never quantized."""
    if recipe < 2024 and tensor.role == "router" and len(tensor.shape) > 1:
        return "F16"
    return kept_type(TensorShape(tensor.name, tensor.shape), "F16")


def _as_mxfp4(tensors: Iterable[TensorSpec]) -> Iterable[StoredType]:
    """Yield experts as MXFP4 and all other matrices as Q8_0."""
    for tensor in tensors:
        name = "Q8_0" if is_quantized(TensorShape(tensor.name, tensor.shape)) else None
        if name and tensor.role == "expert":
            name = MXFP4
        if name and not GGML_TYPES[name].fits(tensor.shape[-1]):
            name = "F16"
        yield _stored(tensor, name, TODAY)


def _overrides(
    shape: ModelShape, kind: FileType, recipe: int, *, own_experts: bool
) -> Sequence[tuple[str, str]]:
    """Return the types that stand above the rules of the table."""
    found = []
    if own_experts:  # published with experts in MXFP4, which every file of it keeps
        found.append(("re:_exps.weight$", MXFP4))
    if recipe < TODAY and kind.base in GGML_TYPES and kind.name not in {"F32", "F16", "BF16"}:
        found.append(("re:attn_qkv.weight$", FUSED.get(kind.name, kind.base)))
        found.append(("re:attn_kv_b.weight$", kind.base))
    if recipe < 2024 and kind.name == "Q2_K":
        found.append(("re:ffn_(gate|up).weight$", "Q3_K"))
    if recipe < 2024 and shape.experts:
        found.append(("re:_exps.weight$", kind.base))
        if kind.name in EIGHT_EXPERTS:
            found.append(("re:attn_output.weight$", kind.base))
    return found


def _with_joined_latents(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the tensors with MLA's two halves of `kv_b_proj` as the one that it was."""
    values = {t.name: t for t in tensors if t.name.endswith("attn_v_b.weight")}
    if not values:
        return tuple(tensors)
    found = []
    for tensor in tensors:
        if tensor.name in values:
            continue
        if tensor.name.endswith("attn_k_b.weight"):
            heads, latent, plain = tensor.shape
            value = values[tensor.name.replace("attn_k_b", "attn_v_b")].shape[1]
            tensor = replace(  # noqa: PLW2901
                tensor,
                name=tensor.name.replace("attn_k_b", "attn_kv_b"),
                shape=(heads * (plain + value), latent),
            )
        found.append(tensor)
    return tuple(found)
