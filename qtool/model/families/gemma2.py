"""Gemma 2: norms store weight - 1, and stand before and after both halves of a block."""

from qtool.model.families.llama import ATTENTION, MLP, TAPS, UP_TO_DOWN, VALUE_TO_OUTPUT
from qtool.model.family import Family, GgufConversion, GgufKey, GgufWindow, ScalePair

GGUF = GgufConversion(
    model_class="Gemma2ForCausalLM",
    tensors=(
        "input_layernorm",
        *ATTENTION,
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        *MLP,
        "post_feedforward_layernorm",
    ),
    keys=(
        GgufKey("attn_logit_softcapping", "attn_logit_softcapping", default=50.0),
        GgufKey("final_logit_softcapping", "final_logit_softcapping", default=30.0),
    ),
    rope_types=("default", "dynamic", "linear"),
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    fixed=(("use_bidirectional_attention", (None, False)),),
    window=GgufWindow(applied=True, period=2, default=4096, required=True),
    head="never",
    tied=True,
    head_dim=256,
    query_scalar_blocks=46,
)

FAMILY = Family(
    name="Gemma 2",
    model_type="gemma2",
    taps=TAPS,
    pairs=(
        ScalePair("attn_in", "input_layernorm", "norm"),
        VALUE_TO_OUTPUT,
        ScalePair("mlp_in", "pre_feedforward_layernorm", "norm"),
        UP_TO_DOWN,
    ),
    gguf_architecture="gemma2",
    gguf=GGUF,
    norm_offset=1.0,
)
