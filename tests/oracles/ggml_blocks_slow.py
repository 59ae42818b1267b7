"""ggml's blocks read and written one bit at a time, from a description of where every bit lies.

Nothing is imported from qtool. A block is `{"d", "dmin", "scales", "mins", "codes"}`: d and dmin
float32 (dmin is the added minimum in Q4_1 and Q5_1), the others lists of unsigned stored integers,
empty where a type has none. Layouts: ggml-common.h and ggml-quants.c of llama.cpp.

Positions are (byte, bit) of bit `b` of code `e`, of scale `j`, of minimum `j`.
"""

import struct
from dataclasses import dataclass
from functools import cache

import numpy as np

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Description:
    """One type; the last three say how stored integers become factors."""

    weights: int
    size: int
    code_bits: int
    d: int
    dmin: int | None = None
    scale_bits: int = 0
    min_bits: int = 0
    sub: int = 0
    scale_zero: int = 0  # subtracted from the stored scale; 256: two's complement
    level_zero: int = 0  # subtracted from the code
    table: tuple[int, ...] = ()


TYPES = {
    "Q8_0": Description(32, 34, 8, 0, level_zero=256),
    "Q4_0": Description(32, 18, 4, 0, level_zero=8),
    "Q4_1": Description(32, 20, 4, 0, 2),
    "Q5_0": Description(32, 22, 5, 0, level_zero=16),
    "Q5_1": Description(32, 24, 5, 0, 2),
    "Q2_K": Description(256, 84, 2, 80, 82, 4, 4, 16),
    "Q3_K": Description(256, 110, 3, 108, None, 6, 0, 16, scale_zero=32, level_zero=4),
    "Q4_K": Description(256, 144, 4, 0, 2, 6, 6, 32),
    "Q5_K": Description(256, 176, 5, 0, 2, 6, 6, 32),
    "Q6_K": Description(256, 210, 6, 208, None, 8, 0, 16, scale_zero=256, level_zero=32),
    "IQ4_NL": Description(32, 18, 4, 0, table=IQ4),
    "IQ4_XS": Description(256, 136, 4, 0, None, 6, 0, 32, scale_zero=32, table=IQ4),
}


def code_position(name, e, b):
    if name == "Q8_0":
        return 2 + e, b
    if name in {"Q4_0", "IQ4_NL"}:
        return 2 + e % 16, b + 4 * (e // 16)
    if name == "Q4_1":
        return 4 + e % 16, b + 4 * (e // 16)
    if name in {"Q5_0", "Q5_1"}:
        fifth = {"Q5_0": 2, "Q5_1": 4}[name]
        return (fifth + e // 8, e % 8) if b == 4 else (fifth + 4 + e % 16, b + 4 * (e // 16))
    half, quarter = e // 128, e % 128 // 32
    if name == "Q2_K":
        return 16 + 32 * half + e % 32, 2 * quarter + b
    if name == "Q3_K":
        return (e % 32, e // 32) if b == 2 else (32 + 32 * half + e % 32, 2 * quarter + b)
    if name == "Q4_K":
        return 16 + 32 * (e // 64) + e % 32, 4 * (e % 64 // 32) + b
    if name == "Q5_K":
        low = 48 + 32 * (e // 64) + e % 32, 4 * (e % 64 // 32) + b
        return (16 + e % 32, e // 32) if b == 4 else low
    if name == "Q6_K":
        high = 128 + 32 * half + e % 32, 2 * quarter + b - 4
        return high if b >= 4 else (64 * half + e % 64, 4 * (e % 128 // 64) + b)
    return 8 + 16 * (e // 32) + e % 16, 4 * (e % 32 // 16) + b  # IQ4_XS


def scale_position(name, j, b):
    if name == "Q2_K":
        return j, b
    if name == "Q3_K":
        return (96 + j % 8, 4 * (j // 8) + b) if b < 4 else (104 + j % 4, 2 * (j // 4) + b - 4)
    if name == "Q6_K":
        return 192 + j, b
    if name == "IQ4_XS":
        return (4 + j // 2, 4 * (j % 2) + b) if b < 4 else (2 + j // 4, 2 * (j % 4) + b - 4)
    if j < 4:  # Q4_K and Q5_K
        return 4 + j, b
    return (4 + j + 4, b) if b < 4 else (4 + j - 4, 6 + b - 4)


def min_position(name, j, b):
    if name == "Q2_K":
        return j, 4 + b
    if j < 4:  # Q4_K and Q5_K
        return 4 + j + 4, b
    return (4 + j + 4, 4 + b) if b < 4 else (4 + j, 6 + b - 4)


@cache
def positions(name):
    """Field -> for every number of it the positions of its bits, least significant first."""
    kind = TYPES[name]
    subs = kind.weights // kind.sub if kind.sub else 0
    fields = (
        ("codes", kind.weights, kind.code_bits, code_position),
        ("scales", subs, kind.scale_bits, scale_position),
        ("mins", subs if kind.min_bits else 0, kind.min_bits, min_position),
    )
    return {
        field: [[where(name, i, b) for b in range(bits)] for i in range(count)]
        for field, count, bits, where in fields
    }


def read_block(name, raw):
    kind = TYPES[name]
    block = {
        field: [sum((raw[byte] >> bit & 1) << b for b, (byte, bit) in enumerate(p)) for p in places]
        for field, places in positions(name).items()
    }
    block["d"] = np.float32(struct.unpack_from("<e", raw, kind.d)[0])
    block["dmin"] = None
    if kind.dmin is not None:
        block["dmin"] = np.float32(struct.unpack_from("<e", raw, kind.dmin)[0])
    return block


def write_block(name, block):
    kind = TYPES[name]
    raw = bytearray(kind.size)
    for field, places in positions(name).items():
        for number, place in zip(block[field], places, strict=True):
            for b, (byte, bit) in enumerate(place):
                raw[byte] |= (int(number) >> b & 1) << bit
    struct.pack_into("<e", raw, kind.d, block["d"])
    if kind.dmin is not None:
        struct.pack_into("<e", raw, kind.dmin, block["dmin"])
    return bytes(raw)


def without_zero(stored, zero):
    """What a stored unsigned integer means."""
    if zero == 256:
        return stored - 256 if stored >= 128 else stored
    return stored - zero


def values_of_block(name, block):
    """The weights of a block, in float32 arithmetic."""
    kind = TYPES[name]
    values = []
    for e, code in enumerate(block["codes"]):
        level = np.float32(kind.table[code] if kind.table else without_zero(code, kind.level_zero))
        if not kind.sub:
            value = block["d"] * level
            values.append(value if block["dmin"] is None else value + block["dmin"])
            continue
        j = e // kind.sub
        scale = block["d"] * np.float32(without_zero(block["scales"][j], kind.scale_zero))
        value = scale * level
        if block["dmin"] is not None:
            value -= block["dmin"] * np.float32(block["mins"][j])
        values.append(value)
    return np.array(values, dtype=np.float32)


def decode(name, data):
    """Weights [rows, columns] float32 of bytes [rows, row bytes]."""
    size = TYPES[name].size
    return np.stack(
        [
            np.concatenate(
                [
                    values_of_block(name, read_block(name, row[start : start + size].tobytes()))
                    for start in range(0, len(row), size)
                ]
            )
            for row in data
        ]
    )
