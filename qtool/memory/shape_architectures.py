"""What every architecture is made of: one literal each, by `model_type` of config.json.

Names of tensors are llama.cpp's. Sources: its src/models and conversion/ at b11549, and the models
of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

QKV = ("attn_q", "attn_k", "attn_v")
ATTENTION = (*QKV, "attn_output")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
TWO_NORMS = ("attn_norm", "ffn_norm")
FOUR_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
POST_NORMS = ("post_attention_norm", "post_ffw_norm")


@dataclass(frozen=True)
class Experts:
    """How the experts of a model type are stored.

    Args:
        inner: key of config.json for an expert's inner width; without it the MLP's counts.
        shared: keys for the inner width of the expert that every token meets, if there is one.
        shared_count: key for how many experts of width `inner` it replaces.
        shared_gate: whether a vector decides how much of it counts.
        first_dense: key for how many blocks at the start have an MLP instead.
        step: key for every how many blocks have experts, counted from the last of them.
        dense_inner: key for the inner width of blocks without experts, if it is another.
        dense_blocks: key for a list of further blocks that have an MLP instead.
        biases: whether router and experts have biases.
        correction: whether the router has a bias that only chooses: `exp_probs_b`.
    """

    inner: str = "moe_intermediate_size"
    shared: str = ""
    shared_count: str = ""
    shared_gate: bool = False
    first_dense: str = ""
    step: str = ""
    dense_inner: str = ""
    dense_blocks: str = ""
    biases: bool = False
    correction: bool = False


@dataclass(frozen=True)
class Window:
    """Which blocks see only the last tokens, where config.json does not list them.

    Args:
        period: every period-th block sees everything.
        default: width where config.json has none; None: then there is no window.
        key: under which the period may stand.
        width: key of the window's width.
    """

    period: int
    default: int | None = None
    key: str = "sliding_window_pattern"
    width: str = "sliding_window"


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Args:
        name: llama.cpp's.
        norms: vectors of a block, as wide as the hidden state.
        norm_biases: whether norms have biases, the last one's included.
        attention: query, key and value as three linears, as one, or by way of latents (MLA).
        biases: linears that always have one.
        bias_keys: linears that have one where config.json says so: (key, linears, default).
        head_norms: norms on queries and keys: of one head's width, or of all heads'.
        head_norms_key: key that switches those norms, False where it is missing.
        mlp: two linears before the product, the same two stored as one, or one without a product.
        mlp_key: key that switches to `plain` where it is false.
        experts: None where there are none, whatever config.json says.
        window: None where llama.cpp gives every block the whole context.
        factors: scalings of positions that llama.cpp stores divisors for.
        head: whether the output head is `optional`, `always` stored, or `never`.
        tied: whether embeddings serve as head where config.json does not say.
        defaults: of numbers that config.json may leave out.
        sinks: whether every head has a number that attention may spill into.
        extra_blocks: key for how many further blocks predict further tokens and are stored.
        exact: whether the tensors are known; otherwise they are those of a usual model.
        unclear: keys of config.json that, where they are set, change tensors in unknown ways.
    """

    name: str
    norms: tuple[str, ...] = TWO_NORMS
    norm_biases: bool = False
    attention: Literal["separate", "fused", "latent"] = "separate"
    biases: tuple[str, ...] = ()
    bias_keys: tuple[tuple[str, tuple[str, ...], bool], ...] = ()
    head_norms: Literal["", "head", "heads"] = ""
    head_norms_key: str = ""
    mlp: Literal["gated", "fused", "plain"] = "gated"
    experts: Experts | None = None
    window: Window | None = None
    factors: frozenset[str] = frozenset()
    head: Literal["optional", "always", "never"] = "optional"
    tied: bool = False
    defaults: Mapping[str, int] = field(default_factory=dict)
    sinks: bool = False
    extra_blocks: str = ""
    exact: bool = True
    unclear: tuple[str, ...] = ()


ATTENTION_BIAS = (("attention_bias", ATTENTION, False),)
LLAMA_FACTORS = frozenset({"llama3", "longrope", "su"})

