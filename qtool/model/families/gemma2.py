"""Gemma 2: norms store weight - 1, and stand before and after both halves of a block."""

from qtool.model.families.llama import TAPS, UP_TO_DOWN, VALUE_TO_OUTPUT
from qtool.model.family import Family, ScalePair

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
    norm_offset=1.0,
)
