"""What running a model takes besides its weights and its cache: named parts, none of them hidden.

A part is exact where it follows from the model's sizes, otherwise a rule of thumb with three
figures. The rules were read off logs: llama.cpp's compute buffers of Llama 3 8B (258.50 MiB),
Qwen2.5 3B (300.75) and 7B (304.00) are the formula below to the digit; CUDA contexts were seen
between 120 and 600 MiB; vLLM's profiles of 8B to 32B models between 1.0 and 1.8 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qtool.memory.cache import CacheSettings
from qtool.memory.shape import ModelShape

MIB, GIB = 1 << 20, 1 << 30
Engine = Literal["llama.cpp", "vllm", "transformers"]

FLOAT_BYTES = 4  # llama.cpp computes activations and logits in float32
# Part of the scores of all heads that prefills with MLA were seen to take: 3.6 to 19.9 GiB at 64k.
LATENT_SCORES = (0.2, 0.5, 1.25)


@dataclass(frozen=True)
class Range:
    """Bytes that are not known exactly."""

    low: int
    likely: int
    high: int

    @classmethod
    def known(cls, n_bytes: int) -> Range:
        """Return a figure that is exact."""
        return cls(n_bytes, n_bytes, n_bytes)

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.likely + other.likely, self.high + other.high)


@dataclass(frozen=True)
class Part:
    """One thing that takes memory.

    Args:
        name: what it is.
        size: how much.
        exact: whether that follows from the model's sizes; otherwise a rule of thumb.
        why: the arithmetic, or where the rule comes from.
        per_device: whether every graphics card has one of its own.
    """

    name: str
    size: Range
    exact: bool
    why: str
    per_device: bool = False


def total(parts: tuple[Part, ...]) -> Range:
    """Return the sum of all parts."""
    return sum((part.size for part in parts), Range.known(0))


def engine_of(name: str) -> Engine:
    """Return what usually runs a format, by its name."""
    if name.startswith("gguf:"):
        return "llama.cpp"
    kind = name.partition(":")[0].partition("-")[0]
    if kind in {"nf4", "bitsandbytes", "fp32"} or name.upper() == "FP32":
        return "transformers"
    return "vllm"


def overhead(
    shape: ModelShape, settings: CacheSettings, engine: Engine, *, devices: int = 1
) -> tuple[Part, ...]:
    """Return what an engine takes besides weights and cache, all devices together; 0: no GPU."""
    find = {"llama.cpp": _llama_cpp, "vllm": _vllm, "transformers": _transformers}[engine]
    return tuple(
        _on_all(part, devices) for part in find(shape, settings) if devices or not part.per_device
    )


def _on_all(part: Part, devices: int) -> Part:
    if devices == 1 or not part.per_device:
        return part
    size = Range(*(devices * x for x in (part.size.low, part.size.likely, part.size.high)))
    return Part(part.name, size, part.exact, f"{devices} times: {part.why}", per_device=True)


def _llama_cpp(shape: ModelShape, settings: CacheSettings) -> tuple[Part, ...]:
    context = Part(
        "GPU context",
        Range(120 * MIB, 300 * MIB, 600 * MIB),
        False,
        "120 MiB on small cards, 300 MiB as a rule",
        per_device=True,
    )
    return (_compute_buffer(shape, settings), context)


def _compute_buffer(shape: ModelShape, settings: CacheSettings) -> Part:
    """Return what llama.cpp computes in: the logits of a batch, or attention where that is more."""
    at_once = settings.micro_batch
    row = FLOAT_BYTES * at_once
    logits = row * (shape.vocabulary + shape.hidden)
    newer = FLOAT_BYTES * settings.sequences * shape.vocabulary + row * shape.hidden
    tokens = settings.context * (settings.sequences if settings.unified else 1)
    inside = row * (2 * shape.hidden + 2 * widest(shape)) + 2 * at_once * tokens
    why = f"{at_once} x (vocabulary {shape.vocabulary} + hidden {shape.hidden}) x 4"
    if not is_latent(shape):
        likely = max(logits, inside)
        if likely == inside:
            why = f"{at_once} x ((2 x {shape.hidden} + 2 x {widest(shape)}) x 4 + context x 2)"
        size = Range(max(newer, inside), likely, likely + likely // 4)
        return Part("compute buffer", size, False, why)
    scores = row * shape.heads * tokens
    sizes = (
        max(least, int(part * scores))
        for least, part in zip((newer, logits, logits), LATENT_SCORES, strict=True)
    )
    return Part(
        "compute buffer",
        Range(*sizes),
        False,
        f"between 0.2 and 1.25 of {shape.heads} heads x {at_once} x {tokens} tokens x 4 (MLA)",
    )


def _vllm(shape: ModelShape, settings: CacheSettings) -> tuple[Part, ...]:
    logits = settings.sequences * shape.vocabulary * (2 + FLOAT_BYTES)
    return (
        Part(
            "GPU context and libraries",
            Range(160 * MIB, 512 * MIB, 1843 * MIB),
            False,
            "0.16 to 1.8 GiB in logs; more with several cards",
            per_device=True,
        ),
        Part(
            "activations of a prefill",
            Range(512 * MIB, 1290 * MIB, 1843 * MIB),
            False,
            "1.0 to 1.8 GiB in profiles of 8B to 32B models",
        ),
        Part("CUDA graphs", Range(0, 512 * MIB, 614 * MIB), False, "0.45 to 0.6 GiB, 0 if eager"),
        Part("logits", Range.known(logits), True, f"sequences x {shape.vocabulary} x (2 + 4)"),
    )


def _transformers(shape: ModelShape, settings: CacheSettings) -> tuple[Part, ...]:
    tokens = settings.context * settings.sequences
    prefill = 2 * tokens * (3 * shape.hidden + 3 * widest(shape))
    logits = settings.sequences * shape.vocabulary * (2 + FLOAT_BYTES)
    return (
        Part(
            "GPU context and fragments",
            Range(512 * MIB, 768 * MIB, GIB),
            False,
            "0.5 to 1 GiB as a rule",
            per_device=True,
        ),
        Part(
            "activations of a prefill",
            Range(prefill // 8, prefill // 2, prefill),
            False,
            f"up to {tokens} tokens x (3 x {shape.hidden} + 3 x {widest(shape)}) x 2",
        ),
        Part("logits", Range.known(logits), True, f"sequences x {shape.vocabulary} x (2 + 4)"),
    )


def widest(shape: ModelShape) -> int:
    """Return the most numbers that one token has inside a block: the MLP's inner width."""
    most = 0
    for tensor in shape.tensors:
        if not tensor.name.startswith("blk.") or tensor.role not in {"linear", "expert"}:
            continue
        rows = tensor.shape[-2]
        if tensor.role == "expert":
            rows *= max(shape.experts_used, 1)
        most = max(most, rows)
    return most or 4 * shape.hidden


def is_latent(shape: ModelShape) -> bool:
    """Return whether attention works on latents (MLA), whose cache has no values."""
    return any(block.keys and not block.values for block in shape.cache)
