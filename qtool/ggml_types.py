"""The tensor types of ggml as a table: number in the file, weights in a block, bytes of a block.

Types without a grid of ours stand here too, because files that hold them must be described.
Source: ggml.h and ggml-common.h of llama.cpp b11549.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GgmlType:
    """One tensor type.

    Args:
        name: as llama.cpp writes it, such as `Q4_K`.
        number: in a GGUF file.
        block: weights of a row that are stored together.
        block_bytes: bytes that they take.
    """

    name: str
    number: int
    block: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight, scales included."""
        return 8 * self.block_bytes / self.block

    def fits(self, columns: int) -> bool:
        """Return whether rows of `columns` weights are whole blocks."""
        return columns % self.block == 0

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of `shape` (rows last but one, columns last)."""
        return math.prod(shape) // self.block * self.block_bytes


_ROWS = (
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q8_1", 9, 32, 36),
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1),
    ("I16", 25, 1, 2),
    ("I32", 26, 1, 4),
    ("I64", 27, 1, 8),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56),
    ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
    ("Q2_0", 42, 64, 18),
)

GGML_TYPES = {row[0]: GgmlType(*row) for row in _ROWS}
TYPE_OF_NUMBER = {kind.number: kind for kind in GGML_TYPES.values()}
FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
