"""Bytes of a safetensors directory: what every format makes of a linear, and the files around it.

Layouts: those that `formats/` writes, and bitsandbytes' (quantized values, one scale for 64 of
them, and with double quantization one byte for each scale and one scale for 256 of those).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qtool.checkpoint.header import DTYPE_BYTES, LENGTH_BYTES
from qtool.memory.shape import ModelShape, TensorSpec

WORD_BITS = 32
SHARD_BYTES = 5_000_000_000  # the recipe's default for --max-shard-size
QUANTIZED_ROLES = frozenset({"linear", "expert"})
# Small matrices beside the linears that no format quantizes.
NEVER = ("ssm_conv1d", "altup", "laurel", "per_layer_model_proj")
FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

# Bytes of a tensor's entry in header and index, where its name in the checkpoint is not known.
ENTRY_BYTES = 180


@dataclass(frozen=True)
class Linear:
    """Linears of one kind and size.

    Args:
        name: of the tensor that they are in a GGUF file.
        rows: of each, in the checkpoint.
        columns: likewise.
        count: how many; experts are linears of their own.
        dtype: of the checkpoint.
        stored: its name in the checkpoint, without `.weight`, where that is known.
    """

    name: str
    rows: int
    columns: int
    count: int
    dtype: str
    stored: str = ""

    @property
    def weights(self) -> int:
        """Weights of all of them."""
        return self.rows * self.columns * self.count


Piece = tuple[str, str, tuple[int, ...]]  # leaf of the name, dtype, shape


@dataclass(frozen=True)
class Scheme:
    """How a format stores a linear.

    Args:
        name: of the format.
        pieces: tensors of one linear.
        formula: the same in words, for explanations.
    """

    name: str
    pieces: Callable[[Linear], tuple[Piece, ...]]
    formula: str


def linears_of(shape: ModelShape) -> Iterator[Linear]:
    """Yield the linears that formats quantize: those in blocks, experts included."""
    values = {t.name: t.shape[1] for t in shape.tensors if t.name.endswith("attn_v_b.weight")}
    for tensor in shape.tensors:
        if not is_linear(tensor) or tensor.name in values:
            continue
        name, dtype = tensor.stored or ("", "BF16")
        rows, columns, count = tensor.shape[-2], tensor.shape[-1], math.prod(tensor.shape[:-2])
        if tensor.name.endswith("attn_k_b.weight"):  # one linear, of which llama.cpp makes two
            value = values.get(tensor.name.replace("attn_k_b", "attn_v_b"), 0)
            heads, latent, plain = tensor.shape
            rows, columns, count = heads * (plain + value), latent, 1
        yield Linear(tensor.name, rows, columns, count, dtype, name.removesuffix(".weight"))


def is_linear(tensor: TensorSpec) -> bool:
    """Return whether formats for safetensors quantize a tensor."""
    return (
        tensor.role in QUANTIZED_ROLES
        and len(tensor.shape) > 1
        and not any(part in tensor.name for part in NEVER)
    )


def scheme_bytes(linear: Linear, scheme: Scheme) -> int:
    """Return the bytes of all linears of a kind."""
    each = sum(DTYPE_BYTES[dtype] * math.prod(size) for _, dtype, size in scheme.pieces(linear))
    return each * linear.count


def kept_bytes(tensor: TensorSpec, dtype: str = "") -> int:
    """Return the bytes of a tensor that stays as it is, in `dtype` or else in its own."""
    own = tensor.stored[1] if tensor.stored else "BF16"
    return DTYPE_BYTES[dtype or own] * tensor.weights


# --- how formats store a linear ---------------------------------------------------------------


def words(count: int, bits: int) -> int:
    """Return how many words of 32 bits hold `count` values of `bits` bits."""
    return -(-count * bits // WORD_BITS)


def groups(columns: int, size: int) -> int:
    """Return how many groups a row has; -1 is one for the whole row."""
    return 1 if size <= 0 else -(-columns // size)


def gptq(bits: int, group: int) -> Scheme:
    """Return GPTQ's layout: codes, zero points, scales, and the group of every column."""

    def pieces(linear: Linear) -> tuple[Piece, ...]:
        count = groups(linear.columns, group)
        return (
            ("qweight", "I32", (words(linear.columns, bits), linear.rows)),
            ("qzeros", "I32", (count, words(linear.rows, bits))),
            ("scales", "F16", (count, linear.rows)),
            ("g_idx", "I32", (linear.columns,)),
        )

    size = "row" if group <= 0 else f"{group}"
    return Scheme(
        f"gptq:{bits}:{group}",
        pieces,
        f"{bits} bits a weight, per {size} a scale of 16 and a zero point of {bits} bits, 32 bits "
        "a column",
    )