LLAMA = Architecture(
    "llama",
    bias_keys=(*ATTENTION_BIAS, ("mlp_bias", MLP, False)),
    factors=LLAMA_FACTORS,
)
MIXTRAL = Architecture("llama", experts=Experts(inner="intermediate_size"))
QWEN2 = Architecture("qwen2", biases=QKV)
QWEN2_MOE = Architecture(
    "qwen2moe",
    biases=QKV,
    unclear=("mlp_only_layers",),
    experts=Experts(shared="shared_expert_intermediate_size", shared_gate=True),
)
QWEN3 = Architecture(
    "qwen3", bias_keys=ATTENTION_BIAS, head_norms="head", defaults={"head_size": 128}
)
QWEN3_MOE = Architecture(
    "qwen3moe",
    bias_keys=ATTENTION_BIAS,
    head_norms="head",
    experts=Experts(),
    unclear=("mlp_only_layers",),
)
GEMMA = Architecture(
    "gemma", bias_keys=ATTENTION_BIAS, head="never", tied=True, defaults={"head_size": 256}
)
GEMMA2 = replace(GEMMA, name="gemma2", norms=FOUR_NORMS, window=Window(2, 4096))
GEMMA3 = Architecture(
    "gemma3",
    bias_keys=ATTENTION_BIAS,
    norms=FOUR_NORMS,
    head_norms="head",
    window=Window(6, 4096),
    tied=True,
    defaults={
        "heads": 8,
        "key_value_heads": 4,
        "head_size": 256,
        "vocabulary": 262208,
        "context": 131072,
        "hidden": 2304,
        "inner": 9216,
        "blocks": 26,
    },
)
PHI3 = Architecture(
    "phi3", attention="fused", mlp="fused", factors=frozenset({"longrope", "su", "yarn"})
)
PHI_MOE = Architecture(
    "phimoe",
    norm_biases=True,
    bias_keys=(*ATTENTION_BIAS, ("lm_head_bias", ("output",), False)),
    experts=Experts(inner="intermediate_size"),
    factors=frozenset({"longrope", "su"}),
)
OLMO2 = Architecture(
    "olmo2", norms=POST_NORMS, bias_keys=ATTENTION_BIAS, head_norms="heads", head="always"
)
OLMO3 = replace(OLMO2, window=Window(4))
OLMOE = Architecture(
    "olmoe", head_norms="heads", experts=Experts(inner="intermediate_size"), head="always"
)
GRANITE = replace(LLAMA, name="granite", factors=frozenset())
GRANITE_MOE = Architecture(
    "granitemoe", bias_keys=ATTENTION_BIAS, experts=Experts(inner="intermediate_size")
)
COHERE = Architecture(
    "command-r",
    norms=("attn_norm",),
    bias_keys=ATTENTION_BIAS,
    head_norms="heads",
    head_norms_key="use_qk_norm",
    head="never",
    tied=True,
)
COHERE2 = replace(COHERE, name="cohere2", head_norms="", head_norms_key="", window=Window(4, 4096))
STARCODER2 = Architecture(
    "starcoder2",
    norm_biases=True,
    bias_keys=(("use_bias", (*ATTENTION, "ffn_up", "ffn_down"), True),),
    mlp="plain",
    tied=True,
)
STABLELM = Architecture(
    "stablelm",
    norm_biases=True,
    bias_keys=(("use_qkv_bias", QKV, False),),
    unclear=("use_parallel_residual", "qk_layernorm"),
)
SMOLLM3 = Architecture("smollm3", bias_keys=(*ATTENTION_BIAS, ("mlp_bias", MLP, False)), tied=True)
EXAONE = Architecture("exaone", factors=frozenset({"llama3"}))
EXAONE4 = Architecture(
    "exaone4",
    norms=POST_NORMS,
    head_norms="head",
    window=Window(4),
    factors=frozenset({"llama3"}),
)
GLM4 = Architecture(
    "glm4", norms=FOUR_NORMS, bias_keys=(("attention_bias", QKV, False),), mlp="fused"
)
GLM4_MOE = Architecture(
    "glm4moe",
    norms=("attn_norm", "post_attention_norm"),
    bias_keys=(("attention_bias", QKV, False),),
    head_norms="head",
    head_norms_key="use_qk_norm",
    experts=Experts(
        shared_count="n_shared_experts", first_dense="first_k_dense_replace", correction=True
    ),
    extra_blocks="num_nextn_predict_layers",
)
GPT_OSS = Architecture(
    "gpt-oss",
    norms=("attn_norm", "post_attention_norm"),
    biases=ATTENTION,
    experts=Experts(inner="intermediate_size", biases=True),
    window=Window(2, 128),
    sinks=True,
    defaults={"head_size": 64},
)
DEEPSEEK2 = Architecture(
    "deepseek2",
    attention="latent",
    experts=Experts(
        shared_count="n_shared_experts", first_dense="first_k_dense_replace", step="moe_layer_freq"
    ),
)
DEEPSEEK3 = replace(
    DEEPSEEK2,
    experts=Experts(
        shared_count="n_shared_experts",
        first_dense="first_k_dense_replace",
        step="moe_layer_freq",
        correction=True,
    ),
)
LLAMA4 = Architecture(
    "llama4",
    bias_keys=ATTENTION_BIAS,
    experts=Experts(
        inner="intermediate_size",
        shared="intermediate_size",
        step="interleave_moe_layer_step",
        dense_inner="intermediate_size_mlp",
    ),
    window=Window(4, 8192, width="attention_chunk_size"),
    factors=frozenset({"llama3"}),
)
SEED_OSS = Architecture(
    "seed_oss",
    norms=("attn_norm", "post_attention_norm"),
    bias_keys=(("attention_bias", QKV, True), ("attention_out_bias", ("attn_output",), False)),
)
MINIMAX_M2 = Architecture(
    "minimax-m2",
    head_norms="heads",
    experts=Experts(inner="intermediate_size", correction=True),
)
HUNYUAN_DENSE = Architecture("hunyuan-dense", head_norms="head", bias_keys=ATTENTION_BIAS)
ERNIE = Architecture("ernie4_5", bias_keys=(("use_bias", (*ATTENTION, *MLP), False),), tied=True)

