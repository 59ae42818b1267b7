"""The shape of a model from the header of its GGUF file, and the type of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qtool.checkpoint.gguf_header import GgufContents
from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.untrusted import naming
from qtool.errors import DamagedError
from qtool.formats.gguf_tensors import block_of
from qtool.memory.gguf_sizes import PREAMBLE, StoredType, entries_bytes
from qtool.memory.shape import BlockCache, ModelShape, Role, TensorSpec

GGUF = "the GGUF metadata"


def shape_of_gguf(contents: tuple[GgufContents, ...]) -> tuple[ModelShape, tuple[StoredType, ...]]:
    """Return the shape of a GGUF file or its parts, and the type of every tensor.

    Raises:
        DamagedError: metadata that are missing or impossible, or no embedding.
    """
    with naming(contents[0].path):
        return _shape(contents)


def _shape(contents: tuple[GgufContents, ...]) -> tuple[ModelShape, tuple[StoredType, ...]]:
    first = contents[0]
    refs = [ref for part in contents for ref in part.tensors]
    architecture = first.metadata.get("general.architecture")
    if architecture is None or not isinstance(architecture.content, str):
        raise DamagedError(f"{GGUF} name no architecture", "get the file again")
    own = _Own(first.metadata, architecture.content)
    stored = tuple(
        StoredType(TensorSpec(ref.name, ref.shape, _role(ref)), ref.dtype, ref.n_bytes)
        for ref in refs
    )
    embedding = next((x.tensor for x in stored if x.tensor.name == "token_embd.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        raise DamagedError("the GGUF file has no tensor 'token_embd.weight'", "get the file again")
    extra = own.whole("nextn_predict_layers", 0)
    blocks = own.whole("block_count") - extra
    heads = own.each("attention.head_count", blocks, 1)
    keys = own.each("attention.head_count_kv", blocks, heads[0])
    title = first.metadata.get("general.name")
    used = own.whole("expert_used_count", 0)
    tied = all(x.tensor.name != "output.weight" for x in stored)
    hidden = embedding.shape[1]
    size = own.whole("attention.key_length", max(hidden // max(*heads, 1), 1))
    by_block = _shapes_by_block(refs)
    cache = tuple(
        _cache(own, by_block.get(block, {}), block, keys[block], size) for block in range(blocks)
    )
    shared = own.whole("attention.shared_kv_layers", 0)
    if shared:
        cache = tuple(
            replace(kept, shared=block >= blocks - shared) for block, kept in enumerate(cache)
        )
    own_entries = entries_bytes(x for x in stored[: len(first.tensors)])
    shape = ModelShape(
        name=str(title.content) if title is not None else first.path.stem,
        architecture=architecture.content,
        blocks=blocks,
        hidden=hidden,
        heads=max(heads),
        key_value_heads=max(keys),
        head_size=size,
        vocabulary=embedding.shape[0],
        context=max(own.whole("context_length", 2048), 1),
        tensors=tuple(x.tensor for x in stored),
        cache=cache,
        tied=tied,
        experts=own.whole("expert_count", 0),
        experts_used=used,
        source=str(first.path),
        extra_blocks=extra,
        header_bytes=max(first.data_start - PREAMBLE - own_entries, 0),
    )
    return shape, stored


class _Own:
    """The numbers below an architecture's name in the metadata of a file."""

    def __init__(self, metadata: Mapping[str, Value], architecture: str) -> None:
        self.architecture = architecture
        self._metadata = metadata
        self._prefix = f"{architecture}."

    def content(self, name: str) -> Any:
        """Return what stands under a key, None where there is nothing."""
        value = self._metadata.get(self._prefix + name)
        return None if value is None else value.content

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a number from 0 to 2^32.

        Raises:
            DamagedError: it is not there, or not such a number.
        """
        value = self.content(name)
        value = max(value, default=0) if isinstance(value, tuple) and value else value
        value = default if value is None else value
        if type(value) is not int or not 0 <= value <= 1 << 32:
            raise DamagedError(
                f"{GGUF}: '{self._prefix}{name}' is not a number that a model has",
                "get the file again",
            )
        return value

    def each(self, name: str, blocks: int, default: int) -> tuple[int, ...]:
        """Return a number for each block, from a list or from one for all.

        Raises:
            DamagedError: something else, or absurdly many blocks.
        """
        if not 0 < blocks <= 10_000:
            raise DamagedError(f"{GGUF} declare {blocks} blocks", "get the file again")
        value = self.content(name)
        if not isinstance(value, tuple):
            return (self.whole(name, default),) * blocks
        numbers = tuple(one for one in value if type(one) is int and 0 <= one <= 1 << 32)
        if len(numbers) != len(value) or len(numbers) < blocks:
            raise DamagedError(
                f"{GGUF}: '{self._prefix}{name}' is not a number for each block",
                "get the file again",
            )
        return numbers[:blocks]


ROLES: tuple[tuple[str, Role], ...] = (  # what a name contains; the first that it does decides
    ("token_embd.weight", "embedding"),
    (".bias", "bias"),
    ("_exps.", "expert"),
    ("ffn_gate_inp", "router"),
    ("norm", "norm"),
)


def _role(ref: TensorRef) -> Role:
    if ref.name == "output.weight":
        return "head"
    usual: Role = "linear" if len(ref.shape) > 1 else "other"
    return next((role for part, role in ROLES if part in ref.name), usual)


def _shapes_by_block(refs: Sequence[TensorRef]) -> dict[int, dict[str, tuple[int, ...]]]:
    """Return the shapes of every block's tensors by the part of their names behind the block."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for ref in refs:
        block = block_of(ref.name)
        if block >= 0:
            found.setdefault(block, {})[ref.name.split(".", 2)[2]] = ref.shape
    return found


def _cache(
    own: _Own, names: Mapping[str, tuple[int, ...]], block: int, key_heads: int, size: int
) -> BlockCache:
    """Return what a block keeps, from the tensors that it has."""
    stems = {name.partition(".")[0] for name in names}
    window = _window(own, block)
    latent = own.whole("attention.kv_lora_rank", 0)
    if latent and "attn_kv_a_mqa" in stems and "attn_kv_b" not in stems:
        return BlockCache(keys=latent + own.whole("rope.dimension_count", 64))
    if "ssm_conv1d" in stems:
        return BlockCache(state=_state(own))
    if not stems & {"attn_k", "attn_qkv", "attn_kv_b"}:
        return BlockCache()
    if "attn_k.weight" in names:
        keys = names["attn_k.weight"][0]
        values = names.get("attn_v.weight", (keys,))[0]
        return BlockCache(keys=keys, values=values, window=window)
    value_size = own.whole("attention.value_length", size)
    return BlockCache(keys=key_heads * size, values=key_heads * value_size, window=window)


def _state(own: _Own) -> int:
    inner, state = own.whole("ssm.inner_size"), own.whole("ssm.state_size")
    groups, kernel = own.whole("ssm.group_count", 0), own.whole("ssm.conv_kernel")
    return max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner


# Where llama.cpp itself has the pattern: architecture -> every how many blocks sees everything.
PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4, "llama4": 4, "exaone4": 4}


def _window(own: _Own, block: int) -> int | None:
    width = own.whole("attention.sliding_window", 0)
    pattern = own.content("attention.sliding_window_pattern")
    if not width:
        return None
    if isinstance(pattern, tuple):
        return width if block < len(pattern) and pattern[block] else None
    period = PERIODS.get(own.architecture, 0)
    if type(pattern) is int and pattern > 0:
        period = pattern
    return width if period and (block + 1) % period else None
