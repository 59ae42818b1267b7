"""The shape of a model from its config.json alone: every tensor, and what every block remembers.

Known architectures give exactly the tensors of their GGUF file; of others the usual ones are
assumed and the shape says so. What llama.cpp keeps: its src/llama-kv-cache*.cpp at b11549.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.memory.shape import BlockCache, ModelShape, TensorSpec
from qtool.memory.shape_architectures import ARCHITECTURES, USUAL, Architecture, Experts
from qtool.memory.shape_blocks import Block, Latents, block_tensors, prediction_block
from qtool.memory.shape_gemma import gemma3n_shape, gemma4_shape
from qtool.memory.shape_hybrid import falcon_shape, linear_attention_shape, mamba_shape
from qtool.memory.shape_settings import (
    CONFIG,
    LARGEST_CONTEXT,
    MOST_BLOCKS,
    MOST_EXPERTS,
    Settings,
    language_settings,
)

# Model types that one description does not fit, and what draws them up.
SPECIAL: Mapping[str, Callable[[Settings, str], ModelShape]] = {
    "gemma3n": gemma3n_shape,
    "gemma3n_text": gemma3n_shape,
    "gemma4": gemma4_shape,
    "gemma4_text": gemma4_shape,
    "qwen3_next": linear_attention_shape,
    "qwen3_5": linear_attention_shape,
    "qwen3_5_text": linear_attention_shape,
    "qwen3_5_moe": linear_attention_shape,
    "qwen3_5_moe_text": linear_attention_shape,
    "nemotron_h": mamba_shape,
    "granitemoehybrid": mamba_shape,
    "falcon": falcon_shape,
}
SLIDING = frozenset({"sliding_attention", "chunked_attention"})


def shape_of_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Return the shape of the language model that a config.json describes.

    Args:
        config: config.json as parsed; of models for pictures and text too.
        name: for people.

    Raises:
        DamagedError: a number that matters is missing or impossible; names its key.
    """
    settings = language_settings(config)
    model_type = str(settings.found["model_type"])
    if model_type in SPECIAL:
        return SPECIAL[model_type](settings, name)
    kind = ARCHITECTURES.get(model_type)
    if kind is None:
        return _usual_shape(settings, name, USUAL, printable(model_type))
    return _usual_shape(settings, name, kind, kind.name)


def _usual_shape(
    settings: Settings, name: str, kind: Architecture, architecture: str
) -> ModelShape:
    defaults = kind.defaults
    count = settings.whole("blocks", defaults.get("blocks"), most=MOST_BLOCKS)
    hidden = settings.whole("hidden", defaults.get("hidden"))
    vocabulary = settings.whole("vocabulary", defaults.get("vocabulary"))
    tied = settings.flag("tie_word_embeddings", kind.tied)
    switched_off = kind.head_norms_key and not settings.flag(kind.head_norms_key, False)
    kind = replace(kind, head_norms="") if switched_off else kind
    biases = _biases(settings, kind)
    more = settings.whole(kind.extra_blocks, 0, least=0, most=16) if kind.extra_blocks else 0
    blocks = _blocks(settings, kind, count, hidden, more)
    tensors = [TensorSpec("token_embd.weight", (vocabulary, hidden), "embedding")]
    for block in blocks:
        tensors += block_tensors(block, kind, biases)
        if block.number >= count:
            tensors += prediction_block(block, vocabulary)
    tensors += _ends(kind, hidden, vocabulary, tied, "output" in biases)
    first = blocks[0]
    tensors += rope_tensors(settings, kind, first)
    windows = _windows(settings, kind, count)
    return ModelShape(
        name=name,
        architecture=architecture,
        blocks=count,
        hidden=hidden,
        heads=first.heads,
        key_value_heads=first.key_value_heads,
        head_size=first.head_size,
        vocabulary=vocabulary,
        context=settings.whole("context", defaults.get("context", 2048), most=LARGEST_CONTEXT),
        tensors=tuple(tensors),
        cache=tuple(_cache(block, windows[block.number]) for block in blocks[:count]),
        tied=tied or kind.head == "never",
        experts=max(block.experts for block in blocks),
        experts_used=_experts_used(settings, blocks),
        exact=kind.exact and not any(settings.value(key) for key in kind.unclear),
        source=CONFIG,
        extra_blocks=more,
    )


def _biases(settings: Settings, kind: Architecture) -> frozenset[str]:
    found = set(kind.biases)
    for key, linears, default in kind.bias_keys:
        if settings.flag(key, default):
            found.update(linears)
    return frozenset(found)


def _blocks(
    settings: Settings, kind: Architecture, count: int, hidden: int, more: int
) -> tuple[Block, ...]:
    defaults = kind.defaults
    heads = settings.each("heads", count, defaults.get("heads"))
    own = settings.each("key_value_heads", count, defaults.get("key_value_heads") or heads[0])
    latents = _latents(settings) if kind.attention == "latent" else None
    size = settings.value("head_size") or defaults.get("head_size")
    if latents is not None:
        size = latents.plain + latents.rotated
    if size is None:
        if not heads[0] or hidden < heads[0]:
            raise settings.wrong("heads", heads[0], f"heads of a hidden size of {hidden}")
        size = hidden // heads[0]
    head_size = settings.checked("head_size", size)
    for query_heads, key_heads in zip(heads, own, strict=True):
        if key_heads > query_heads:
            raise settings.wrong("key_value_heads", key_heads, f"at most {query_heads} heads")
    sparse = _expert_sizes(settings, kind.experts, count) if kind.experts else None
    inner = _inner_sizes(settings, kind, count, needed=sparse is None or 0 in sparse[0])
    blocks = []
    for number in range(count + more):
        i = min(number, count - 1)
        experts = sparse[0][i] if sparse else 0
        blocks.append(
            Block(
                number,
                hidden,
                heads[i],
                own[i],
                head_size,
                inner=0 if experts else inner[i],
                experts=experts,
                expert_inner=sparse[1] if sparse else 0,
                shared_inner=sparse[2] if sparse else 0,
                latents=latents,
            )
        )
    return tuple(blocks)