ERNIE_MOE = Architecture(
    "ernie4_5-moe",
    bias_keys=(("use_bias", (*ATTENTION, *MLP), False),),
    experts=Experts(
        shared_count="moe_num_shared_experts",
        first_dense="moe_layer_start_index",
        correction=True,
    ),
    tied=True,
)

# model_type of config.json -> what it is made of. Models for pictures and text share the text
# model's entry: the weights of their other half are in files of their own.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "mistral": Architecture("llama"),
    "mistral3": Architecture("llama"),
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen2_vl": replace(QWEN2, name="qwen2vl"),
    "qwen2_vl_text": replace(QWEN2, name="qwen2vl"),
    "qwen2_5_vl": replace(QWEN2, name="qwen2vl"),
    "qwen2_5_vl_text": replace(QWEN2, name="qwen2vl"),
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_vl_text": replace(QWEN3, name="qwen3vl"),
    "qwen3_moe": QWEN3_MOE,
    "qwen3_vl_moe_text": replace(QWEN3_MOE, name="qwen3vlmoe"),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "phimoe": PHI_MOE,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "olmoe": OLMOE,
    "granite": GRANITE,
    "granitemoe": GRANITE_MOE,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "starcoder2": STARCODER2,
    "stablelm": STABLELM,
    "smollm3": SMOLLM3,
    "exaone": EXAONE,
    "exaone4": EXAONE4,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "gpt_oss": GPT_OSS,
    "deepseek_v2": DEEPSEEK2,
    "deepseek_v3": DEEPSEEK3,
    "kimi_k2": DEEPSEEK3,
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "seed_oss": SEED_OSS,
    "minimax_m2": MINIMAX_M2,
    "hunyuan_v1_dense": HUNYUAN_DENSE,
    "ernie4_5": ERNIE,
    "ernie4_5_moe": ERNIE_MOE,
    "ministral3": Architecture("mistral3", factors=LLAMA_FACTORS),
}

# What a model type that nobody described is taken for, with a label that says so.
USUAL = Architecture(
    "", bias_keys=(*ATTENTION_BIAS, ("mlp_bias", MLP, False)), experts=Experts(), exact=False
)
