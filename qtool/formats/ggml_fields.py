"""The fields that blocks of ggml consist of, and how each lays out its bits.

Codes are treated eight at a time, as one little-endian 64-bit lane: a code never leaves its own
byte, so shifts of whole lanes are shifts of every code. Source: ggml-common.h and ggml-quants.c of
llama.cpp b11549.

Shapes: n = blocks, s = sub-blocks of a block. Bytes are uint8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LANE = 8  # codes in 64 bits
EVERY_BYTE = 0x0101010101010101


@dataclass
class Blocks:
    """The contents of n blocks, before and after they are bytes."""

    lanes: Tensor  # [n, block / 8] int64, eight codes each
    scale: Tensor  # [n] float16
    offset: Tensor  # [n] float16; [0] in types without offsets
    scales: Tensor  # [n, s] uint8, from zero: the least integer scale is stored as 0
    offsets: Tensor  # [n, s] uint8


class Field(Protocol):
    """Consecutive bytes of a block."""

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block of `block` weights, `sub` of which share a scale."""

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, size]."""

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Put what the bytes [n, size] hold into `blocks`, whose lanes were zero at first."""


@dataclass(frozen=True)
class Half:
    """The fp16 number of a block: `scale` or `offset`."""

    name: str

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        del block, sub
        return 2

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, 2]."""
        value: Tensor = getattr(blocks, self.name)
        return value[:, None].view(torch.uint8)

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Take the number from the bytes."""
        setattr(blocks, self.name, stored.view(torch.float16)[:, 0])


@dataclass(frozen=True)
class Plane:
    """Some bits of every code, those of 8 / bits stretches of codes laid over one another.

    Args:
        first: least significant of the code's bits.
        bits: how many of them.
        stretch: lanes laid over the next `stretch` lanes.
    """

    first: int
    bits: int
    stretch: int

    @property
    def _mask(self) -> int:
        return (2**self.bits - 1) * EVERY_BYTE

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        del sub
        return block * self.bits // 8

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, size]."""
        parts = 8 // self.bits
        lanes = (blocks.lanes >> self.first).bitwise_and_(self._mask)
        lanes = lanes.reshape(len(lanes), -1, parts, self.stretch)
        stored = lanes[:, :, 0].contiguous()
        for part in range(1, parts):
            stored |= lanes[:, :, part] << (self.bits * part)
        return stored.view(torch.uint8).flatten(1)

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Add these bits to the codes."""
        parts, count = 8 // self.bits, len(stored)
        planes = stored.view(torch.int64).reshape(count, -1, self.stretch)
        lanes = blocks.lanes.view(count, -1, parts, self.stretch)
        for part in range(parts):
            bits = (planes >> (self.bits * part)).bitwise_and_(self._mask)
            lanes[:, :, part] |= bits.bitwise_left_shift_(self.first)


class SignedBytes:
    """Codes of eight bits as signed bytes: code 128 is stored as 0."""

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        del sub
        return block

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, 32]."""
        return blocks.lanes.view(torch.uint8) ^ 0x80

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Take the codes."""
        blocks.lanes = (stored ^ 0x80).view(torch.int64)


class FifthBits:
    """The fifth bit of 32 codes, in their order."""

    # Multiplying gathers bit 0 of byte i of a lane in bit 56 + i: 8 i + (56 - 7 i).
    GATHER = sum(1 << (56 - 7 * i) for i in range(LANE))

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        del sub
        return block // 8

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, 4]."""
        bits = (blocks.lanes >> 4).bitwise_and_(EVERY_BYTE).mul_(self.GATHER)
        return bits.view(torch.uint8)[:, LANE - 1 :: LANE]

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Add the bits to the codes."""
        spread = [sum((byte >> i & 1) << (8 * i + 4) for i in range(LANE)) for byte in range(256)]
        table = torch.tensor(spread, dtype=torch.int64, device=stored.device)
        blocks.lanes |= table[stored.to(torch.int32)]


class ScaleBytes:
    """Integer scales as signed bytes."""

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        return block // sub

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, s]."""
        return blocks.scales ^ 0x80

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Take the scales."""
        blocks.scales = stored ^ 0x80


class ScaleOffsetNibbles:
    """Scale in the low and offset in the high four bits of a byte."""

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        return block // sub

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, s]."""
        return blocks.scales | blocks.offsets << 4

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Take scales and offsets."""
        blocks.scales, blocks.offsets = stored & 15, stored >> 4


class ScaleOffsetSixBits:
    """Eight six-bit scales and as many offsets in twelve bytes.

    The first four scales and the first four offsets have the low six bits of a byte each; the last
    four bytes hold the low nibbles of the others, whose high bits fill the first eight bytes.
    """

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        return block // sub * 12 // 8

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, 12]."""
        low_scale, high_scale = blocks.scales.split(4, dim=1)
        low_offset, high_offset = blocks.offsets.split(4, dim=1)
        return torch.cat(
            [
                low_scale | (high_scale >> 4) << 6,
                low_offset | (high_offset >> 4) << 6,
                (high_scale & 15) | high_offset << 4,
            ],
            dim=1,
        )

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Take scales and offsets."""
        first, second, third = stored.split(4, dim=1)
        high_scale = (third & 15) | (first >> 6) << 4
        high_offset = (third >> 4) | (second >> 6) << 4
        blocks.scales = torch.cat([first & 63, high_scale], dim=1)
        blocks.offsets = torch.cat([second & 63, high_offset], dim=1)


class SixteenSixBitScales:
    """Sixteen six-bit scales: nibbles in eight bytes, then the high bits in four."""

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        return block // sub * 6 // 8

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, 12]."""
        low, high = blocks.scales & 15, blocks.scales >> 4
        return torch.cat(
            [
                low[:, :8] | low[:, 8:] << 4,
                high[:, :4] | high[:, 4:8] << 2 | high[:, 8:12] << 4 | high[:, 12:] << 6,
            ],
            dim=1,
        )

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Take the scales."""
        low, high = stored[:, :8], stored[:, 8:]
        nibbles = torch.cat([low & 15, low >> 4], dim=1)
        bits = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
        blocks.scales = nibbles | bits << 4


class EightSixBitScales:
    """Eight six-bit scales: the high bits in two bytes, then nibbles in four."""

    def size(self, block: int, sub: int) -> int:
        """Return the bytes in a block."""
        return block // sub * 6 // 8

    def write(self, blocks: Blocks) -> Tensor:
        """Return the bytes [n, 6]."""
        low, high = blocks.scales & 15, blocks.scales >> 4
        bits = high[:, ::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
        return torch.cat([bits, low[:, ::2] | low[:, 1::2] << 4], dim=1)

    def read(self, stored: Tensor, blocks: Blocks) -> None:
        """Take the scales."""
        high, low = stored[:, :2], stored[:, 2:]
        nibbles = torch.stack([low & 15, low >> 4], dim=2).flatten(1)
        bits = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
        blocks.scales = nibbles | bits << 4
