"""Granite 3: Llama with fixed multipliers on embeddings, attention, residuals and logits."""

from dataclasses import replace

from qtool.model.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, name="Granite", model_type="granite", gguf_architecture="granite")
