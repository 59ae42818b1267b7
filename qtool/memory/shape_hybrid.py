"""Shapes of models whose blocks are not alike: linear attention, Mamba; and of Falcon.

Blocks without keys and values keep a state of constant size instead. Sources: src/models and
conversion/ of llama.cpp b11549, `llama_hparams::n_embd_r` and `n_embd_s` for the states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qtool.memory.shape import BlockCache, ModelShape, TensorSpec
from qtool.memory.shape_architectures import ATTENTION, Architecture, Experts
from qtool.memory.shape_blocks import Block, attention, experts, linears, mlp
from qtool.memory.shape_settings import (
    CONFIG,
    LARGEST_CONTEXT,
    MOST_BLOCKS,
    MOST_EXPERTS,
    Settings,
)

RECURRENT = frozenset({"linear_attention", "mamba", "M"})
FULL = frozenset({"full_attention", "attention", "*"})
FEED_FORWARD = frozenset({"mlp", "-", "moe", "E"})

LINEAR_EXPERTS = Experts(shared_gate=True)
MAMBA_EXPERTS = Experts(correction=True)


@dataclass(frozen=True)
class _State:
    """The sizes of a recurrent block: `inner` values in heads, `groups` of `state` numbers."""

    inner: int
    heads: int
    groups: int
    state: int
    kernel: int

    @property
    def convolved(self) -> int:
        """Channels that the convolution runs over."""
        return self.inner + 2 * self.groups * self.state

    @property
    def cache(self) -> BlockCache:
        """What the block keeps of each sequence: the convolution's last inputs, and the state."""
        return BlockCache(state=(self.kernel - 1) * self.convolved + self.state * self.inner)


