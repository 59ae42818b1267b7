"""Shapes of Gemma 3n and Gemma 4: tables per block, blocks that share a cache, heads of two sizes.

Sources: src/models/gemma3n.cpp, src/models/gemma4.cpp and conversion/gemma.py of llama.cpp b11549,
the models of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator

from qtool.memory.shape import BlockCache, ModelShape, TensorSpec
from qtool.memory.shape_architectures import FOUR_NORMS, Architecture
from qtool.memory.shape_blocks import Block, attention, linears, mlp, norms
from qtool.memory.shape_settings import (
    CONFIG,
    LARGEST_CONTEXT,
    MOST_BLOCKS,
    MOST_EXPERTS,
    Settings,
)

GEMMA = Architecture("gemma3n", norms=FOUR_NORMS, head_norms="head")
SLIDING = "sliding_attention"


def gemma3n_shape(settings: Settings, name: str) -> ModelShape:
    """Return the shape of Gemma 3n, whose GGUF files hold keys and values of all blocks.

    Raises:
        DamagedError: a number is missing or impossible.
    """
    count = settings.whole("blocks", most=MOST_BLOCKS)
    hidden = settings.whole("hidden")
    inner = settings.each("inner", count)
    streams = settings.whole("altup_num_inputs", 4, least=2, most=64)
    rank = settings.whole("laurel_rank", 64)
    each = settings.whole("hidden_size_per_layer_input", 256)
    heads, own = settings.whole("heads", 8), settings.whole("key_value_heads", 2)
    size = settings.whole("head_size", 256)
    sliding = _sliding(settings, count, period=5)
    first_shared = count - settings.whole("num_kv_shared_layers", 15, least=0, most=count - 1)
    vocabulary = settings.whole("vocabulary", 262400)
    tensors = list(_tables(vocabulary, count, hidden, each))
    tensors += [
        TensorSpec(f"{stem}.weight", (streams - 1, hidden, hidden), "other")
        for stem in ("altup_proj", "altup_unembd_proj")
    ]
    cache = []
    window = settings.whole("sliding_window", 512, most=LARGEST_CONTEXT)
    for number in range(count):
        block = Block(number, hidden, heads, own, size, inner=inner[number])
        tensors += norms(block, GEMMA)
        tensors += attention(block, GEMMA, frozenset())
        tensors += mlp(block, GEMMA, frozenset())
        tensors += _block_table(block, each)
        tensors += _streams(block, streams, rank)
        cache.append(_kept(own * size, window if sliding[number] else None, number >= first_shared))
    tensors.append(TensorSpec("output_norm.weight", (hidden,), "norm"))
    return ModelShape(
        name=name,
        architecture="gemma3n",
        blocks=count,
        hidden=hidden,
        heads=heads,
        key_value_heads=own,
        head_size=size,
        vocabulary=vocabulary,
        context=settings.whole("context", 32768, most=LARGEST_CONTEXT),
        tensors=tuple(tensors),
        cache=tuple(cache),
        tied=True,
        source=CONFIG,
    )


def gemma4_shape(settings: Settings, name: str) -> ModelShape:
    """Return the shape of Gemma 4, dense or with experts beside its MLPs.

    Raises:
        DamagedError: a number is missing or impossible.
    """
    count = settings.whole("blocks", most=MOST_BLOCKS)
    hidden, heads = settings.whole("hidden"), settings.whole("heads")
    each = settings.whole("hidden_size_per_layer_input", 256, least=0)
    sliding = _sliding(settings, count, period=6)
    first_shared = count - settings.whole("num_kv_shared_layers", 0, least=0, most=count - 1)
    vocabulary = settings.whole("vocabulary", 262144)
    whole_size = settings.whole("global_head_dim", _of_whole_blocks(settings, "head_dim", 512))
    window = settings.whole("sliding_window", 512, most=LARGEST_CONTEXT)
    same = settings.flag("attention_k_eq_v", False)
    wide = settings.flag("use_double_wide_mlp", False)
    experts = 0
    if settings.flag("enable_moe_block", False):
        experts = settings.whole("experts", most=MOST_EXPERTS)
    own = settings.whole("key_value_heads")
    whole_own = own
    if same:
        stated = _of_whole_blocks(settings, "num_key_value_heads", own)
        whole_own = settings.whole("num_global_key_value_heads", stated)
    tensors = list(_tables(vocabulary, count, hidden, each))
    cache = []
    for number in range(count):
        shared = number >= first_shared
        inner = settings.whole("inner") * (2 if wide and shared else 1)
        block = Block(
            number,
            hidden,
            heads,
            own if sliding[number] else whole_own,
            settings.whole("head_size", 256) if sliding[number] else whole_size,
            inner=inner,
            experts=experts,
            expert_inner=settings.whole("moe_intermediate_size") if experts else 0,
        )
        tensors += norms(block, GEMMA)
        tensors += _gemma4_attention(block, shared=shared, same=same and not sliding[number])
        tensors += mlp(block, GEMMA, frozenset())
        tensors += _gemma4_experts(block) if experts else ()
        tensors += _block_table(block, each) if each else ()
        tensors.append(block.spec("layer_output_scale", 1, role="other"))
        width = block.key_value_heads * block.head_size
        cache.append(_kept(width, window if sliding[number] else None, shared))
    tensors.append(TensorSpec("rope_freqs.weight", (whole_size // 2,), "other", computed=True))
    first = (own if sliding[0] else whole_own, whole_size)
    return _gemma4_finished(settings, name, tensors, cache, heads=heads, first=first)


def _gemma4_finished(
    settings: Settings,
    name: str,
    tensors: list[TensorSpec],
    cache: list[BlockCache],
    *,
    heads: int,
    first: tuple[int, int],
) -> ModelShape:
    """Return the shape; `first` are heads of keys in its first block, and the size of a head."""
    vocabulary, hidden = tensors[0].shape
    ends = [TensorSpec("output_norm.weight", (hidden,), "norm")]
    tied = settings.flag("tie_word_embeddings", True)
    if not tied:
        ends.append(TensorSpec("output.weight", (vocabulary, hidden), "head"))
    experts = max((t.shape[0] for t in tensors if t.role == "expert"), default=0)
    return ModelShape(
        name=name,
        architecture="gemma4",
        blocks=len(cache),
        hidden=hidden,
        heads=heads,
        key_value_heads=first[0],
        head_size=first[1],
        vocabulary=vocabulary,
        context=settings.whole("context", 131072, most=LARGEST_CONTEXT),
        tensors=(*tensors, *ends),
        cache=tuple(cache),
        tied=tied,
        experts=experts,
        experts_used=settings.whole("top_k_experts", 1, most=experts) if experts else 0,
        source=CONFIG,
    )


def _sliding(settings: Settings, count: int, *, period: int) -> tuple[bool, ...]:
    words = settings.words("layer_types", count)
    if words is not None:
        return tuple(word == SLIDING for word in words)
    # The last block of Gemma 4 sees everything whatever the period says.
    last = count - 1 if period == 6 else -1
    return tuple((number + 1) % period != 0 and number != last for number in range(count))


def _of_whole_blocks(settings: Settings, key: str, default: int) -> int:
    """Return a number of the blocks that see everything, where config.json speaks of each block."""
    for number in settings.section("per_layer_config").found:
        own = settings.section("per_layer_config").section(number)
        if own.value(key) is not None:
            return own.whole(key)
    return default


def _kept(width: int, window: int | None, shared: bool) -> BlockCache:
    return BlockCache(keys=width, values=width, window=window, shared=shared)


def _tables(vocabulary: int, count: int, hidden: int, each: int) -> Iterator[TensorSpec]:
    """Yield the embedding, and the second one that has values for every block."""
    yield TensorSpec("token_embd.weight", (vocabulary, hidden), "embedding")
    if each:
        yield TensorSpec("per_layer_token_embd.weight", (vocabulary, each * count), "embedding")
        yield TensorSpec("per_layer_model_proj.weight", (each * count, hidden), "linear")
        yield TensorSpec("per_layer_proj_norm.weight", (each,), "norm")


def _block_table(block: Block, each: int) -> Iterator[TensorSpec]:
    yield from linears(block, {"inp_gate": each}, block.hidden, frozenset())
    yield from linears(block, {"proj": block.hidden}, each, frozenset())
    yield block.spec("post_norm", block.hidden, role="norm")


def _streams(block: Block, streams: int, rank: int) -> Iterator[TensorSpec]:
    """Yield what mixes the several residual streams of Gemma 3n, and its low-rank path."""
    yield block.spec("altup_correct_coef", streams, streams, role="other")
    yield block.spec("altup_correct_scale", block.hidden, role="other")
    yield block.spec("altup_predict_coef", streams**2, streams, role="other")
    yield block.spec("altup_router", streams, block.hidden, role="router")
    yield block.spec("altup_router_norm", block.hidden, role="norm")
    yield block.spec("laurel_l", rank, block.hidden)
    yield block.spec("laurel_r", block.hidden, rank)
    yield block.spec("laurel_post_norm", block.hidden, role="norm")


def _gemma4_attention(block: Block, *, shared: bool, same: bool) -> Iterator[TensorSpec]:
    """Yield attention without what is taken from elsewhere.

    Args:
        block: its sizes.
        shared: whether keys and values come from another block.
        same: whether keys serve as values.
    """
    left_out = {"attn_k.weight", "attn_v.weight", "attn_k_norm.weight"} if shared else set()
    left_out |= {"attn_v.weight"} if same else set()
    for spec in attention(block, GEMMA, frozenset()):
        if spec.name.partition(".")[2].partition(".")[2] not in left_out:
            yield spec


def _gemma4_experts(block: Block) -> Iterator[TensorSpec]:
    count, inner, hidden = block.experts, block.expert_inner, block.hidden
    yield block.spec("ffn_gate_inp", count, hidden, role="router")
    yield block.spec("ffn_gate_inp", hidden, role="router", leaf=".scale")
    for stem in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
        yield block.spec(stem, hidden, role="norm")
    yield block.spec("ffn_gate_up_exps", count, 2 * inner, hidden, role="expert")
    yield block.spec("ffn_down_exps", count, hidden, inner, role="expert")
    yield block.spec("ffn_down_exps", count, role="router", leaf=".scale")
