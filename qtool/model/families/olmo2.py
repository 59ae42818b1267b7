"""OLMo 2: attention and MLP read the residual stream itself, and norms stand behind them."""

from qtool.model.families.llama import ATTENTION, MLP, TAPS, UP_TO_DOWN, VALUE_TO_OUTPUT
from qtool.model.families.qwen3 import HEAD_NORMS
from qtool.model.family import Family, GgufConversion

FAMILY = Family(
    name="OLMo 2",
    model_type="olmo2",
    taps=TAPS,
    # No norm precedes q/k/v or gate/up, so their inputs have nowhere to fold a scale.
    pairs=(VALUE_TO_OUTPUT, UP_TO_DOWN),
    gguf_architecture="olmo2",
    gguf=GgufConversion(
        model_class="Olmo2ForCausalLM",
        tensors=(
            *ATTENTION,
            *HEAD_NORMS,
            "post_attention_layernorm",
            *MLP,
            "post_feedforward_layernorm",
        ),
        head="always",
        square=True,
    ),
)
