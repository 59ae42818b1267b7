"""Small unsigned integers as a dense stream of bits in 32-bit words, least significant bit first.

Value i of a row occupies bits [i * bits, (i + 1) * bits) of the row's stream, and word w holds
bits [32 * w, 32 * w + 32). Widths that divide 32 never straddle two words; 3-bit values do (32 of
them fill 3 words). GPTQ, AWQ and compressed-tensors all store this stream and differ only in the
dimension along which they pack and in the order of the values.

Shapes: n = values of a row, w = words of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.formats.packed_layouts import WORD_BITS, words_for


def count_unit(bits: int) -> int:
    """Return the least number of values of `bits` bits that fill whole words."""
    return next(n for n in range(1, WORD_BITS + 1) if n * bits % WORD_BITS == 0)


def pack_words(
    codes: Tensor,  # [..., n] any integer dtype, each in [0, 2**bits); not modified
    bits: int,  # 1..8
) -> Tensor:
    """Return the words [..., w] int32 of the last dimension; unused high bits are zero."""
    count, lead = codes.shape[-1], codes.shape[:-1]
    # Rows are cut into the shortest blocks that fill whole words: one loop serves every width.
    places = count_unit(bits)
    blocks = -(-count // places)
    padded = pad(codes, (0, blocks * places - count)).reshape(*lead, blocks, places)
    words = torch.zeros(
        (*lead, blocks, words_for(places, bits)), dtype=torch.int32, device=codes.device
    )
    for place in range(places):
        word, offset = divmod(place * bits, WORD_BITS)
        value = padded[..., place].to(torch.int32)
        words[..., word] |= value << offset
        if offset + bits > WORD_BITS:
            words[..., word + 1] |= value >> (WORD_BITS - offset)
    return words.flatten(-2)[..., : words_for(count, bits)].contiguous()


def unpack_words(
    words: Tensor,  # [..., w] int32, w = words_for(count, bits); not modified
    bits: int,  # 1..8
    count: int,
) -> Tensor:
    """Return the `count` values [..., count] uint8 that `pack_words` was given."""
    stored, lead = words.shape[-1], words.shape[:-1]
    places = count_unit(bits)
    blocks, width = -(-count // places), words_for(places, bits)
    padded = pad(words, (0, blocks * width - stored)).reshape(*lead, blocks, width)
    codes = torch.empty((*lead, blocks, places), dtype=torch.uint8, device=words.device)
    for place in range(places):
        word, offset = divmod(place * bits, WORD_BITS)
        # `>>` copies the sign bit into the bits that the mask then drops.
        low = min(bits, WORD_BITS - offset)
        value = (padded[..., word] >> offset) & (2**low - 1)
        if low < bits:
            value |= (padded[..., word + 1] & (2 ** (bits - low) - 1)) << low
        codes[..., place] = value.to(torch.uint8)
    return codes.flatten(-2)[..., :count].contiguous()
