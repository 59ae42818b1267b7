"""A config.json for transformers 5 from the metadata of a GGUF file: `gguf_metadata` backwards.

The file is a stranger's: every number is checked, and what llama.cpp computes from it is what the
config.json says, whatever the model was called before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.untrusted import GET_AGAIN, printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.model.config_values import head_size, real, whole
from qtool.model.conversion import MOST_BLOCKS, module_names
from qtool.model.family import COMMON_KEYS, FAMILIES, Family
from qtool.model.gguf_metadata import SLIDING, query_scalar, regular_window
from qtool.model.gguf_rope import (
    FREQUENCIES,
    LONG,
    SHORT,
    Rope,
    llama3_or_longrope,
    rope_parameters,
    yarn_magnitude,
)

METADATA = "the GGUF metadata"
FULL = "full_attention"
TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# Settings that change what llama.cpp computes and that the families do not have.
FOREIGN = ("expert_count", "rope.dimension_sections", "rope.scaling.yarn_log_multiplier")


def family_of_metadata(metadata: Mapping[str, Value]) -> Family:
    """Return the family that runs a GGUF file.

    Raises:
        UnsupportedError: an architecture without a family.
        DamagedError: no architecture.
    """
    stated = metadata.get("general.architecture")
    if stated is None or stated.array or not isinstance(stated.content, str):
        raise DamagedError(f"{METADATA} name no architecture", GET_AGAIN)
    architecture = stated.content
    found = [FAMILIES[key] for key in FAMILIES if FAMILIES[key].gguf_architecture == architecture]
    if not found:
        known = sorted({FAMILIES[key].gguf_architecture for key in FAMILIES})
        raise UnsupportedError(
            f"GGUF architecture '{printable(architecture)}' is not supported",
            f"supported: {', '.join(known)}",
        )
    has_window = f"{architecture}.attention.sliding_window" in metadata
    return next((one for one in found if bool(one.gguf.window) is has_window), found[0])


def checkpoint_config(
    metadata: Mapping[str, Value],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Return the config.json of the model in a GGUF file.

    Args:
        metadata: of the file.
        shapes: of its tensors, rows before columns, by llama.cpp's name.
        factors: values of those tensors that `gguf_rope.FACTOR_TENSORS` names.

    Raises:
        UnsupportedError: an architecture or a setting that transformers has no family for.
        DamagedError: metadata that are missing or impossible.
    """
    family = family_of_metadata(metadata)
    gguf = family.gguf
    own = _own(metadata, family.gguf_architecture)
    _refuse_foreign(own, family)
    found: dict[str, Any] = {"architectures": [gguf.model_class], "model_type": family.model_type}
    for key in (*COMMON_KEYS, *gguf.keys):
        if key.optional and not own.get(key.name):
            found[key.config] = None
            continue
        default: Any = key.default
        if isinstance(default, str):
            default = found[default]
        if key.whole:
            found[key.config] = whole(own, key.name, default, where=METADATA)
        else:
            found[key.config] = real(own, key.name, default, where=METADATA)
    if found["num_hidden_layers"] > MOST_BLOCKS:
        raise DamagedError(f"{METADATA} declare more than {MOST_BLOCKS} blocks", GET_AGAIN)
    found["vocab_size"] = _vocabulary(shapes)
    found["tie_word_embeddings"] = "output.weight" not in shapes
    found[gguf.activation[0]] = gguf.activation[1]
    found |= _heads(own, found, family)
    found |= {key: _all_biases(shapes, names, family) for key, names in gguf.biased}
    found |= _window(own, found["num_hidden_layers"], family)
    rope = _rope(own, found, family, factors or {})
    found["rope_parameters"] = rope_parameters(rope, head_size(found, gguf))
    if gguf.original_context:
        found["original_max_position_embeddings"] = rope.original
    tokens = found["vocab_size"]
    return found | {key: _token(metadata.get(name), tokens) for key, name in TOKENS.items()}


def _own(metadata: Mapping[str, Value], architecture: str) -> dict[str, Any]:
    """Return the values below the architecture's name, as config.json would hold them."""
    prefix = f"{architecture}."
    found: dict[str, Any] = {}
    for key, value in metadata.items():
        if not key.startswith(prefix):
            continue
        content: Any = list(value.content) if isinstance(value.content, tuple) else value.content
        if value.kind == "f32" and not value.array:
            content = _shortest(content)
        found[key.removeprefix(prefix)] = content
    return found


def _shortest(number: float) -> float:
    """Return the number of fewest digits that float32 rounds to this one: 1e-05, not its noise."""
    return float(str(np.float32(number)))


def _refuse_foreign(own: Mapping[str, Any], family: Family) -> None:
    foreign = [key for key in FOREIGN if own.get(key)]
    if own.get("attention.causal") is False:
        foreign.append("attention.causal")
    if own.get("attention.value_length") != own.get("attention.key_length"):
        foreign.append("attention.value_length")
    if foreign:
        raise UnsupportedError(
            f"'{family.gguf_architecture}.{foreign[0]}' = {printable(own.get(foreign[0]))}: "
            f"transformers has no such {family.name}",
            "run this file with llama.cpp",
        )


