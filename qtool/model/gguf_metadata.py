"""The metadata of a GGUF file that say how llama.cpp runs a model, from its config.json.

llama.cpp reads some settings from keys and has others written into its source for whole families;
a model that deviates from those is refused here, or the deviation is told where it shows only in
long texts. Facts: llama.cpp's src/models, src/llama-model.cpp and conversion/ at b11549.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.gguf_values import Value, f32, many, text, u32
from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.model.config_values import head_size, key_value_heads, real, whole
from qtool.model.family import COMMON_KEYS, Family, GgufKey
from qtool.model.gguf_rope import read_rope, rope_metadata

HUB = "https://huggingface.co/"
OTHER_ENGINE = "run this model with transformers"
SLIDING = "sliding_attention"
# What transformers takes where config.json has none.
QUERY_SCALAR, FIRST_WINDOW = 256, 28


def model_metadata(
    config: Mapping[str, Any],
    family: Family,
    *,
    name: str,
    vocabulary: int | None = None,
    parameters: int | None = None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Value]:
    """Return all keys but those of the tokenizer and of the quantization.

    Args:
        config: config.json.
        family: of the model.
        name: for people.
        vocabulary: tokens that the file lists; None: as many as config.json says.
        parameters: how many weights the model has, for a label of its size.
        card: front matter of the model's README.

    Raises:
        UnsupportedError: llama.cpp would compute something else than transformers.
        DamagedError: numbers of config.json are missing or impossible.
    """
    refuse_unsupported(config, family)
    architecture = family.gguf_architecture
    found = {"general.architecture": text(architecture), "general.type": text("model")}
    found |= _described(name, parameters, card or {})
    own = _numbers(config, family)
    size = head_size(config, family.gguf)
    own |= {"attention.key_length": u32(size), "attention.value_length": u32(size)}
    own["vocab_size"] = u32(whole(config, "vocab_size") if vocabulary is None else vocabulary)
    own |= rope_metadata(read_rope(config, family), family)
    own |= _window_metadata(config, family)
    return found | {f"{architecture}.{key}": value for key, value in own.items()}


def conversion_warnings(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """Return where llama.cpp and transformers will differ: one sentence for each long context."""
    found = []
    context = whole(config, "max_position_embeddings")
    width, sliding = window_blocks(config, family)
    window = family.gguf.window
    if window is not None and not window.applied and any(sliding) and width < context:
        found.append(
            f"llama.cpp has no sliding window for {family.name}: beyond {width} tokens its results "
            "differ from those of transformers"
        )
    rope = read_rope(config, family)
    if rope.kind == "dynamic":
        found.append(
            f"llama.cpp has no dynamic scaling of positions: beyond {context} tokens its results "
            "differ from those of transformers"
        )
    if rope.kind == "longrope" and rope.long != rope.short:
        found.append(
            "llama.cpp chooses long or short position factors by the size of the context it is "
            f"given, transformers by the length of the text: run texts of up to {rope.original} "
            f"tokens with a context of at most {rope.original}"
        )
    return tuple(found)


def refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    """Refuse settings of which llama.cpp reads nothing and which it computes otherwise.

    Raises:
        UnsupportedError: such a setting.
    """
    gguf = family.gguf
    key, only = gguf.activation
    settings = ((key, (None, only)), *gguf.fixed)
    for name, allowed in settings:
        if config.get(name) not in allowed:
            raise UnsupportedError(
                f"llama.cpp computes {family.name} with '{name}' = {allowed[-1]}, not "
                f"{printable(config.get(name))}",
                OTHER_ENGINE,
            )
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    size = head_size(config, gguf)
    if gguf.square and size * heads != hidden:
        raise UnsupportedError(
            f"llama.cpp runs {family.name} only with heads that fill the hidden size, and "
            f"{heads} x {size} is not {hidden}",
            OTHER_ENGINE,
        )
    if heads % key_value_heads(config):
        raise DamagedError(
            f"config.json has {heads} heads for {key_value_heads(config)} of keys and values",
            "check 'num_key_value_heads'",
        )
    if gguf.query_scalar_blocks is not None:
        stated, computed = (
            real(config, "query_pre_attn_scalar", QUERY_SCALAR),
            query_scalar(config, family),
        )
        if stated != computed:
            raise UnsupportedError(
                f"llama.cpp scales the queries of this {family.name} by 1 / sqrt({computed}), and "
                f"config.json wants 1 / sqrt({stated:g})",
                OTHER_ENGINE,
            )


def query_scalar(config: Mapping[str, Any], family: Family) -> int:
    """Return the `query_pre_attn_scalar` that llama.cpp assumes."""
    if whole(config, "num_hidden_layers") == family.gguf.query_scalar_blocks:
        return whole(config, "hidden_size") // whole(config, "num_attention_heads")
    return head_size(config, family.gguf)


def window_blocks(config: Mapping[str, Any], family: Family) -> tuple[int, tuple[bool, ...]]:
    """Return the width of the sliding window and for each block whether it attends through it.

    Raises:
        DamagedError: a list of blocks that does not fit the model.
    """
    window, blocks = family.gguf.window, whole(config, "num_hidden_layers")
    none = (0, (False,) * blocks)
    if window is None:
        return none
    stated = config.get("sliding_window", window.default)
    if stated in (None, 0) or (window.switched and not config.get("use_sliding_window")):
        return none
    width = whole(config, "sliding_window", window.default)
    kinds = config.get("layer_types")
    if kinds is not None and (window.applied or window.switched):
        if not isinstance(kinds, list) or len(kinds) != blocks:
            raise DamagedError(
                f"config.json: 'layer_types' is not a list of {blocks} kinds of blocks",
                "check 'layer_types' and 'num_hidden_layers'",
            )
        return width, tuple(kind == SLIDING for kind in kinds)
    first = 0
    if window.switched:
        first = _count(config, "max_window_layers", FIRST_WINDOW)
    period = window.period
    if period and config.get("sliding_window_pattern") is not None:
        period = whole(config, "sliding_window_pattern")
    return width, tuple(
        block >= first and not (period and (block + 1) % period == 0) for block in range(blocks)
    )


def regular_window(blocks: int, period: int) -> tuple[bool, ...]:
    """Return which blocks have a window where every `period`-th has none; 0: all have one."""
    return tuple(not (period and (block + 1) % period == 0) for block in range(blocks))


def size_label(parameters: int) -> str:
    """Return a number of weights as file names tell it, such as "135M" or "1.5B"."""
    unit, scale = next(
        (
            (unit, scale)
            for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6))
            if parameters >= scale
        ),
        ("K", 1e3),
    )
    scaled = parameters / scale
    return f"{scaled:.{1 if round(scaled) < 10 else 0}f}{unit}"


def _count(config: Mapping[str, Any], key: str, default: int) -> int:
    return 0 if config.get(key) == 0 else whole(config, key, default)


def _numbers(config: Mapping[str, Any], family: Family) -> dict[str, Value]:
    found = {}
    for key in (*COMMON_KEYS, *family.gguf.keys):
        if key.optional and config.get(key.config) is None:
            continue
        found[key.name] = _number(config, key, family)
    return found


def _number(config: Mapping[str, Any], key: GgufKey, family: Family) -> Value:
    default = real(config, key.default) if isinstance(key.default, str) else key.default
    is_null = key.config in config and config[key.config] is None
    if is_null and isinstance(key.default, float):
        raise UnsupportedError(
            f"llama.cpp runs no {family.name} without '{key.config}', which is null in config.json",
            OTHER_ENGINE,
        )
    if key.whole:
        return u32(whole(config, key.config, None if default is None else int(default)))
    return f32(real(config, key.config, default))


def _window_metadata(config: Mapping[str, Any], family: Family) -> dict[str, Value]:
    window = family.gguf.window
    if window is None:
        return {}
    width, sliding = window_blocks(config, family)
    if not any(sliding):
        if window.required:
            raise UnsupportedError(
                f"llama.cpp runs {family.name} only with a sliding window", OTHER_ENGINE
            )
        return {"attention.sliding_window": u32(0)} if window.marked else {}
    found = {"attention.sliding_window": u32(width)}
    if sliding != regular_window(len(sliding), window.period):
        found["attention.sliding_window_pattern"] = many("bool", sliding)
    return found


def _described(name: str, parameters: int | None, card: Mapping[str, Any]) -> dict[str, Value]:
    found = {"general.name": text(name)}
    if parameters is not None:
        found["general.size_label"] = text(size_label(parameters))
    for key, entry in (
        ("general.license", "license"),
        ("general.license.name", "license_name"),
        ("general.license.link", "license_link"),
    ):
        if isinstance(card.get(entry), str):
            found[key] = text(card[entry])
    bases = [base for base in _strings(card.get("base_model")) if base.count("/") == 1]
    if bases:
        found["general.base_model.count"] = u32(len(bases))
    for number, base in enumerate(bases):
        organization, model = base.split("/")
        prefix = f"general.base_model.{number}."
        found[f"{prefix}name"] = text(model)
        found[f"{prefix}organization"] = text(organization)
        found[f"{prefix}repo_url"] = text(HUB + base)
    for key, entry in (("general.tags", "tags"), ("general.languages", "language")):
        if _strings(card.get(entry)):
            found[key] = many("string", _strings(card.get(entry)))
    return found


def _strings(entry: object) -> list[str]:
    entries = entry if isinstance(entry, list) else [entry]
    return [item for item in entries if isinstance(item, str)]
