"""GPTQ: round one column at a time, let the columns not yet rounded absorb the error.

Minimises  tr((W - Q) H (W - Q)^T)  with  H = mean of x x^T  over calibration inputs x.

Paper: Frantar et al., "GPTQ", ICLR 2023, https://arxiv.org/abs/2210.17323, algorithm 1.
Here all parameters of a row are fitted first, so columns can go in any order and no index of
groups has to be stored (act-order on static groups).

Shapes: R = out_features, C = in_features, B = columns of one block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtool.grids.protocol import ColumnRounder, Grid, QuantizedTensor
from qtool.methods.descent import descend
from qtool.methods.inverse_hessian import InverseHessian
from qtool.methods.protocol import Rounded, Rounding, RoundingOptions


def gptq(
    weight: Tensor,  # [R, C] float32, any device; not modified
    inverse: InverseHessian | None,  # same device
    grid: Grid,
    parameters: Any,  # of the grid, already fitted to `weight`
    options: RoundingOptions,
) -> Rounded:
    """Round `weight` to `grid` with the least error on the calibration inputs."""
    if inverse is None:
        raise TypeError("gptq needs a Hessian")
    columns = weight.shape[1]
    order, factor = inverse.order, inverse.factor
    pending = weight[:, order].T.contiguous()  # [C, R]: a column of W is contiguous
    codes = torch.empty_like(pending, dtype=torch.uint8)
    rounder = grid.columns(parameters)
    indices = order.tolist()
    for start in range(0, columns, options.block_columns):
        stop = min(start + options.block_columns, columns)
        errors = _round_block(pending, codes, factor, rounder, indices, start, stop)
        pending[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    del pending, errors  # descent needs the room
    quantized = QuantizedTensor(codes[order.argsort()].T.contiguous(), parameters, grid)
    damping = inverse.damp_percent
    if options.sweeps:
        quantized = descend(
            weight,
            quantized,
            inverse.hessian,
            damping * float(inverse.hessian.diagonal().mean()) or 1.0,
            order,
            sweeps=options.sweeps,
            block_columns=options.block_columns,
        )
    return Rounded(quantized, damping, damping > options.damp_percent)


def _round_block(
    pending: Tensor,  # [C, R] consumed in place
    codes: Tensor,  # [C, R] uint8, filled in place
    factor: Tensor,  # [C, C] upper triangular
    rounder: ColumnRounder,
    indices: list[int],  # position in `pending` -> column of the weight
    start: int,
    stop: int,
) -> Tensor:
    """Round columns start..stop and return their scaled errors [stop - start, R]."""
    pivots = (1.0 / factor.diagonal()[start:stop]).tolist()
    errors = torch.empty_like(pending[start:stop])
    for j in range(start, stop):
        column = pending[j]
        chosen = rounder.encode(column, indices[j])
        codes[j] = chosen
        error = errors[j - start]
        torch.sub(column, rounder.decode(chosen, indices[j]), out=error)
        error.mul_(pivots[j - start])
        if j + 1 < stop:
            pending[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
    return errors


GPTQ = Rounding("gptq", frozenset({"hessian"}), gptq, "https://arxiv.org/abs/2210.17323")
