"""Small random models, one for every family, with everything that makes it special.

Sizes are awkward on purpose: heads do not fill the hidden size where a family may choose, windows
are shorter than the tests' texts, multipliers are not one, norms and biases are not constant.
"""

import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 300  # the tokenizer knows 258; as in real models, some rows are never used
SLIDING_WINDOW = 16

# What each family sets beside the sizes that all share.
SPECIAL = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "mistral": {"head_dim": 32, "sliding_window": SLIDING_WINDOW},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": SLIDING_WINDOW,
        "max_window_layers": 1,
    },
    "qwen3": {
        "head_dim": 32,
        "use_sliding_window": True,
        "sliding_window": SLIDING_WINDOW,
        "max_window_layers": 1,
    },
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": SLIDING_WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": SLIDING_WINDOW,
        "final_logit_softcapping": 5.0,
    },
    "phi3": {
        "sliding_window": SLIDING_WINDOW,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
    },
}
TIED = frozenset({"gemma2", "gemma3_text", "granite", "qwen2"})  # by default, as their small ones
OFFSET = frozenset({"gemma2", "gemma3_text"})  # their norms store weight - 1


def tiny_model(
    model_type,
    directory,
    *,
    seed=0,
    dtype=torch.float32,
    layers=2,
    tied=None,
    hidden=64,
    intermediate=160,
    outliers=True,
    max_shard_size="5GB",
    **settings,
):
    """Write a model of a family with random weights and a tokenizer; return its directory."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
        "tie_word_embeddings": model_type in TIED if tied is None else tied,
        **SPECIAL[model_type],
        **settings,
    }
    if model_type == "gemma3_text":  # its own pattern shows a full layer only every sixth
        kinds = ("sliding_attention", "full_attention")
        fields["layer_types"] = [kinds[index % 2] for index in range(layers)]
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _fill(model, model_type, seed, outliers)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, safe_serialization=True, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
def _fill(model, model_type, seed, outliers):
    """Draw weights that keep activations of order one, some inputs of each linear far larger."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=draw)
        if parameter.dim() == 2 and "embed" in name:
            values *= parameter.shape[1] ** -0.5  # rows may serve as the head, too
        elif parameter.dim() == 2:
            values *= parameter.shape[1] ** -0.5
        elif name.endswith("bias"):
            values *= 0.3
        else:  # norms: a few channels stand out, as in trained models
            values = 0.25 * values + 1
            if outliers:
                values[:: max(len(values) // 5, 2)] *= 4
            values -= 1 if model_type in OFFSET else 0
        parameter.copy_(values)


def token_ids(windows, length, seed=0):
    """Random token ids [windows, length] that the tokenizer knows."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (windows, length), generator=draw)