def awq(bits: int, group: int) -> Scheme:
    """Return AWQ's layout: GPTQ's without the groups of the columns, packed along the rows."""

    def pieces(linear: Linear) -> tuple[Piece, ...]:
        count = groups(linear.columns, group)
        return (
            ("qweight", "I32", (linear.columns, words(linear.rows, bits))),
            ("qzeros", "I32", (count, words(linear.rows, bits))),
            ("scales", "F16", (count, linear.rows)),
        )

    size = "row" if group <= 0 else f"{group}"
    formula = f"{bits} bits a weight, per {size} a scale of 16 and a zero point of {bits} bits"
    return Scheme(f"awq:{bits}:{group}", pieces, formula)


def compressed(bits: int, group: int, *, symmetric: bool = True) -> Scheme:
    """Return compressed-tensors' `pack-quantized` layout."""

    def pieces(linear: Linear) -> tuple[Piece, ...]:
        count = groups(linear.columns, group)
        found = (
            ("weight_packed", "I32", (linear.rows, words(linear.columns, bits))),
            ("weight_scale", linear.dtype, (linear.rows, count)),
            ("weight_shape", "I64", (2,)),
        )
        if symmetric:
            return found
        return (*found, ("weight_zero_point", "I32", (words(linear.rows, bits), count)))

    size = "row" if group <= 0 else f"{group}"
    return Scheme(
        f"compressed-tensors:{bits}:{group}",
        pieces,
        f"{bits} bits a weight, a scale of 16 bits per {size}"
        + ("" if symmetric else f" and a zero point of {bits} bits"),
    )


def fp8() -> Scheme:
    """Return 8-bit floats with one scale for a linear."""
    return Scheme(
        "fp8",
        lambda linear: (
            ("weight", "F8_E4M3", (linear.rows, linear.columns)),
            ("weight_scale", "F32", (1,)),
        ),
        "1 byte a weight, 4 bytes a linear",
    )


def fp8_block() -> Scheme:
    """Return 8-bit floats with one scale for each square of 128 x 128, as DeepSeek stores them."""
    return Scheme(
        "fp8-block",
        lambda linear: (
            ("weight", "F8_E4M3", (linear.rows, linear.columns)),
            ("weight_scale_inv", "F32", (-(-linear.rows // 128), -(-linear.columns // 128))),
        ),
        "1 byte a weight, 4 bytes per 128 x 128 of them",
    )


def int8() -> Scheme:
    """Return 8-bit integers with one scale for a row."""
    return Scheme(
        "int8",
        lambda linear: (
            ("weight", "I8", (linear.rows, linear.columns)),
            ("weight_scale", "F16", (linear.rows, 1)),
        ),
        "1 byte a weight, 2 bytes a row",
    )


def nf4(*, double: bool) -> Scheme:
    """Return bitsandbytes' 4-bit floats."""

    def pieces(linear: Linear) -> tuple[Piece, ...]:
        n = linear.rows * linear.columns
        blocks = -(-n // 64)
        codes: Piece = ("weight", "U8", (-(-n // 2),))
        if not double:
            return (codes, ("absmax", "F32", (blocks,)))
        return (codes, ("absmax", "U8", (blocks,)), ("nested_absmax", "F32", (-(-blocks // 256),)))

    scale = (
        "1 byte per 64 of them, 4 bytes per 256 of those" if double else "4 bytes per 64 of them"
    )
    return Scheme("nf4-dq" if double else "nf4", pieces, f"4 bits a weight, {scale}")


# --- the files around the tensors -------------------------------------------------------------


def safetensors_bytes(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], most: int = SHARD_BYTES
) -> int:
    """Return the bytes of all files and the index that `checkpoint/shards.py` would write.

    Args:
        tensors: name, dtype and shape, in their order.
        most: bytes of one file, header included.
    """
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = []
    empty = LENGTH_BYTES + 8 + len(_json({"__metadata__": {"format": "pt"}}))
    used = 0
    for name, dtype, size in tensors:
        n_bytes = DTYPE_BYTES[dtype] * math.prod(size)
        needed = len(_json({name: _entry(dtype, size, 10**15, 10**15)})) + n_bytes
        if not shards or used + needed > most:
            shards.append([])
            used = empty
        shards[-1].append((name, dtype, size))
        used += needed
    body = sum(DTYPE_BYTES[dtype] * math.prod(size) for _, dtype, size in tensors)
    total = body + sum(map(_header_bytes, shards))
    if len(shards) < 2:
        return total
    files = {
        name: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, shard in enumerate(shards, start=1)
        for name, _, _ in shard
    }
    index = {"metadata": {"total_size": body}, "weight_map": files}
    return total + len(json.dumps(index, indent=2).encode()) + 1


def _header_bytes(shard: Sequence[tuple[str, str, tuple[int, ...]]]) -> int:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, size in shard:
        stop = position + DTYPE_BYTES[dtype] * math.prod(size)
        content[name] = _entry(dtype, size, position, stop)
        position = stop
    return LENGTH_BYTES + -(-len(_json(content)) // 8) * 8


def _entry(dtype: str, size: tuple[int, ...], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(size), "data_offsets": [start, stop]}


def _json(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
