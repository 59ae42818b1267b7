"""Which kinds of values transformers takes for the settings of a config.json.

Its configurations (5.23) are strict: a null or a whole number where they declare a float ends them
with an error, and everything that opens the directory afterwards, the tokenizer first. A key that
is missing has a default; only one that is there is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.untrusted import GET_AGAIN, printable
from qtool.errors import DamagedError
from qtool.model.family import Family

Kinds = tuple[type, ...]
NONE = type(None)
FLAG, WHOLE, REAL, TEXT = (bool,), (int,), (float,), (str,)
NUMBER = (int, float)

# Of every family.
KINDS: Mapping[str, Kinds] = {
    "architectures": (list, NONE),
    "hidden_size": WHOLE,
    "initializer_range": REAL,
    "intermediate_size": WHOLE,
    "is_encoder_decoder": FLAG,
    "max_position_embeddings": WHOLE,
    "num_attention_heads": WHOLE,
    "num_hidden_layers": WHOLE,
    "num_key_value_heads": (int, NONE),
    "bos_token_id": (int, NONE),
    "pad_token_id": (int, NONE),
    "rms_norm_eps": REAL,
    "tie_word_embeddings": FLAG,
    "transformers_version": (str, NONE),
    "use_cache": FLAG,
    "vocab_size": WHOLE,
}
_GEMMA: Mapping[str, Kinds] = {
    "attention_bias": FLAG,
    "attn_logit_softcapping": (float, NONE),
    "final_logit_softcapping": (float, NONE),
    "head_dim": WHOLE,
    "hidden_activation": TEXT,
    "num_key_value_heads": WHOLE,
    "query_pre_attn_scalar": WHOLE,
    "sliding_window": (int, NONE),
    "use_bidirectional_attention": (bool, NONE),
}
_QWEN: Mapping[str, Kinds] = {
    "attention_dropout": NUMBER,
    "hidden_act": TEXT,
    "max_window_layers": WHOLE,
    "sliding_window": (int, NONE),
    "use_sliding_window": FLAG,
}
# Of one family -> what it declares beside those, or in another way.
OWN: Mapping[str, Mapping[str, Kinds]] = {
    "llama": {
        "attention_bias": FLAG,
        "head_dim": (int, NONE),
        "hidden_act": TEXT,
        "mlp_bias": FLAG,
        "pretraining_tp": (int, NONE),
    },
    "mistral": {
        "attention_dropout": NUMBER,
        "head_dim": (int, NONE),
        "hidden_act": TEXT,
        "num_key_value_heads": WHOLE,
        "sliding_window": (int, NONE),
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "attention_bias": FLAG, "head_dim": WHOLE},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {
        "attention_dropout": NUMBER,
        "embd_pdrop": NUMBER,
        "hidden_act": TEXT,
        "original_max_position_embeddings": WHOLE,
        "resid_pdrop": NUMBER,
        "sliding_window": (int, NONE),
    },
    "olmo2": {"attention_bias": FLAG, "attention_dropout": NUMBER, "hidden_act": TEXT},
    "granite": {
        "attention_bias": FLAG,
        "attention_dropout": NUMBER,
        "attention_multiplier": NUMBER,
        "embedding_multiplier": NUMBER,
        "hidden_act": TEXT,
        "logits_scaling": NUMBER,
        "mlp_bias": FLAG,
        "residual_multiplier": NUMBER,
    },
}
WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number with a decimal point",
    str: "a text",
    list: "a list",
    NONE: "null",
}


def check_kinds(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse a setting of a kind that transformers' configuration of the family does not take.

    Args:
        config: config.json.
        family: of the model.
        where: the file, for messages.

    Raises:
        DamagedError: names file, key and value.
    """
    for key, kinds in {**KINDS, **OWN[family.model_type]}.items():
        if key in config and type(config[key]) not in kinds:
            raise DamagedError(
                f"{where}: '{key}' is {printable(config[key])}, not "
                f"{' or '.join(WORDS[kind] for kind in kinds)}",
                GET_AGAIN,
            )
