"""What the scales of a ggml block type look like, and what a fit of them returns.

Shapes: R = rows, C = columns, B = C / block, S = C / sub.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtool.ggml_types import GGML_TYPES

FP16_MAX = 65504.0


@dataclass(frozen=True)
class GgmlLayout:
    """How one type turns codes into values.

    Args:
        name: of the type.
        sub: weights that share a scale.
        levels: what the codes 0, 1, ... stand for, before scaling.
        scales: least and largest integer scale; None where each sub-block has an fp16 scale.
        offset: "integer" times an fp16 number, subtracted; "float": an fp16 number, added.
        least_code: that is chosen; files may hold lower ones.
    """

    name: str
    sub: int
    levels: tuple[int, ...]
    scales: tuple[int, int] | None = None
    offset: Literal["none", "integer", "float"] = "none"
    least_code: int = 0

    @property
    def block(self) -> int:
        """Weights that are stored together."""
        return GGML_TYPES[self.name].block

    @property
    def even(self) -> bool:
        """Whether the levels are consecutive integers."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1


@dataclass(frozen=True)
class BlockParameters:
    """Scales and offsets exactly as they will be stored."""

    super_scale: Tensor  # [R, B] float32, finite, representable in fp16
    super_offset: Tensor  # [R, B] float32, the same; [R, 0] without offsets
    scales: Tensor  # [R, S] float32, integer-valued; [R, 0] where each sub-block is a block
    offsets: Tensor  # [R, S] float32, integer-valued >= 0; [R, 0] without integer offsets

    def scale(self, layout: GgmlLayout) -> Tensor:
        """Return the scale of every sub-block, [R, S] float32; may be zero or negative."""
        if layout.scales is None:
            return self.super_scale
        return _times(self.super_scale, self.scales)

    def offset(self, layout: GgmlLayout) -> Tensor:
        """Return what is subtracted from the scaled levels, [R, S] float32."""
        if layout.offset == "integer":
            return _times(self.super_offset, self.offsets)
        if layout.offset == "float":
            return -self.super_offset
        return torch.zeros_like(self.scale(layout))

    def inverse_scale(self, layout: GgmlLayout) -> Tensor:
        """Return 1 / scale [R, S] float32, zero where the scale is zero."""
        scale = self.scale(layout)
        # The least fp16 times an integer is far from float32's own limits: no overflow.
        return torch.where(scale == 0, 0.0, 1.0 / scale)


def _times(of_blocks: Tensor, integers: Tensor) -> Tensor:
    """Multiply [R, S] integers by the [R, B] number of their block."""
    rows, blocks = of_blocks.shape
    split = integers.reshape(rows, blocks, integers.shape[1] // blocks)  # -1 fails without rows
    return (split * of_blocks[:, :, None]).reshape(integers.shape)


def to_fp16(values: Tensor) -> Tensor:
    """Round float32 values to what fp16 can hold, never to infinity; still float32."""
    return values.clamp(-FP16_MAX, FP16_MAX).to(torch.float16).to(torch.float32)