def _inner_sizes(
    settings: Settings, kind: Architecture, count: int, *, needed: bool
) -> tuple[int, ...]:
    other = kind.experts.dense_inner if kind.experts else ""
    key = other if other and settings.value(other) is not None else "inner"
    if not needed and settings.value(key) is None:
        return (0,) * count
    return settings.each(key, count, kind.defaults.get("inner"))


def _latents(settings: Settings) -> Latents:
    query = settings.whole("q_lora_rank", 0, least=0)
    return Latents(
        query,
        settings.whole("kv_lora_rank"),
        settings.whole("qk_nope_head_dim"),
        settings.whole("qk_rope_head_dim"),
        settings.whole("v_head_dim"),
    )


def _expert_sizes(
    settings: Settings, rules: Experts, count: int
) -> tuple[tuple[int, ...], int, int] | None:
    """Return the experts of every block, the width of each, and of the one that all tokens meet."""
    experts = settings.whole("experts", 0, least=0, most=MOST_EXPERTS)
    if experts < 2:
        return None
    key = rules.inner if settings.value(rules.inner) is not None else "inner"
    inner = settings.whole(key)
    shared = 0
    if rules.shared:
        shared = settings.whole(rules.shared, 0, least=0)
    if rules.shared_count:
        shared = inner * settings.whole(rules.shared_count, 0, least=0, most=MOST_EXPERTS)
    first = settings.whole(rules.first_dense, 0, least=0, most=count) if rules.first_dense else 0
    step = settings.whole(rules.step, 1, most=MOST_BLOCKS) if rules.step else 1
    sparse = tuple(
        experts if number >= first and (number + 1) % step == 0 else 0 for number in range(count)
    )
    return sparse, inner, shared


def _experts_used(settings: Settings, blocks: tuple[Block, ...]) -> int:
    most = max(block.experts for block in blocks)
    return settings.whole("experts_used", 1, most=most) if most else 0


def _ends(
    kind: Architecture, hidden: int, vocabulary: int, tied: bool, head_bias: bool
) -> Iterator[TensorSpec]:
    yield TensorSpec("output_norm.weight", (hidden,), "norm")
    if kind.norm_biases:
        yield TensorSpec("output_norm.bias", (hidden,), "bias")
    if kind.head == "always" or (kind.head == "optional" and not tied):
        yield TensorSpec("output.weight", (vocabulary, hidden), "head", computed=tied)
        if head_bias:
            yield TensorSpec("output.bias", (vocabulary,), "bias")


def rope_tensors(settings: Settings, kind: Architecture, block: Block) -> Iterator[TensorSpec]:
    """Yield the divisors of positions that a GGUF file holds beside the weights.

    Raises:
        DamagedError: the setting that asks for them is no object.
    """
    given = settings.section("rope_scaling").found or settings.section("rope_parameters").found
    scaling = Settings(given)
    scaling_kind = scaling.value("rope_type") or scaling.value("type")
    if not isinstance(scaling_kind, str) or scaling_kind not in kind.factors:
        return
    part = scaling.real("partial_rotary_factor", settings.real("partial_rotary_factor", 1.0))
    half = int(block.head_size * part) // 2
    if scaling_kind == "llama3":
        yield TensorSpec("rope_freqs.weight", (half,), "other", computed=True)
        return
    for length in ("long", "short"):
        yield TensorSpec(f"rope_factors_{length}.weight", (half,), "other", computed=True)


def _windows(settings: Settings, kind: Architecture, count: int) -> tuple[int | None, ...]:
    """Return how many tokens each block sees at most, as far as llama.cpp makes use of it."""
    window = kind.window
    if window is None:
        return (None,) * count
    stated = settings.found.get(window.width, window.default)
    if stated in (None, 0):
        return (None,) * count
    width = settings.checked(window.width, stated, most=LARGEST_CONTEXT)
    words = settings.words("layer_types", count)
    if words is not None:
        return tuple(width if word in SLIDING else None for word in words)
    period = window.period
    pattern = settings.value(window.key)
    if isinstance(pattern, str) and pattern:
        period = len(pattern)  # such as LLLG
    elif pattern is not None:
        period = settings.checked(window.key, pattern, most=MOST_BLOCKS)
    return tuple(None if (number + 1) % period == 0 else width for number in range(count))


def _cache(block: Block, window: int | None) -> BlockCache:
    if block.latents is not None:
        return BlockCache(keys=block.latents.key_value + block.latents.rotated)
    width = block.key_value_heads * block.head_size
    return BlockCache(keys=width, values=width, window=window)
