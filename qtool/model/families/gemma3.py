"""Gemma 3, the text model: Gemma 2 with norms on the heads of q and k."""

from dataclasses import replace

from qtool.model.families.gemma2 import FAMILY as GEMMA2

FAMILY = replace(
    GEMMA2, name="Gemma 3 (text)", model_type="gemma3_text", gguf_architecture="gemma3"
)