def linear_attention_shape(settings: Settings, name: str) -> ModelShape:
    """Return the shape of Qwen3-Next or Qwen3.5: three blocks of four are recurrent.

    Raises:
        DamagedError: a number is missing or impossible.
    """
    count = settings.whole("blocks", most=MOST_BLOCKS)
    hidden = settings.whole("hidden")
    count_experts = settings.whole("experts", 0, least=0, most=MOST_EXPERTS)
    joined = str(settings.found["model_type"]).startswith("qwen3_next")
    family = "qwen3next" if joined else "qwen35moe" if count_experts else "qwen35"
    kind = Architecture(
        family, head_norms="head", experts=LINEAR_EXPERTS if count_experts else None
    )
    state = _State(
        settings.whole("linear_num_value_heads") * settings.whole("linear_value_head_dim"),
        settings.whole("linear_num_value_heads"),
        settings.whole("linear_num_key_heads"),
        settings.whole("linear_key_head_dim"),
        settings.whole("linear_conv_kernel_dim", 4),
    )
    kinds = settings.words("layer_types", count)
    interval = settings.whole("full_attention_interval", 4, most=MOST_BLOCKS)
    heads = settings.whole("heads")
    tensors: list[TensorSpec] = []
    cache = []
    block = Block(0, hidden, heads, settings.whole("key_value_heads", heads), 0)
    for number in range(count):
        recurrent = kinds[number] in RECURRENT if kinds else (number + 1) % interval != 0
        block = Block(
            number,
            hidden,
            heads,
            block.key_value_heads,
            settings.whole("head_size", max(hidden // heads, 1)),
            inner=0 if count_experts else settings.whole("inner"),
            experts=count_experts,
            expert_inner=settings.whole("moe_intermediate_size") if count_experts else 0,
            shared_inner=settings.whole("shared_expert_intermediate_size", 0, least=0),
        )
        tensors.append(block.spec("attn_norm", hidden, role="norm"))
        tensors.append(block.spec("post_attention_norm", hidden, role="norm"))
        if recurrent:
            tensors += _delta_net(block, state, joined=joined)
            cache.append(state.cache)
        else:
            tensors += _gated_attention(block, kind)
            cache.append(_whole_cache(block))
        tensors += experts(block, kind) if count_experts else mlp(block, kind, frozenset())
    return _finished(settings, name, kind, block, tensors, cache)


def _delta_net(block: Block, state: _State, *, joined: bool) -> Iterator[TensorSpec]:
    rows = {"attn_qkv": state.convolved, "attn_gate": state.inner}
    gates = {"ssm_ba": 2 * state.heads} if joined else {}
    gates = gates or {"ssm_beta": state.heads, "ssm_alpha": state.heads}
    yield from linears(block, rows | gates, block.hidden, frozenset())
    yield block.spec("ssm_conv1d", state.convolved, state.kernel, role="other")
    yield block.spec("ssm_dt", state.heads, role="bias", leaf=".bias")
    yield block.spec("ssm_a", state.heads, role="other", leaf="")
    yield block.spec("ssm_norm", state.inner // state.heads, role="norm")
    yield block.spec("ssm_out", block.hidden, state.inner)


def _gated_attention(block: Block, kind: Architecture) -> Iterator[TensorSpec]:
    """Yield attention whose queries come with a gate of their own width."""
    for spec in attention(block, kind, frozenset()):
        if spec.name.endswith("attn_q.weight"):
            yield block.spec("attn_q", 2 * spec.shape[0], spec.shape[1])
        else:
            yield spec


def mamba_shape(settings: Settings, name: str) -> ModelShape:
    """Return the shape of Nemotron-H or Granite 4: Mamba 2 with some attention.

    Raises:
        DamagedError: a number is missing or impossible.
    """
    granite = settings.found["model_type"] == "granitemoehybrid"
    hidden = settings.whole("hidden")
    kinds = _mamba_kinds(settings)
    state = _mamba_state(settings, hidden, granite=granite)
    count_experts = settings.whole("experts", 0, least=0, most=MOST_EXPERTS)
    rules = Experts() if granite else MAMBA_EXPERTS
    if granite and not any(word in RECURRENT for word in kinds):
        family = "granitemoe" if count_experts else "granite"  # what llama.cpp then calls it
    else:
        family = "granitehybrid"
    family = family if granite else "nemotron_h_moe" if _any_moe(kinds) else "nemotron_h"
    kind = Architecture(
        family,
        experts=rules,
        mlp="gated" if granite else "plain",
        bias_keys=(("attention_bias", ATTENTION, False),),
        tied=False,
    )
    biases = frozenset(ATTENTION) if settings.flag("attention_bias", False) else frozenset()
    if settings.flag("mlp_bias", False) and not granite:
        biases |= {"ffn_up", "ffn_down"}
    convolution_bias = settings.flag("mamba_conv_bias", settings.flag("use_conv_bias", True))
    heads = settings.whole("heads")
    tensors: list[TensorSpec] = []
    cache = []
    block = Block(0, hidden, heads, settings.whole("key_value_heads", heads), 0)
    for number, word in enumerate(kinds):
        widths = _feed_forward(settings, word, count_experts, granite=granite)
        size = settings.whole("head_size", max(hidden // heads, 1))
        block = Block(number, hidden, heads, block.key_value_heads, size, *widths)
        tensors.append(block.spec("attn_norm", hidden, role="norm"))
        kept = BlockCache()
        if word in RECURRENT:
            tensors += _mamba(block, state, convolution_bias=convolution_bias)
            kept = state.cache
        elif word in FULL:
            tensors += attention(block, kind, biases)
            kept = _whole_cache(block)
        cache.append(kept)
        if granite:
            tensors.append(block.spec("ffn_norm", hidden, role="norm"))
        if block.experts:
            tensors += _plain_experts(block, kind) if not granite else experts(block, kind)
        elif block.inner:
            tensors += mlp(block, kind, biases)
    return _finished(settings, name, kind, block, tensors, cache)


def _whole_cache(block: Block) -> BlockCache:
    width = block.key_value_heads * block.head_size
    return BlockCache(keys=width, values=width)


def _any_moe(kinds: tuple[str, ...]) -> bool:
    return any(word in {"moe", "E"} for word in kinds)


def _mamba_kinds(settings: Settings) -> tuple[str, ...]:
    pattern = settings.value("hybrid_override_pattern")
    words: object = tuple(pattern) if isinstance(pattern, str) else None
    for key in ("layers_block_type", "layer_types"):
        words = words or settings.value(key)
    if not isinstance(words, list | tuple) or not 0 < len(words) <= MOST_BLOCKS:
        raise settings.missing("layer_types")
    known = RECURRENT | FULL | FEED_FORWARD
    for word in words:
        if not isinstance(word, str) or word not in known:
            raise settings.wrong("layer_types", word, "a kind of block")
    return tuple(words)


def _mamba_state(settings: Settings, hidden: int, *, granite: bool) -> _State:
    heads = settings.whole("mamba_n_heads" if granite else "mamba_num_heads")
    size = settings.value("mamba_d_head" if granite else "mamba_head_dim")
    if size in (None, "auto"):
        size = max(settings.whole("mamba_expand" if granite else "expand", 2) * hidden // heads, 1)
    inner = heads * settings.checked("mamba_head_dim", size)
    return _State(
        inner,
        heads,
        settings.whole("mamba_n_groups" if granite else "n_groups", 1, most=inner),
        settings.whole("mamba_d_state" if granite else "ssm_state_size"),
        settings.whole("mamba_d_conv" if granite else "conv_kernel", 4),
    )


def _feed_forward(
    settings: Settings, word: str, count_experts: int, *, granite: bool
) -> tuple[int, int, int, int]:
    """Return a block's inner width, experts, and the inner widths of those and of the shared one.

    Every block of Granite has an MLP or experts, of Nemotron only those that say so.
    """
    if granite:
        shared = settings.whole("shared_intermediate_size", settings.whole("inner"))
        if not count_experts:
            return shared, 0, 0, 0
        return 0, count_experts, settings.whole("inner"), shared
    if word in {"moe", "E"}:
        shared = settings.whole("moe_shared_expert_intermediate_size", 0, least=0)
        shared *= settings.whole("n_shared_experts", 1, least=0, most=64)
        return 0, max(count_experts, 1), settings.whole("moe_intermediate_size"), shared
    return (settings.whole("inner") if word in {"mlp", "-"} else 0), 0, 0, 0


def _plain_experts(block: Block, kind: Architecture) -> Iterator[TensorSpec]:
    """Yield experts without gates."""
    for spec in experts(block, kind):
        if "ffn_gate_exps" not in spec.name and "ffn_gate_shexp" not in spec.name:
            yield spec


def _mamba(block: Block, state: _State, *, convolution_bias: bool) -> Iterator[TensorSpec]:
    rows = state.inner + state.convolved + state.heads
    yield block.spec("ssm_in", rows, block.hidden)
    yield block.spec("ssm_conv1d", state.convolved, state.kernel, role="other")
    if convolution_bias:
        yield block.spec("ssm_conv1d", state.convolved, role="bias", leaf=".bias")
    yield block.spec("ssm_dt", state.heads, role="bias", leaf=".bias")
    yield block.spec("ssm_a", state.heads, 1, role="other", leaf="")
    yield block.spec("ssm_d", state.heads, 1, role="other", leaf="")
    yield block.spec("ssm_norm", state.groups, state.inner // state.groups, role="norm")
    yield block.spec("ssm_out", block.hidden, state.inner)


def falcon_shape(settings: Settings, name: str) -> ModelShape:
    """Return the shape of Falcon 7B, 40B and 180B.

    Raises:
        DamagedError: a number is missing or impossible.
    """
    count = settings.whole("blocks", most=MOST_BLOCKS)
    hidden, heads = settings.whole("hidden"), settings.whole("heads")
    newer = settings.flag("new_decoder_architecture", False)
    own = settings.whole("key_value_heads", settings.whole("n_head_kv", heads))
    if not newer:
        own = 1 if settings.flag("multi_query", True) else heads
    two_norms = settings.whole("num_ln_in_parallel_attn", 2 if newer else 1, most=2) == 2
    stems = ("attn_norm", "attn_norm_2") if two_norms else ("attn_norm",)
    kind = Architecture("falcon", norm_biases=True, attention="fused", mlp="plain")
    with_bias = settings.flag("bias", False)
    every = frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"})
    biases = every if with_bias else frozenset[str]()
    tensors: list[TensorSpec] = []
    block = Block(0, hidden, heads, own, max(hidden // heads, 1))
    for number in range(count):
        inner = settings.whole("ffn_hidden_size", 4 * hidden)
        block = Block(number, hidden, heads, own, block.head_size, inner=inner)
        for stem in stems:
            tensors.append(block.spec(stem, hidden, role="norm"))
            tensors.append(block.spec(stem, hidden, role="bias", leaf=".bias"))
        tensors += attention(block, kind, biases)
        tensors += mlp(block, kind, biases)
    cache = [_whole_cache(block)] * count
    return _finished(settings, name, kind, block, tensors, cache)


def _finished(
    settings: Settings,
    name: str,
    kind: Architecture,
    block: Block,
    tensors: list[TensorSpec],
    cache: list[BlockCache],
) -> ModelShape:
    """Return the shape with embedding, last norm and head around its blocks."""
    vocabulary = settings.whole("vocabulary")
    tied = settings.flag("tie_word_embeddings", kind.tied)
    ends = [TensorSpec("output_norm.weight", (block.hidden,), "norm")]
    if kind.norm_biases:
        ends.append(TensorSpec("output_norm.bias", (block.hidden,), "bias"))
    if not tied:
        ends.append(TensorSpec("output.weight", (vocabulary, block.hidden), "head"))
    embedding = TensorSpec("token_embd.weight", (vocabulary, block.hidden), "embedding")
    count_experts = max((t.shape[0] for t in tensors if t.role == "expert"), default=0)
    return ModelShape(
        name=name,
        architecture=kind.name,
        blocks=len(cache),
        hidden=block.hidden,
        heads=block.heads,
        key_value_heads=block.key_value_heads,
        head_size=block.head_size,
        vocabulary=vocabulary,
        context=settings.whole("context", 2048, most=LARGEST_CONTEXT),
        tensors=(embedding, *tensors, *ends),
        cache=tuple(cache),
        tied=tied,
        experts=count_experts,
        experts_used=(
            settings.whole("experts_used", 1, most=count_experts) if count_experts else 0
        ),
        source=CONFIG,
    )
