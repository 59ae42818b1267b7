"""Mistral 7B, Nemo and Small; llama.cpp runs them as Llama."""

from dataclasses import replace

from qtool.model.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, name="Mistral", model_type="mistral", gguf_architecture="llama")
