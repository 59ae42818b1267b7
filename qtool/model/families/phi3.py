"""Phi-3, Phi-3.5 and Phi-4: q, k and v are one linear, and so are gate and up."""

from qtool.model.family import Family, GgufConversion, GgufWindow, ScalePair, Tap

FAMILY = Family(
    name="Phi-3",
    model_type="phi3",
    taps=(
        Tap("attn_in", ("self_attn.qkv_proj",)),
        Tap("attn_out", ("self_attn.o_proj",)),
        Tap("mlp_in", ("mlp.gate_up_proj",)),
        Tap("mlp_out", ("mlp.down_proj",), corrected=False),
    ),
    pairs=(
        ScalePair("attn_in", "input_layernorm", "norm"),
        ScalePair("attn_out", "self_attn.qkv_proj", "linear", part="value", through_heads=True),
        ScalePair("mlp_in", "post_attention_layernorm", "norm"),
        ScalePair("mlp_out", "mlp.gate_up_proj", "linear", part="up"),
    ),
    gguf_architecture="phi3",
    gguf=GgufConversion(
        model_class="Phi3ForCausalLM",
        tensors=(
            "input_layernorm",
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ),
        rope_types=("default", "longrope"),
        rope_aliases=(("su", "longrope"), ("yarn", "longrope")),  # as in the first releases
        window=GgufWindow(applied=False, marked=True),
        square=True,
        partial_rotary=True,
        original_context=4096,
    ),
)
