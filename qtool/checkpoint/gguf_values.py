"""Typed metadata values as a GGUF file stores them.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"
]
KINDS: tuple[Kind, ...] = get_args(Kind)  # a kind's number in the file is its place here
Scalar = bool | int | float | str


@dataclass(frozen=True)
class Value:
    """One metadata value.

    Args:
        kind: of the value, or of every item where `array` is true; never "array" itself.
        content: a scalar, or a tuple of scalars where `array` is true.
        array: whether it is a list.
    """

    kind: Kind
    content: Scalar | tuple[Scalar, ...]
    array: bool = False


def u32(number: int) -> Value:
    """Return an unsigned number of 32 bits."""
    return Value("u32", int(number))


def f32(number: float) -> Value:
    """Return a float of 32 bits."""
    return Value("f32", float(number))


def flag(truth: bool) -> Value:
    """Return a truth value."""
    return Value("bool", bool(truth))


def text(content: str) -> Value:
    """Return a string."""
    return Value("string", content)


def many(kind: Kind, items: Iterable[Scalar]) -> Value:
    """Return a list of values of one kind."""
    return Value(kind, tuple(items), array=True)
