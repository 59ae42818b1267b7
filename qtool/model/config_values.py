"""Numbers out of a config.json that a stranger wrote: there, finite, of the kind asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.untrusted import GET_AGAIN, printable
from qtool.errors import DamagedError
from qtool.model.family import GgufConversion

CONFIG = "config.json"
LARGEST = 2**31 - 1  # what llama.cpp keeps sizes in
LARGEST_REAL = 3.4e38  # and settings, in float32


def whole(
    config: Mapping[str, Any], key: str, default: int | None = None, *, where: str = CONFIG
) -> int:
    """Return a positive whole number; a missing or null key has the default's value.

    Raises:
        DamagedError: not there, or not such a number.
    """
    value = _value(config, key, default, where)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 < value <= LARGEST:
        raise _not(value, key, "a positive whole number", where)
    return value


def real(
    config: Mapping[str, Any], key: str, default: float | None = None, *, where: str = CONFIG
) -> float:
    """Return a finite number; a missing or null key has the default's value.

    Raises:
        DamagedError: not there, or not such a number.
    """
    value = _value(config, key, default, where)
    if type(value) not in {int, float} or not abs(value) < LARGEST_REAL:
        raise _not(value, key, "a number", where)
    return float(value)


def reals(config: Mapping[str, Any], key: str, *, where: str = CONFIG) -> tuple[float, ...]:
    """Return a list of finite numbers.

    Raises:
        DamagedError: not there, or not such a list.
    """
    values = _value(config, key, None, where)
    if not isinstance(values, list):
        raise _not(values, key, "a list of numbers", where)
    return tuple(real({key: value}, key, where=where) for value in values)


def section(config: Mapping[str, Any], key: str, *, where: str = CONFIG) -> Mapping[str, Any]:
    """Return the object under a key; nothing where the key is missing or null.

    Raises:
        DamagedError: something else than an object.
    """
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _not(value, key, "an object", where)
    return value


def head_size(config: Mapping[str, Any], gguf: GgufConversion) -> int:
    """Return how many values a head has, as transformers counts them."""
    if config.get("head_dim") is not None or gguf.head_dim is not None:
        return whole(config, "head_dim", gguf.head_dim)
    heads = whole(config, "num_attention_heads")
    return max(whole(config, "hidden_size") // heads, 1)


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Return how many heads keys and values have."""
    return whole(config, "num_key_value_heads", whole(config, "num_attention_heads"))


def _value(config: Mapping[str, Any], key: str, default: Any, where: str) -> Any:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise DamagedError(f"{where} has no '{key}'", GET_AGAIN)
    return value


def _not(value: object, key: str, wanted: str, where: str) -> DamagedError:
    return DamagedError(f"{where}: '{key}' is {printable(value)}, not {wanted}", GET_AGAIN)
