"""Gemma 3, the text model: Gemma 2 with norms on the heads of q and k."""

from dataclasses import replace

from qtool.model.families.gemma2 import FAMILY as GEMMA2
from qtool.model.families.gemma2 import GGUF as GEMMA2_GGUF
from qtool.model.families.qwen3 import HEAD_NORMS
from qtool.model.family import GgufKey, GgufWindow

FAMILY = replace(
    GEMMA2,
    name="Gemma 3 (text)",
    model_type="gemma3_text",
    gguf_architecture="gemma3",
    gguf=replace(
        GEMMA2_GGUF,
        model_class="Gemma3ForCausalLM",
        tensors=(*GEMMA2_GGUF.tensors[:5], *HEAD_NORMS, *GEMMA2_GGUF.tensors[5:]),
        keys=(GgufKey("final_logit_softcapping", "final_logit_softcapping", optional=True),),
        fixed=(*GEMMA2_GGUF.fixed, ("attn_logit_softcapping", (None,))),
        window=GgufWindow(applied=True, period=6, default=4096),
        head="optional",
        query_scalar_blocks=62,
        rope_theta=1e6,
        local_rope_theta=10000.0,
    ),
)
