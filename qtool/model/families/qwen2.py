"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from dataclasses import replace

from qtool.model.families.llama import ATTENTION, MLP
from qtool.model.families.llama import FAMILY as LLAMA
from qtool.model.family import GgufConversion, GgufWindow

WINDOW = GgufWindow(applied=False, default=4096, switched=True)

FAMILY = replace(
    LLAMA,
    name="Qwen2",
    model_type="qwen2",
    gguf_architecture="qwen2",
    gguf=GgufConversion(
        model_class="Qwen2ForCausalLM",
        tensors=("input_layernorm", *ATTENTION, "post_attention_layernorm", *MLP),
        biases=ATTENTION[:3],
        window=WINDOW,
        square=True,
    ),
)
