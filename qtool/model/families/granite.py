"""Granite 3: Llama with fixed multipliers on embeddings, attention, residuals and logits."""

from dataclasses import replace

from qtool.model.families.llama import FAMILY as LLAMA
from qtool.model.families.llama import GGUF as LLAMA_GGUF
from qtool.model.family import GgufKey

FAMILY = replace(
    LLAMA,
    name="Granite",
    model_type="granite",
    gguf_architecture="granite",
    gguf=replace(
        LLAMA_GGUF,
        model_class="GraniteForCausalLM",
        keys=(
            GgufKey("attention.scale", "attention_multiplier", default=1.0),
            GgufKey("embedding_scale", "embedding_multiplier", default=1.0),
            GgufKey("residual_scale", "residual_multiplier", default=1.0),
            GgufKey("logit_scale", "logits_scaling", default=1.0),
        ),
    ),
)
