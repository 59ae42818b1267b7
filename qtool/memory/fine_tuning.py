"""What fine-tuning with QLoRA takes: a range, for nobody knows which settings a trainer will have.

The frozen weights lie in NF4 with double quantization; every linear of a block gets two thin
matrices that are trained. Low, likely and high are ranks of 8, 16 and 64; low has an optimizer of
8 bits. Activations are those of gradient checkpointing.

Paper: Dettmers et al., "QLoRA", 2023, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from qtool.memory.overhead import GIB, MIB, Part, Range, widest
from qtool.memory.shape import ModelShape, TensorSpec

FORMAT = "nf4-dq"
LENGTH = 2048  # tokens of a training text where none is given
RANKS = (8, 16, 64)
# Bytes of a trained number: itself, its gradient, and two moments in 8 bits or in float32.
TRAINED_BYTES = (2 + 4 + 2, 4 + 4 + 8, 4 + 4 + 8)
LOGIT_BYTES = (2 + 4, 2 + 4 + 4, 2 + 4 + 4)  # 16 bits, float32, and its gradient
HALF = 2


def qlora_parts(shape: ModelShape, length: int, batch: int) -> tuple[Part, ...]:
    """Return what training takes beside the frozen weights, for texts of `length` tokens."""
    tokens = length * batch
    wide = widest(shape)
    return (
        _adapters(shape),
        _spread(
            "activations kept of every block",
            tuple(shape.blocks * tokens * shape.hidden * HALF * x // 4 for x in (4, 4, 5)),
            f"{shape.blocks} blocks x {tokens} tokens x {shape.hidden} x 2 (checkpointing)",
        ),
        _spread(
            "one block forwards and backwards",
            tuple(
                tokens * (x * shape.hidden + y * wide) * HALF for x, y in ((8, 3), (12, 5), (16, 8))
            ),
            f"{tokens} tokens x about (12 x {shape.hidden} + 5 x {wide}) x 2",
        ),
        _spread(
            "logits and their gradient",
            tuple(tokens * shape.vocabulary * x for x in LOGIT_BYTES),
            f"{tokens} tokens x {shape.vocabulary} x (2 + 4 + 4)",
        ),
        _spread(
            "a linear as 16 bits", tuple(_largest_linear(shape) * x for x in (2, 2, 4)), "unpacked"
        ),
        Part(
            "GPU context and fragments",
            Range(512 * MIB, GIB, 2 * GIB),
            exact=False,
            why="a rule of thumb",
            per_device=True,
        ),
    )


def _spread(name: str, sizes: tuple[int, ...], why: str) -> Part:
    return Part(name, Range(*sizes), exact=False, why=why)


def _adapters(shape: ModelShape) -> Part:
    """Return matrices [in, rank] and [rank, out] for every linear, with what training adds."""
    ends = sum(sum(t.shape) for t in _linears(shape))
    sizes = tuple(rank * ends * per for rank, per in zip(RANKS, TRAINED_BYTES, strict=True))
    why = f"rank {RANKS[1]} x {ends:,} inputs and outputs x {TRAINED_BYTES[1]}"
    return _spread("adapters, gradients and optimizer", sizes, why)


def _linears(shape: ModelShape) -> list[TensorSpec]:
    return [t for t in shape.tensors if t.role == "linear" and len(t.shape) == 2]


def _largest_linear(shape: ModelShape) -> int:
    return max((t.weights for t in _linears(shape)), default=0)
