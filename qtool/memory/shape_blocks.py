"""Draw up the tensors of one block from its sizes; names are llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qtool.memory.shape import Role, TensorSpec
from qtool.memory.shape_architectures import Architecture


@dataclass(frozen=True)
class Latents:
    """The widths of latent attention (MLA).

    Args:
        query: of the queries' latent; 0: queries have none.
        key_value: of the latent that keys and values share.
        plain: values of a head's key without position.
        rotated: those with position, shared by all heads.
        value: values of a head.
    """

    query: int
    key_value: int
    plain: int
    rotated: int
    value: int


@dataclass(frozen=True)
class Block:
    """The sizes of one block.

    Args:
        number: of the block.
        hidden: width of the residual stream.
        heads: of attention.
        key_value_heads: those of keys and values.
        head_size: values of one.
        inner: width inside the MLP; 0 where experts take its place.
        experts: how many.
        expert_inner: width inside each.
        shared_inner: width inside the expert that every token meets; 0: there is none.
        latents: where attention is latent.
    """

    number: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    inner: int = 0
    experts: int = 0
    expert_inner: int = 0
    shared_inner: int = 0
    latents: Latents | None = None

    def spec(
        self, stem: str, *shape: int, role: Role = "linear", leaf: str = ".weight"
    ) -> TensorSpec:
        """Return one tensor of the block."""
        return TensorSpec(f"blk.{self.number}.{stem}{leaf}", shape, role)


def block_tensors(block: Block, kind: Architecture, biases: frozenset[str]) -> Iterator[TensorSpec]:
    """Yield the tensors of a block with attention.

    Args:
        block: its sizes.
        kind: what the model is made of.
        biases: linears that have one.
    """
    yield from norms(block, kind)
    if block.latents is not None:
        yield from latent_attention(block, block.latents)
    else:
        yield from attention(block, kind, biases)
    if block.experts:
        yield from experts(block, kind)
    else:
        yield from mlp(block, kind, biases)


def norms(block: Block, kind: Architecture) -> Iterator[TensorSpec]:
    """Yield the norms as wide as the hidden state."""
    for stem in kind.norms:
        yield block.spec(stem, block.hidden, role="norm")
        if kind.norm_biases:
            yield block.spec(stem, block.hidden, role="bias", leaf=".bias")


def attention(block: Block, kind: Architecture, biases: frozenset[str]) -> Iterator[TensorSpec]:
    """Yield query, key, value and output, their biases, and norms of heads."""
    queries = block.heads * block.head_size
    keys = block.key_value_heads * block.head_size
    rows = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    if kind.attention == "fused":
        rows = {"attn_qkv": queries + 2 * keys}
    yield from linears(block, rows, block.hidden, biases)
    yield from linears(block, {"attn_output": block.hidden}, queries, biases)
    if kind.head_norms:
        whole = kind.head_norms == "heads"
        yield block.spec("attn_q_norm", queries if whole else block.head_size, role="norm")
        yield block.spec("attn_k_norm", keys if whole else block.head_size, role="norm")
    if kind.sinks:
        yield block.spec("attn_sinks", block.heads, role="other")


def latent_attention(block: Block, latents: Latents) -> Iterator[TensorSpec]:
    """Yield the tensors of MLA, the two halves of `kv_b_proj` apart as llama.cpp wants them."""
    queries = block.heads * (latents.plain + latents.rotated)
    if latents.query:
        yield block.spec("attn_q_a", latents.query, block.hidden)
        yield block.spec("attn_q_a_norm", latents.query, role="norm")
        yield block.spec("attn_q_b", queries, latents.query)
    else:
        yield block.spec("attn_q", queries, block.hidden)
    yield block.spec("attn_kv_a_mqa", latents.key_value + latents.rotated, block.hidden)
    yield block.spec("attn_kv_a_norm", latents.key_value, role="norm")
    yield block.spec("attn_k_b", block.heads, latents.key_value, latents.plain)
    yield block.spec("attn_v_b", block.heads, latents.value, latents.key_value)
    yield block.spec("attn_output", block.hidden, block.heads * latents.value)


def mlp(block: Block, kind: Architecture, biases: frozenset[str]) -> Iterator[TensorSpec]:
    """Yield gate, up and down, as far as the model has them apart."""
    up = {"ffn_gate": block.inner, "ffn_up": block.inner}
    if kind.mlp == "fused":
        up = {"ffn_up": 2 * block.inner}
    elif kind.mlp == "plain":
        up = {"ffn_up": block.inner}
    yield from linears(block, up, block.hidden, biases)
    yield from linears(block, {"ffn_down": block.hidden}, block.inner, biases)


def experts(block: Block, kind: Architecture) -> Iterator[TensorSpec]:
    """Yield router and experts, and the expert that every token meets."""
    assert kind.experts is not None
    count, inner, hidden = block.experts, block.expert_inner, block.hidden
    yield block.spec("ffn_gate_inp", count, hidden, role="router")
    if kind.experts.correction:
        yield block.spec("exp_probs_b", count, role="router", leaf=".bias")
    yield block.spec("ffn_gate_exps", count, inner, hidden, role="expert")
    yield block.spec("ffn_up_exps", count, inner, hidden, role="expert")
    yield block.spec("ffn_down_exps", count, hidden, inner, role="expert")
    if kind.experts.biases:
        yield block.spec("ffn_gate_inp", count, role="bias", leaf=".bias")
        yield block.spec("ffn_gate_exps", count, inner, role="bias", leaf=".bias")
        yield block.spec("ffn_up_exps", count, inner, role="bias", leaf=".bias")
        yield block.spec("ffn_down_exps", count, hidden, role="bias", leaf=".bias")
    if block.shared_inner:
        if kind.experts.shared_gate:
            yield block.spec("ffn_gate_inp_shexp", hidden, role="router")
        yield block.spec("ffn_gate_shexp", block.shared_inner, hidden)
        yield block.spec("ffn_up_shexp", block.shared_inner, hidden)
        yield block.spec("ffn_down_shexp", hidden, block.shared_inner)


def linears(
    block: Block, rows: dict[str, int], columns: int, biases: frozenset[str]
) -> Iterator[TensorSpec]:
    """Yield linears that read one input, each with its bias if it has one."""
    for stem, count in rows.items():
        yield block.spec(stem, count, columns)
        if stem in biases:
            yield block.spec(stem, count, role="bias", leaf=".bias")


def prediction_block(block: Block, vocabulary: int) -> Iterator[TensorSpec]:
    """Yield what a block that predicts one token further has beside those of a usual one.

    Its embedding and head are copies, but checkpoints and GGUF files hold them.
    """
    yield block.spec("nextn.eh_proj", block.hidden, 2 * block.hidden)
    yield block.spec("nextn.embed_tokens", vocabulary, block.hidden, role="embedding")
    yield block.spec("nextn.enorm", block.hidden, role="norm")
    yield block.spec("nextn.hnorm", block.hidden, role="norm")
    yield block.spec("nextn.shared_head_head", vocabulary, block.hidden, role="head")
    yield block.spec("nextn.shared_head_norm", block.hidden, role="norm")
