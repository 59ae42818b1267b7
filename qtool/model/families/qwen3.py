"""Qwen3, dense: Llama with norms on the heads of q and k."""

from dataclasses import replace

from qtool.model.families.llama import ATTENTION, MLP
from qtool.model.families.llama import FAMILY as LLAMA
from qtool.model.families.qwen2 import WINDOW
from qtool.model.family import GgufConversion

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

FAMILY = replace(
    LLAMA,
    name="Qwen3",
    model_type="qwen3",
    gguf_architecture="qwen3",
    gguf=GgufConversion(
        model_class="Qwen3ForCausalLM",
        tensors=("input_layernorm", *ATTENTION, *HEAD_NORMS, "post_attention_layernorm", *MLP),
        window=WINDOW,
        head_dim=128,
    ),
)
