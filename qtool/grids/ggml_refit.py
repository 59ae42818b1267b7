"""Move the scales and offsets of ggml's block types while their codes stay.

Shapes: R = rows, C = columns, B = C / block, S = C / sub, w = columns that a scale reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from qtool.grids.ggml_levels import levels_of
from qtool.grids.ggml_parameters import BlockParameters, GgmlLayout, to_fp16
from qtool.grids.refit import Knob

LARGEST_OFFSET = {"Q2_K": 15.0, "Q4_K": 63.0, "Q5_K": 63.0}


class GgmlRefit:
    """Scales first of whole blocks, then of their sub-blocks."""

    def __init__(self, codes: Tensor, parameters: BlockParameters, layout: GgmlLayout) -> None:
        self._layout = layout
        self._codes = codes.T.contiguous()  # [C, R] uint8
        self._super_scale = parameters.super_scale.T.contiguous()  # [B, R]
        self._super_offset = parameters.super_offset.T.contiguous()
        self._scales = parameters.scales.T.contiguous()  # [S, R]
        self._offsets = parameters.offsets.T.contiguous()

    def parameters(self) -> BlockParameters:
        """Return the parameters as they are now."""
        tensors = (self._super_scale, self._super_offset, self._scales, self._offsets)
        return BlockParameters(*(tensor.T.contiguous() for tensor in tensors))

    def groups(self) -> Iterator[tuple[slice, Iterator[Knob]]]:
        """Yield each block with its fp16 numbers, then its sub-blocks with their integers."""
        block, sub = self._layout.block, self._layout.sub
        for index in range(len(self._super_scale)):
            start = index * block
            yield slice(start, start + block), self._of_block(index)
            if self._layout.scales is None:
                continue
            for inner in range(start // sub, (start + block) // sub):
                yield slice(inner * sub, (inner + 1) * sub), self._of_sub_block(index, inner)

    def _of_block(self, index: int) -> Iterator[Knob]:
        block, sub = self._layout.block, self._layout.sub
        inside = slice(index * block // sub, (index + 1) * block // sub)
        levels = levels_of(self._codes[index * block : (index + 1) * block], self._layout)
        if self._layout.scales is not None:
            levels = levels * self._scales[inside].repeat_interleave(sub, dim=0)
        yield Knob(levels, partial(self._move, self._super_scale, index))
        if self._layout.offset == "float":
            ones = torch.ones_like(levels)
            yield Knob(ones, partial(self._move, self._super_offset, index))
        elif self._layout.offset == "integer":
            offsets = -self._offsets[inside].repeat_interleave(sub, dim=0)
            yield Knob(offsets, partial(self._move, self._super_offset, index))

    def _move(self, numbers: Tensor, index: int, change: Tensor) -> Tensor:
        """Move fp16 numbers, never through zero."""
        old = numbers[index].clone()
        wanted = old + change
        if self._layout.offset != "float" or numbers is self._super_scale:
            wanted = torch.where(wanted * old > 0, wanted, old)
        numbers[index] = to_fp16(wanted)
        return numbers[index] - old

    def _of_sub_block(self, index: int, inner: int) -> Iterator[Knob]:
        least, most = self._layout.scales or (0, 0)
        unit = self._super_scale[index]
        part = self._codes[inner * self._layout.sub : (inner + 1) * self._layout.sub]
        levels = levels_of(part, self._layout)
        yield Knob(levels, partial(_step, self._scales, inner, unit, float(least), float(most)))
        if self._layout.offset == "integer":
            most_offset = LARGEST_OFFSET[self._layout.name]
            unit = -self._super_offset[index]
            move = partial(_step, self._offsets, inner, unit, 0.0, most_offset)
            yield Knob(torch.ones_like(levels), move)


def _step(
    integers: Tensor, index: int, unit: Tensor, least: float, most: float, change: Tensor
) -> Tensor:
    """Move integers by what comes nearest to `change` [R] in units; return what that changed."""
    old = integers[index].clone()
    steps = torch.where(unit == 0, 0.0, change / unit)
    integers[index] = (old + steps).round_().clamp_(least, most)
    return (integers[index] - old) * unit