def _vocabulary(shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes.get("token_embd.weight", ())
    if len(shape) != 2:
        raise DamagedError("the GGUF file has no tensor 'token_embd.weight'", GET_AGAIN)
    return shape[0]


def _token(value: Value | None, tokens: int) -> int | None:
    """Return a special token; None, as in llama.cpp, where there is no such token."""
    content = None if value is None else value.content
    return content if type(content) is int and 0 <= content < tokens else None


def _heads(own: Mapping[str, Any], found: Mapping[str, Any], family: Family) -> dict[str, Any]:
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    usual = max(hidden // heads, 1)
    size = whole(own, "attention.key_length", usual, where=METADATA)
    if family.gguf.square and size * heads != hidden:
        raise DamagedError(
            f"{METADATA} have {heads} heads of {size} for a hidden size of {hidden}", GET_AGAIN
        )
    settings: dict[str, Any] = {} if family.gguf.square else {"head_dim": size}
    if family.gguf.query_scalar_blocks is not None:
        settings["query_pre_attn_scalar"] = query_scalar({**found, **settings}, family)
    return settings


def _all_biases(
    shapes: Mapping[str, tuple[int, ...]], linears: tuple[str, ...], family: Family
) -> bool:
    """Return whether these linears have biases.

    Raises:
        UnsupportedError: only some of them have.
    """
    names = module_names(family, 1, [f"{family.blocks}.0.{linear}" for linear in linears])
    there = {f"{name}.bias" in shapes for name in names.values()}
    if len(there) > 1:
        raise UnsupportedError(
            f"only some of {', '.join(names.values())} have a bias: transformers has no such "
            f"{family.name}",
            "run this file with llama.cpp",
        )
    return there == {True}


def _window(own: Mapping[str, Any], blocks: int, family: Family) -> dict[str, Any]:
    window = family.gguf.window
    if window is None:
        return {}
    key = "attention.sliding_window"
    if own.get(key) == 0 or (key not in own and not window.required):
        width, sliding = None, (False,) * blocks
    else:
        width = whole(own, key, window.default, where=METADATA)
        sliding = _sliding(own, blocks, window.period)
    found: dict[str, Any] = {"sliding_window": width}
    if window.switched:
        found["use_sliding_window"] = any(sliding)
        found["max_window_layers"] = sliding.index(True) if any(sliding) else blocks
    if window.applied or window.switched:
        found["layer_types"] = [SLIDING if one else FULL for one in sliding]
    return found


def _sliding(own: Mapping[str, Any], blocks: int, period: int) -> tuple[bool, ...]:
    pattern = own.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list) and len(pattern) == blocks:
        return tuple(bool(one) for one in pattern)
    if type(pattern) is int and pattern >= 0:
        return regular_window(blocks, pattern)
    raise DamagedError(
        f"{METADATA}: 'attention.sliding_window_pattern' is not a pattern", GET_AGAIN
    )


def _rope(
    own: Mapping[str, Any],
    found: Mapping[str, Any],
    family: Family,
    factors: Mapping[str, Sequence[float]],
) -> Rope:
    gguf, context = family.gguf, found["max_position_embeddings"]
    size = head_size(found, gguf)
    dimensions = whole(own, "rope.dimension_count", size, where=METADATA)
    if dimensions % 2 or dimensions > size or (dimensions != size and not gguf.partial_rotary):
        raise DamagedError(f"{METADATA} rotate {dimensions} of {size} values of a head", GET_AGAIN)
    original = whole(own, "rope.scaling.original_context_length", context, where=METADATA)
    theta = real(own, "rope.freq_base", 10000.0, where=METADATA)
    local = gguf.local_rope_theta
    if local is not None:
        local = real(own, "rope.freq_base_swa", local, where=METADATA)
    if theta <= 1:
        raise DamagedError(f"{METADATA} rotate with base {theta:g}", GET_AGAIN)
    plain = Rope("default", theta, dimensions, original, local_theta=local)
    rope = _scaled(plain, own, factors)
    if rope.kind not in gguf.rope_types:
        raise UnsupportedError(
            f"neither llama.cpp nor transformers scales positions of {family.name} as "
            f"'{printable(rope.kind)}'",
            "convert the model again from its original checkpoint",
        )
    return rope


def _scaled(plain: Rope, own: Mapping[str, Any], factors: Mapping[str, Sequence[float]]) -> Rope:
    if FREQUENCIES in factors:
        return llama3_or_longrope(plain, factors[FREQUENCIES])
    magnitude = real(own, "rope.scaling.attn_factor", 1.0, where=METADATA)
    if LONG in factors and SHORT in factors:
        long, short = (_divisors(factors[name], name, plain) for name in (LONG, SHORT))
        return replace(plain, kind="longrope", magnitude=magnitude, long=long, short=short)
    kind = str(own.get("rope.scaling.type", "linear"))
    linear = real(own, "rope.scale_linear", 1.0, where=METADATA)  # its name in the first files
    factor = real(own, "rope.scaling.factor", linear, where=METADATA) or 1.0
    if factor < 0:
        raise DamagedError(f"{METADATA} scale positions by {factor:g}", GET_AGAIN)
    if kind == "yarn":
        magnitude *= yarn_magnitude(factor)
        return replace(plain, kind=kind, factor=factor, magnitude=magnitude)
    if kind not in {"linear", "none"} or magnitude != 1:
        raise UnsupportedError(
            f"transformers has no '{printable(kind)}' scaling of positions with magnitude "
            f"{magnitude:g}",
            "run this file with llama.cpp",
        )
    if kind == "linear" and factor != 1:
        return replace(plain, kind=kind, factor=factor)
    return plain


def _divisors(values: Sequence[float], name: str, rope: Rope) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if len(found) != rope.dimensions // 2 or not all(0 < value < math.inf for value in found):
        raise DamagedError(f"'{name}' is not {rope.dimensions // 2} positive numbers", GET_AGAIN)
    return found
