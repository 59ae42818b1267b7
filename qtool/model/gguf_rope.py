"""Rotary positions between config.json and GGUF: bases and scalings as keys, factors as tensors.

What llama.cpp computes: src/models, llama-context.cpp and ggml_rope_ext at b11549. What
transformers computes: modeling_rope_utils.py of 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qtool.checkpoint.gguf_values import Value, f32, text, u32
from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.model.config_values import LARGEST, head_size, real, reals, section, whole
from qtool.model.family import Family

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FREQUENCIES, LONG, SHORT)

BETA_FAST, BETA_SLOW = 32.0, 1.0  # of YaRN; llama.cpp reads no others for these families
NO_SCALING = "convert a checkpoint without this scaling, or run it with transformers"


@dataclass(frozen=True)
class Rope:
    """How a model rotates queries and keys.

    Args:
        kind: of scaling, as transformers calls it.
        theta: base of the frequencies.
        dimensions: values of a head that are rotated.
        original: length of context before scaling.
        factor: of "linear", "yarn" and "llama3".
        low: threshold of "llama3", in turns within the original context.
        high: the other one.
        magnitude: cosines and sines are multiplied by it.
        long: divisors of the frequencies [dimensions / 2], for contexts beyond `original`.
        short: the same for other contexts; of "llama3" for every context.
        local_theta: base of blocks with a window, where it is another.
    """

    kind: str
    theta: float
    dimensions: int
    original: int
    factor: float = 1.0
    low: float = 0.0
    high: float = 0.0
    magnitude: float = 1.0
    long: tuple[float, ...] = ()
    short: tuple[float, ...] = ()
    local_theta: float | None = None


def read_rope(config: Mapping[str, Any], family: Family) -> Rope:
    """Return what config.json says of positions, in the form of transformers 5 or an older one.

    Raises:
        UnsupportedError: a scaling that llama.cpp does not compute for this family.
        DamagedError: numbers that are missing or impossible.
    """
    gguf = family.gguf
    given = section(config, "rope_scaling") or section(config, "rope_parameters")
    nested = "full_attention" in given or "sliding_attention" in given
    stated = section(given, "full_attention") if nested else given
    local_theta = None
    if gguf.local_rope_theta is not None:
        local_theta = _local_theta(
            config, section(given, "sliding_attention"), gguf.local_rope_theta
        )
    kind = str(stated.get("rope_type") or stated.get("type") or "default")
    kind = dict(gguf.rope_aliases).get(kind, kind)
    if kind not in gguf.rope_types or "mrope_section" in stated:
        raise UnsupportedError(
            f"llama.cpp has no '{printable(kind)}' scaling of positions for {family.name}",
            NO_SCALING,
        )
    theta = real(stated, "rope_theta", real(config, "rope_theta", gguf.rope_theta))
    size = head_size(config, gguf)
    part = real(stated, "partial_rotary_factor", real(config, "partial_rotary_factor", 1.0))
    dimensions = int(size * part)
    if not (theta > 1 and 0 < dimensions <= size and dimensions % 2 == 0):
        raise DamagedError(
            f"config.json rotates {dimensions} of the {size} values of a head with base {theta}",
            "check 'rope_parameters', 'head_dim' and 'partial_rotary_factor'",
        )
    if dimensions != size and not gguf.partial_rotary:
        raise UnsupportedError(
            f"llama.cpp rotates whole heads of {family.name}, not {dimensions} of {size} values",
            "run it with transformers",
        )
    plain = Rope(
        kind, theta, dimensions, _original(config, stated, family), local_theta=local_theta
    )
    return _scaled(plain, stated, config)


def rope_metadata(rope: Rope, family: Family) -> dict[str, Value]:
    """Return llama.cpp's keys for positions, below the architecture's name."""
    found = {"rope.freq_base": f32(rope.theta), "rope.dimension_count": u32(rope.dimensions)}
    if rope.local_theta is not None:
        found["rope.freq_base_swa"] = f32(rope.local_theta)
    if rope.kind in {"linear", "yarn", "longrope"}:
        found["rope.scaling.type"] = text(rope.kind)
    if rope.kind in {"linear", "yarn"}:
        found["rope.scaling.factor"] = f32(rope.factor)
    if rope.kind in {"yarn", "longrope"} or family.gguf.original_context:
        found["rope.scaling.original_context_length"] = u32(rope.original)
    # llama.cpp multiplies by YaRN's usual magnitude itself, and by this key.
    extra = rope.magnitude / (yarn_magnitude(rope.factor) if rope.kind == "yarn" else 1.0)
    if rope.kind == "longrope" or abs(extra - 1) > 1e-9:
        found["rope.scaling.attn_factor"] = f32(extra)
    return found


def rope_factors(rope: Rope) -> dict[str, tuple[float, ...]]:
    """Return the tensors of divisors that llama.cpp reads beside the weights, by name."""
    if rope.kind == "llama3":
        return {FREQUENCIES: rope.short}
    if rope.kind == "longrope":
        return {LONG: rope.long, SHORT: rope.short}
    return {}


def rope_parameters(rope: Rope, head_dim: int) -> dict[str, Any]:
    """Return the settings that transformers 5 reads these positions from."""
    found: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind in {"linear", "yarn", "llama3"}:
        found["factor"] = rope.factor
    if rope.kind in {"yarn", "longrope", "llama3"}:
        found["original_max_position_embeddings"] = rope.original
    if rope.kind in {"yarn", "longrope"}:
        found["attention_factor"] = rope.magnitude
    if rope.kind == "longrope":
        found |= {"long_factor": list(rope.long), "short_factor": list(rope.short)}
    if rope.kind == "llama3":
        found |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.dimensions != head_dim:
        found["partial_rotary_factor"] = rope.dimensions / head_dim
    if rope.local_theta is None:
        return found
    local = {"rope_type": "default", "rope_theta": rope.local_theta}
    return {"full_attention": found, "sliding_attention": local}


def llama3_or_longrope(rope: Rope, divisors: Sequence[float]) -> Rope:
    """Return the scaling that has these divisors [dimensions / 2] in every context.

    llama.cpp keeps nothing of Llama 3's scaling but its divisors. Thresholds are found up to a
    common factor, so the lower one is taken to be 1, as in all of Meta's models. Where none explain
    the divisors, they are a LongRoPE whose long contexts are like its short ones.
    """
    divisors = tuple(float(value) for value in divisors)
    if len(divisors) != rope.dimensions // 2 or not all(value > 0 for value in divisors):
        raise DamagedError(
            f"'{FREQUENCIES}' is not {rope.dimensions // 2} positive numbers",
            "convert the model to GGUF again",
        )
    if set(divisors) == {1.0}:
        return rope
    fitted = _fitted_llama3(rope, divisors)
    if fitted is not None and all(
        math.isclose(ours, theirs, rel_tol=1e-5)
        for ours, theirs in zip(fitted.short, divisors, strict=True)
    ):
        return fitted
    return replace(rope, kind="longrope", long=divisors, short=divisors)


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Return what YaRN multiplies cosines and sines with when contexts grow by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _local_theta(config: Mapping[str, Any], stated: Mapping[str, Any], default: float) -> float:
    kind = str(stated.get("rope_type") or stated.get("type") or "default")
    if kind != "default":
        raise UnsupportedError(
            f"llama.cpp has no '{printable(kind)}' scaling of positions in blocks with a window",
            NO_SCALING,
        )
    return real(stated, "rope_theta", real(config, "rope_local_base_freq", default))


def _original(config: Mapping[str, Any], stated: Mapping[str, Any], family: Family) -> int:
    key = "original_max_position_embeddings"
    context = whole(config, "max_position_embeddings")
    return whole(config, key, family.gguf.original_context or whole(stated, key, context))


def _scaled(rope: Rope, stated: Mapping[str, Any], config: Mapping[str, Any]) -> Rope:
    growth = whole(config, "max_position_embeddings") / rope.original
    if rope.kind == "linear":
        return replace(rope, factor=_factor(stated))
    if rope.kind == "yarn":
        return _with_yarn(rope, stated, growth)
    if rope.kind == "longrope":
        return _with_longrope(rope, stated, growth)
    if rope.kind == "llama3":
        return _with_llama3(
            rope, _factor(stated), real(stated, "low_freq_factor"), real(stated, "high_freq_factor")
        )
    return rope


def _factor(stated: Mapping[str, Any], default: float | None = None) -> float:
    factor = real(stated, "factor", default)
    if factor <= 0:
        raise DamagedError(f"config.json scales positions by {factor}", "check 'rope_parameters'")
    return factor


def _with_yarn(rope: Rope, stated: Mapping[str, Any], growth: float) -> Rope:
    factor = _factor(stated, growth)
    betas = real(stated, "beta_fast", BETA_FAST), real(stated, "beta_slow", BETA_SLOW)
    if betas != (BETA_FAST, BETA_SLOW) or stated.get("truncate") is False:
        raise UnsupportedError(
            "llama.cpp computes YaRN with beta_fast 32, beta_slow 1 and whole correction ranges "
            f"only, not with {betas[0]:g} and {betas[1]:g}",
            NO_SCALING,
        )
    usual = yarn_magnitude(factor)
    if stated.get("mscale") and stated.get("mscale_all_dim"):
        usual = yarn_magnitude(factor, real(stated, "mscale"))
        usual /= yarn_magnitude(factor, real(stated, "mscale_all_dim"))
    return replace(rope, factor=factor, magnitude=real(stated, "attention_factor", usual))


def _with_longrope(rope: Rope, stated: Mapping[str, Any], growth: float) -> Rope:
    long, short = reals(stated, "long_factor"), reals(stated, "short_factor")
    expected = rope.dimensions // 2
    if {len(long), len(short)} != {expected} or min(*long, *short) <= 0:
        raise DamagedError(
            f"config.json has {len(long)} long and {len(short)} short factors of positions where "
            f"{expected} positive ones belong",
            "check 'long_factor' and 'short_factor'",
        )
    factor = _factor(stated, growth)
    usual = 1.0
    if factor > 1 and rope.original > 1:
        usual = math.sqrt(1 + math.log(factor) / math.log(rope.original))
    magnitude = real(stated, "attention_factor", usual)
    return replace(rope, magnitude=magnitude, long=long, short=short)


def _with_llama3(rope: Rope, factor: float, low: float, high: float) -> Rope:
    if not 0 < low < high:
        raise DamagedError(
            f"config.json has thresholds {low} and {high} of Llama 3's scaling",
            "check 'low_freq_factor' and 'high_freq_factor'",
        )
    divisors = []
    for turns in _turns(rope):  # in the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - share) / factor + share))
    return replace(rope, factor=factor, low=low, high=high, short=tuple(divisors))


def _turns(rope: Rope) -> list[float]:
    pairs = range(0, rope.dimensions, 2)
    return [
        rope.original / (2 * math.pi * rope.theta ** (pair / rope.dimensions)) for pair in pairs
    ]


def _fitted_llama3(rope: Rope, divisors: tuple[float, ...]) -> Rope | None:
    """Return Llama 3's scaling that fits, found from two divisors between its thresholds."""
    factor = divisors[-1]
    between = [
        (turns / rope.original, (1 / divisor - 1 / factor) / (1 - 1 / factor))
        for turns, divisor in zip(_turns(rope), divisors, strict=True)
        if 1 < divisor < factor
    ]
    if factor <= 1 or len(between) < 2:
        return None
    (fast, upper), (slow, lower) = between[0], between[-1]
    slope = (upper - lower) / (fast - slow)  # original / (high - low)
    offset = slope * slow - lower  # low / (high - low), and low is 1
    if slope <= 0 or offset <= 0:
        return None
    original = round(slope / offset)
    if not 0 < original <= LARGEST:
        return None
    factor = float(f"{factor:.6g}")
    high = float(f"{1 + 1 / offset:.4g}")
    return _with_llama3(replace(rope, kind="llama3", original=original), factor, 1.0, high)
