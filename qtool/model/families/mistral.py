"""Mistral 7B, Nemo and Small; llama.cpp runs them as Llama."""

from dataclasses import replace

from qtool.model.families.llama import FAMILY as LLAMA
from qtool.model.families.llama import GGUF as LLAMA_GGUF
from qtool.model.family import GgufWindow

FAMILY = replace(
    LLAMA,
    name="Mistral",
    model_type="mistral",
    gguf_architecture="llama",
    gguf=replace(
        LLAMA_GGUF,
        model_class="MistralForCausalLM",
        biases=(),
        biased=(),
        window=GgufWindow(applied=False, default=4096),
    ),
)
