"""Take from a stranger's config.json the numbers that decide how large a model is.

Nothing is computed with before it is known to be a number that a model can have, so an absurd file
costs neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError

CONFIG = "config.json"
CHECK = "check config.json, or download it again"

# Far above every real model.
MOST_BLOCKS = 1000
MOST_EXPERTS = 8192
LARGEST_SIZE = 1 << 24
LARGEST_CONTEXT = 1 << 32

# Name here -> names that model types use for it; the first that is there counts.
NAMES: Mapping[str, tuple[str, ...]] = {
    "blocks": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "inner": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_size": ("head_dim", "attention_head_dim"),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_used": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
}


@dataclass(frozen=True)
class Settings:
    """A config.json, or the part of it that speaks of the language model.

    Args:
        found: key -> value, as parsed.
    """

    found: Mapping[str, Any]

    def keys_of(self, name: str) -> tuple[str, ...]:
        """Return the keys under which a number may stand."""
        return NAMES.get(name, (name,))

    def value(self, name: str) -> Any:
        """Return what stands under the first key that is neither missing nor null."""
        values = (self.found.get(key) for key in self.keys_of(name))
        return next((value for value in values if value is not None), None)

    def whole(
        self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_SIZE
    ) -> int:
        """Return a whole number from `least` to `most`; without a default it must be there.

        Raises:
            DamagedError: it is not.
        """
        value = self.value(name)
        if value is None:
            value = default
        if value is None:
            raise self.missing(name)
        return self.checked(name, value, least=least, most=most)

    def checked(self, name: str, value: object, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """Return `value` if it is a whole number from `least` to `most`.

        Raises:
            DamagedError: it is not.
        """
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def each(self, name: str, blocks: int, default: int | None = None) -> tuple[int, ...]:
        """Return a number for every block: from a list of them, or one for all.

        Raises:
            DamagedError: a list of another length, or something that is no such number.
        """
        value = self.value(name)
        if not isinstance(value, list):
            return (self.whole(name, default),) * blocks
        if len(value) != blocks:
            raise self.wrong(name, f"a list of {len(value)}", f"one number for {blocks} blocks")
        return tuple(self.checked(name, one) for one in value)

    def real(self, name: str, default: float) -> float:
        """Return a number from 0 to 1000.

        Raises:
            DamagedError: it is not.
        """
        value = self.value(name)
        value = default if value is None else value
        if type(value) not in {int, float} or not 0 <= value <= 1000:
            raise self.wrong(name, value, "a number from 0 to 1000")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value.

        Raises:
            DamagedError: something else.
        """
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def section(self, name: str) -> Settings:
        """Return the object under a key, empty where there is none.

        Raises:
            DamagedError: something else.
        """
        value = self.value(name)
        if value is None:
            return Settings({})
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Settings(value)

    def words(self, name: str, blocks: int) -> tuple[str, ...] | None:
        """Return one word for every block, None where there is no such list.

        Raises:
            DamagedError: something else than a list of as many words.
        """
        value = self.value(name)
        if value is None:
            return None
        texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not texts or len(value) != blocks:
            raise self.wrong(name, value, f"a list of {blocks} words")
        return tuple(value)

    def missing(self, name: str) -> DamagedError:
        """Return the error of a number that has to be there."""
        keys = self.keys_of(name)
        return DamagedError(f"{CONFIG} has no '{keys[0]}'", CHECK)

    def wrong(self, name: str, value: object, wanted: str) -> DamagedError:
        """Return the error of a value that no model has."""
        keys = self.keys_of(name)
        key = next((key for key in keys if self.found.get(key) is not None), keys[0])
        return DamagedError(f"{CONFIG}: '{key}' is {printable(value)}, not {wanted}", CHECK)


def language_settings(config: Mapping[str, Any]) -> Settings:
    """Return the settings of the language model: config.json itself, or its `text_config`.

    Raises:
        DamagedError: a `text_config` that is no object, or no `model_type`.
    """
    settings = Settings(config)
    inner = settings.section("text_config").found or settings.section("llm_config").found
    merged = dict(inner) if inner else dict(config)
    if inner:
        merged.setdefault("model_type", config.get("model_type"))
        if "tie_word_embeddings" not in merged and "tie_word_embeddings" in config:
            merged["tie_word_embeddings"] = config["tie_word_embeddings"]
    kind = merged.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise DamagedError(f"{CONFIG} has no 'model_type'", CHECK)
    return Settings(merged)
