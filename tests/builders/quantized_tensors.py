"""Quantized tensors with random contents, which reach every code and zero point a grid allows."""

import torch

from qtool.formats.protocol import FORMATS, QuantizedModule, TensorLayout
from qtool.grids.integer import IntegerGrid, IntegerParameters
from qtool.grids.protocol import QuantizedTensor

DTYPE_NAMES = {
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


def make_grid(dialect, bits=4, symmetric=True, group_size=32, scale_dtype=torch.float16):
    """A grid as the plan would make it; group_size -1 is per channel, None per tensor."""
    granularity = {-1: "channel", None: "tensor"}.get(group_size, "group")
    return IntegerGrid(
        bits=bits,
        group_size=group_size if granularity == "group" else 128,
        symmetric=symmetric,
        granularity=granularity,
        scale_dtype=scale_dtype,
        lowest_zero=FORMATS[dialect].lowest_zero(),
    )


def random_tensor(grid, shape, seed=0):
    """A quantized tensor of `shape` (rows, columns) whose contents are drawn, not rounded."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = columns // grid.width(columns)
    codes = torch.randint(0, grid.max_code + 1, shape, generator=draw).to(torch.uint8)
    size = (1, 1) if grid.granularity == "tensor" else (rows, groups)
    scale = grid.storable(torch.rand(size, generator=draw) + 0.01)
    zero = torch.full(size, (grid.max_code + 1) // 2)
    if not grid.symmetric:
        zero = torch.randint(grid.lowest_zero, grid.max_code + 1, size, generator=draw)
    parameters = IntegerParameters(
        scale.expand(rows, groups).contiguous(), zero.float().expand(rows, groups).contiguous()
    )
    return QuantizedTensor(codes, parameters, grid)


def layouts_of(tensors):
    """What the headers of a file with these tensors say."""
    return {
        name: TensorLayout(DTYPE_NAMES[value.dtype], tuple(value.shape))
        for name, value in tensors.items()
    }


def module_of(name, quantized):
    """The module that `quantized` belongs to, as a configuration sees it."""
    return QuantizedModule(name, quantized.grid, quantized.shape)


def same(left, right):
    """Whether two quantized tensors hold the same codes, scales and zero points."""
    pairs = (
        (left.codes, right.codes),
        (left.parameters.scale, right.parameters.scale),
        (left.parameters.zero, right.parameters.zero),
    )
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
