"""Slow decoders of the three packed layouts, written from their description alone.

A row of words is read as one huge integer; value i has its bits [i * bits, (i + 1) * bits).
Nothing is imported from qtool. Every decoder returns the weight [N, K] as float32.

Shapes: N = out_features, K = in_features, G = groups along K.
"""

import re

import numpy as np

# Place i of an AWQ word holds output column AWQ_ORDER[i] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_stream(words, bits, count):
    """The first `count` values of one row of int32 words."""
    stream = int.from_bytes(np.asarray(words, dtype="<i4").tobytes(), "little")
    return [(stream >> (bits * i)) % (1 << bits) for i in range(count)]


def write_stream(values, bits):
    """One row of int32 words that holds `values`; the last word is filled up with zero bits."""
    stream = sum(int(value) << (bits * i) for i, value in enumerate(values))
    length = -(-len(values) * bits // 32)
    return np.frombuffer(stream.to_bytes(4 * length, "little"), dtype="<i4")


def read_rows(words, bits, count):
    """Values [rows, count] of words [rows, w]."""
    return np.array([read_stream(row, bits, count) for row in np.asarray(words)], dtype=np.int64)


def write_rows(values, bits):
    """Words [rows, w] of values [rows, count]."""
    return np.stack([write_stream(row, bits) for row in values])


def decode_gptq(tensors, name, bits, version=1):
    """K runs down `qweight`, N along `qzeros`; version 1 stores zero points minus one."""
    scales = tensors[f"{name}.scales"].float().numpy()
    g_idx = tensors[f"{name}.g_idx"].tolist()
    codes = read_rows(tensors[f"{name}.qweight"].numpy().T, bits, len(g_idx))  # [N, K]
    zeros = read_rows(tensors[f"{name}.qzeros"].numpy(), bits, scales.shape[1])  # [G, N]
    weight = np.empty(codes.shape, dtype=np.float32)
    for k, group in enumerate(g_idx):
        offset = zeros[group] + (1 if version == 1 else 0)
        weight[:, k] = scales[group] * (codes[:, k] - offset).astype(np.float32)
    return weight


def decode_awq(tensors, name, bits=4):
    """N runs along both, eight columns to a word in AWQ_ORDER; zero points as they are."""
    scales = tensors[f"{name}.scales"].float().numpy()  # [G, N]
    groups, outputs = scales.shape

    def read(words):
        placed = read_rows(words, bits, outputs)
        values = np.empty_like(placed)
        for start in range(0, outputs, 8):
            for place, column in enumerate(AWQ_ORDER):
                values[:, start + column] = placed[:, start + place]
        return values

    codes = read(tensors[f"{name}.qweight"].numpy())  # [K, N]
    zeros = read(tensors[f"{name}.qzeros"].numpy())  # [G, N]
    width = len(codes) // groups
    rows = [
        scales[k // width] * (codes[k] - zeros[k // width]).astype(np.float32)
        for k in range(len(codes))
    ]
    return np.stack(rows).T


def decode_compressed_tensors(tensors, name, bits):
    """K runs along `weight_packed`, N down `weight_zero_point`; values are stored plus half."""
    outputs, inputs = tensors[f"{name}.weight_shape"].tolist()
    scales = tensors[f"{name}.weight_scale"].float().numpy()
    half = 1 << (bits - 1)
    signed = read_rows(tensors[f"{name}.weight_packed"].numpy(), bits, inputs) - half
    stored = tensors.get(f"{name}.weight_zero_point")
    if scales.ndim == 1:  # one for the whole tensor; its zero point is not packed
        scales = np.full((outputs, 1), scales[0])
        zeros = np.full((outputs, 1), 0 if stored is None else int(stored[0]))
    elif stored is None:
        zeros = np.zeros(scales.shape, dtype=np.int64)
    else:
        zeros = read_rows(stored.numpy().T, bits, outputs).T - half
    width = inputs // scales.shape[1]
    weight = np.empty(signed.shape, dtype=np.float32)
    for k in range(inputs):
        offset = signed[:, k] - zeros[:, k // width]
        weight[:, k] = scales[:, k // width] * offset.astype(np.float32)
    return weight


DECODERS = {
    "gptq": decode_gptq,
    "awq": decode_awq,
    "compressed-tensors": decode_compressed_tensors,
}


def resolve_dynamic(config, module):
    """What a GPTQ engine does with `module`: its settings, or None where it stays unquantized.

    The first rule whose expression matches the start of the name decides.
    """
    base = {key: config[key] for key in ("bits", "group_size", "sym")}
    for rule, override in config.get("dynamic", {}).items():
        if re.match(rule[2:], module):
            return None if rule.startswith("-:") else base | override
    return base
