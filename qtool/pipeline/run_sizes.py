"""The sizes that decide what a run of `qtool quantize` takes: its settings, and a model's blocks.

Nothing here imports torch; tables that mirror the engine's are held to it by tests.

Shapes: C = inputs of a tap, R = outputs of its linears together, T = calibration tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qtool.memory.shape import ModelShape, TensorSpec

WIDE = 4  # bytes of float32, in which everything is summed and rounded
Kind = Literal["cpu", "cuda"]

# Method -> whether a transform looks at the float block, and whether rounding needs a Hessian.
# qtool/methods/protocol.py holds the methods themselves; a test compares the two.
METHODS: Mapping[str, tuple[bool, bool]] = {
    "rtn": (False, False),
    "awq": (True, False),
    "gptq": (False, True),
    "awq+gptq": (True, True),
}
# Tap -> the linears that read its input, by their names in a GGUF.
TAPS: Mapping[str, frozenset[str]] = {
    "attn_in": frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv"}),
    "attn_out": frozenset({"attn_output"}),
    "mlp_in": frozenset({"ffn_gate", "ffn_up"}),
    "mlp_out": frozenset({"ffn_down"}),
}


@dataclass(frozen=True)
class Run:
    """How the engine would be run.

    Args:
        method: of `METHODS`.
        windows: of calibration.
        length: tokens of a window.
        stored_bytes: of a weight in the checkpoint.
        computed_bytes: of a weight while a block runs.
        device: where blocks run.
        free_ram: bytes; decides what waits where.
        free_vram: likewise.
        propagated: whether the float model's hidden states travel beside.
    """

    method: str
    windows: int = 128
    length: int = 2048
    stored_bytes: int = 2
    computed_bytes: int = 2
    device: Kind = "cpu"
    free_ram: int = 1 << 60
    free_vram: int = 1 << 60
    propagated: bool = True

    @property
    def tokens(self) -> int:
        """T."""
        return self.windows * self.length

    @property
    def transforms(self) -> bool:
        """Whether a transform looks at the float block."""
        return METHODS[self.method][0]

    @property
    def calibrated(self) -> bool:
        """Whether calibration windows run through the model at all."""
        return any(METHODS[self.method])


@dataclass(frozen=True)
class Tap:
    """Linears that read one input: C, and R of each."""

    columns: int
    rows: tuple[int, ...]

    @property
    def square(self) -> int:
        """Bytes of a [C, C] float32."""
        return WIDE * self.columns**2

    @property
    def weight(self) -> int:
        """Bytes of all its linears in float32."""
        return WIDE * self.columns * sum(self.rows)


@dataclass(frozen=True)
class Block:
    """The sizes of the model's largest block.

    Args:
        parameters: all of its numbers.
        taps: name -> sizes.
        attended: numbers of a token that attention holds: queries, keys, values and its output.
    """

    parameters: int
    taps: Mapping[str, Tap] = field(default_factory=dict)
    attended: int = 0

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return self.taps["mlp_out"].columns if "mlp_out" in self.taps else 0


def largest_block(shape: ModelShape) -> Block:
    """Return the sizes of the block with the most parameters."""
    blocks: dict[str, list[TensorSpec]] = {}
    for tensor in shape.tensors:
        if tensor.name.startswith("blk."):
            blocks.setdefault(tensor.name.split(".")[1], []).append(tensor)
    if not blocks:
        return Block(0)
    tensors = max(blocks.values(), key=lambda block: sum(t.weights for t in block))
    rows: dict[str, list[int]] = {}
    columns: dict[str, int] = {}
    for tensor in tensors:
        name = tensor.name.split(".")[2]
        tap = next((tap for tap, names in TAPS.items() if name in names), None)
        if tap is not None and tensor.name.endswith(".weight") and len(tensor.shape) == 2:
            rows.setdefault(tap, []).extend(tensor.linears or (tensor.shape[0],))
            columns[tap] = tensor.shape[1]
    taps = {tap: Tap(columns[tap], tuple(sizes)) for tap, sizes in rows.items()}
    attended = sum(taps["attn_in"].rows) if "attn_in" in taps else 0
    attended += columns.get("attn_out", 0)
    return Block(sum(t.weights for t in tensors), taps, attended)


def free_main_memory() -> int:
    """Return the bytes that can still be had here, as qtool.device finds them."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 8 << 30


def multiplies_bfloat16() -> bool:
    """Return whether this processor does, so that models stored so also run so."""
    with contextlib.suppress(OSError, ValueError):
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return "avx512_bf16" in flags or "amx_bf16" in flags
    return False
