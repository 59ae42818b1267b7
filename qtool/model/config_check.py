"""Hold a config.json of a known family to what transformers can build, before it is imported.

Every number that decides what is computed is looked at: there, finite, of its kind and in range.
Sizes were bounded when the file was read; whether they are those of the weights, the headers tell.
What transformers accepts: its activations.py, modeling_rope_utils.py and configurations at 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.untrusted import GET_AGAIN, printable
from qtool.errors import DamagedError
from qtool.model.config_kinds import check_kinds
from qtool.model.config_values import head_size, real, section, whole
from qtool.model.family import Family

ACTIVATIONS = frozenset(
    {"gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python"}
    | {"gelu_python_tanh", "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear"}
    | {"mish", "prelu", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus"}
    | {"swish", "tanh", "xielu"}
)
ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3", "su"})
NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
DTYPES = frozenset({"auto", "float16", "bfloat16", "float32", "float64", "half", "float", "double"})

LARGEST_EPSILON = 1.0
LARGEST_FACTOR = 1e6
LARGEST_BASE = 1e30
# Key -> range of its value, both ends included; families without such a key ignore it.
RANGES: Mapping[str, tuple[float, float]] = {
    "rms_norm_eps": (0.0, LARGEST_EPSILON),
    "attention_dropout": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "attn_logit_softcapping": (1e-6, 1e9),
    "final_logit_softcapping": (1e-6, 1e9),
    "query_pre_attn_scalar": (1e-6, 1e9),
    "attention_multiplier": (-1e9, 1e9),
    "embedding_multiplier": (-1e9, 1e9),
    "residual_multiplier": (-1e9, 1e9),
    "logits_scaling": (1e-9, 1e9),
    "partial_rotary_factor": (1e-6, 1.0),
    "rope_theta": (1e-9, LARGEST_BASE),
    "rope_local_base_freq": (1e-9, LARGEST_BASE),
}
# llama.cpp takes these for missing where they are 0, transformers multiplies by them.
MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier")
FLAGS = ("attention_bias", "mlp_bias", "use_sliding_window", "tie_word_embeddings", "use_cache")


def check_config(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse settings that no model of the family has.

    Args:
        config: config.json, its sizes in bounds.
        family: of the model.
        where: the file, for messages.

    Raises:
        DamagedError: a setting is missing, of another kind or out of range; names file and key.
    """
    real(config, "rms_norm_eps", 1e-6, where=where)
    _check_ranges(config, where)
    for key in FLAGS:
        if config.get(key) is not None and not isinstance(config[key], bool):
            raise _wrong(where, key, config[key], "true or false")
    _check_words(config, family, where)
    for key in ("sliding_window", "max_window_layers", "original_max_position_embeddings"):
        if config.get(key) is not None and config[key] != 0:
            whole(config, key, where=where)
    _check_window(config, family, where)
    blocks = whole(config, "num_hidden_layers", where=where)
    heads = whole(config, "num_attention_heads", where=where)
    shared = whole(config, "num_key_value_heads", heads, where=where)
    if heads % shared:
        raise _wrong(where, "num_key_value_heads", shared, f"a divisor of {heads} attention heads")
    size = head_size(config, family.gguf)
    if size % 2:
        raise _wrong(where, "head_dim", size, "an even number of values, which rotate in pairs")
    _check_layer_types(config, blocks, where)
    _check_class(config, family, where)
    for key in ("rope_parameters", "rope_scaling"):
        _check_rope(section(config, key, where=where), size, config, f"{where}: {key}")
    _check_token_ids(config, where)
    check_kinds(config, family, where)


