"""Random bytes and parameters of ggml's block types."""

from dataclasses import replace

import torch

from qtool.formats.ggml_blocks import unpack
from qtool.ggml_types import GGML_TYPES
from qtool.grids.ggml import LAYOUTS

NAMES = tuple(LAYOUTS)
# Bytes at which a block has fp16 numbers.
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
}


def random_bytes(name, rows, blocks, seed):
    """uint8 [rows, row bytes]: every bit is random, but fp16 numbers are finite."""
    size = GGML_TYPES[name].block_bytes
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows, blocks, size), generator=generator, dtype=torch.uint8)
    for start in HALVES.get(name, (0,)):
        data[:, :, start + 1] &= 0xBB  # one bit of the exponent is zero
    return data.reshape(rows, blocks * size)


def random_parameters(name, rows, blocks, seed):
    """Parameters of the same kind as random bytes have them, with numbers near one."""
    columns = blocks * GGML_TYPES[name].block
    parameters = unpack(name, random_bytes(name, rows, blocks, seed), columns).parameters
    generator = torch.Generator().manual_seed(seed + 1)

    def near_one(values):
        drawn = (0.5 + torch.rand(values.shape, generator=generator)) * values.sign()
        return drawn.half().float()

    return replace(
        parameters,
        super_scale=near_one(parameters.super_scale),
        super_offset=near_one(parameters.super_offset),
    )
