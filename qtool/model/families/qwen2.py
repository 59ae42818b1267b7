"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from dataclasses import replace

from qtool.model.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, name="Qwen2", model_type="qwen2", gguf_architecture="qwen2")