def _check_window(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse a window of no tokens: to llama.cpp it is none, to transformers an empty one."""
    window = family.gguf.window
    used = window is not None and (not window.switched or config.get("use_sliding_window") is True)
    if used and config.get("sliding_window") == 0:
        raise _wrong(where, "sliding_window", 0, "a width of at least 1")


def _check_class(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse a model that engines going by `architectures` run as another one than its type says.

    One with code of its own has a class of its own, too.
    """
    named = config.get("architectures")
    if not named or "auto_map" in config:
        return
    if not isinstance(named, list) or family.gguf.model_class not in named:
        kind = f"{family.gguf.model_class}, as 'model_type' {family.model_type} says"
        raise _wrong(where, "architectures", named, kind)


def _check_token_ids(config: Mapping[str, Any], where: str) -> None:
    vocabulary = whole(config, "vocab_size", where=where)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(one) is int and abs(one) < 2**31 for one in ids):
            raise _wrong(where, key, value, "the number of a token")
    pad = config.get("pad_token_id")
    if type(pad) is int and not -vocabulary <= pad < vocabulary:
        # transformers builds an embedding around this number and fails with an assertion.
        raise _wrong(where, "pad_token_id", pad, f"one of {vocabulary} tokens")


def _check_ranges(config: Mapping[str, Any], where: str) -> None:
    for key, (least, most) in RANGES.items():
        if config.get(key) is None:
            continue
        value = real(config, key, where=where)
        if not least <= value <= most:
            raise _wrong(where, key, config[key], f"a number from {least:g} to {most:g}")
        if key in MULTIPLIERS and value == 0:
            raise _wrong(where, key, config[key], "a number other than 0")


def _check_words(config: Mapping[str, Any], family: Family, where: str) -> None:
    for key in {"hidden_act", family.gguf.activation[0]}:
        value = config.get(key)
        if value is not None and (not isinstance(value, str) or value not in ACTIVATIONS):
            raise _wrong(where, key, value, "the name of an activation such as silu")
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        known = isinstance(value, str) and value.removeprefix("torch.") in DTYPES
        if value is not None and not known:
            raise _wrong(where, key, value, "a floating point type such as bfloat16")


def _check_layer_types(config: Mapping[str, Any], blocks: int, where: str) -> None:
    kinds = config.get("layer_types")
    if kinds is None:
        return
    known = isinstance(kinds, list) and all(
        isinstance(kind, str) and kind in LAYER_TYPES for kind in kinds
    )
    if known and "sliding_attention" in kinds and config.get("sliding_window", 0) is None:
        raise _wrong(where, "sliding_window", None, "the width that layer_types asks for")
    if not known or len(kinds) != blocks:
        raise _wrong(where, "layer_types", kinds, f"{blocks} of {', '.join(sorted(LAYER_TYPES))}")


def _check_rope(
    stated: Mapping[str, Any], size: int, config: Mapping[str, Any], where: str
) -> None:
    """Check one set of rotary settings, or those of each kind of attention."""
    if LAYER_TYPES & stated.keys():
        for kind in sorted(LAYER_TYPES & stated.keys()):
            _check_rope(section(stated, kind, where=where), size, config, f"{where}.{kind}")
        return
    kind = stated.get("rope_type", stated.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise _wrong(where, "rope_type", kind, f"one of {', '.join(sorted(ROPE_TYPES))}")
    _check_ranges(stated, where)
    _check_rope_numbers(stated, kind, where)
    if kind not in {"longrope", "su"}:
        return
    part = real(
        stated, "partial_rotary_factor", real(config, "partial_rotary_factor", 1.0), where=where
    )
    pairs = int(size * part) // 2
    for key in ("short_factor", "long_factor"):
        values = stated.get(key)
        numbers = isinstance(values, list) and all(
            type(one) in {int, float} and 0 < one <= LARGEST_FACTOR for one in values
        )
        if not numbers or len(values or ()) != pairs:
            raise _wrong(where, key, values, f"{pairs} numbers above 0")


def _check_rope_numbers(stated: Mapping[str, Any], kind: str, where: str) -> None:
    if "rope_theta" in stated and stated["rope_theta"] is None:
        raise _wrong(where, "rope_theta", None, "a number")
    if stated.get("original_max_position_embeddings") is not None:
        whole(stated, "original_max_position_embeddings", where=where)
    for key in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
        if stated.get(key) is None and key not in NEEDED.get(kind, ()):
            continue
        value = real(stated, key, where=where)
        if not 0 < value <= LARGEST_FACTOR:
            raise _wrong(where, key, value, f"a number above 0, up to {LARGEST_FACTOR:g}")


def _wrong(where: str, key: str, value: object, wanted: str) -> DamagedError:
    return DamagedError(f"{where}: '{key}' is {printable(value)}, not {wanted}", GET_AGAIN)
