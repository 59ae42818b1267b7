"""Qwen3, dense: Llama with norms on the heads of q and k."""

from dataclasses import replace

from qtool.model.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, name="Qwen3", model_type="qwen3", gguf_architecture="qwen3")
