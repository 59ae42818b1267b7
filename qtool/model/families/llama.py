"""Llama 2 and 3.x, SmolLM2, and everything else built as `LlamaForCausalLM`."""

from qtool.model.family import Family, GgufConversion, ScalePair, Tap

TAPS = (
    Tap("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Tap("attn_out", ("self_attn.o_proj",)),
    Tap("mlp_in", ("mlp.gate_proj", "mlp.up_proj")),
    Tap("mlp_out", ("mlp.down_proj",), corrected=False),
)

VALUE_TO_OUTPUT = ScalePair("attn_out", "self_attn.v_proj", "linear", through_heads=True)
UP_TO_DOWN = ScalePair("mlp_out", "mlp.up_proj", "linear")

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION_BIAS = ("attention_bias", ATTENTION)

GGUF = GgufConversion(
    model_class="LlamaForCausalLM",
    tensors=("input_layernorm", *ATTENTION, "post_attention_layernorm", *MLP),
    biases=(*ATTENTION, *MLP),
    biased=(ATTENTION_BIAS, ("mlp_bias", MLP)),
    interleaved=(
        ("self_attn.q_proj", "num_attention_heads"),
        ("self_attn.k_proj", "num_key_value_heads"),
    ),
    rope_types=("default", "dynamic", "linear", "yarn", "llama3", "longrope"),
)

FAMILY = Family(
    name="Llama",
    model_type="llama",
    taps=TAPS,
    pairs=(
        ScalePair("attn_in", "input_layernorm", "norm"),
        VALUE_TO_OUTPUT,
        ScalePair("mlp_in", "post_attention_layernorm", "norm"),
        UP_TO_DOWN,
    ),
    gguf_architecture="llama",
    gguf=GGUF,
)
