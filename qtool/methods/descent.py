"""Coordinate descent on codes and scales: what GPTQ leaves, until little more is won.

GPTQ never looks back at a column, nor at a scale. With everything else fixed, the error
tr(E H E^T), E = Q - W, is a parabola in one column's values,
    best value = q_j - (E H)_j / H_jj,
and in a scale s that acts along L (the levels of its codes),
    best change = - <L, E H> / <L, L H>.
The nearest value that the grid has is the exact minimum over that one number, so no step makes
the error larger.

Papers: Behdin et al., "QuantEase", 2023, https://arxiv.org/abs/2309.01885, for the columns.

Shapes: R = out_features, C = in_features, B = columns of one block, w = columns of one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.grids.protocol import ColumnRounder, QuantizedTensor
from qtool.grids.refit import Refit


def descend(
    weight: Tensor,  # [R, C] float32; not modified
    start: QuantizedTensor,  # of the same shape
    hessian: Tensor,  # [C, C] float32; not modified
    damping: float,  # > 0, added to the diagonal of H
    order: Tensor,  # [C] int64, columns in the order in which they are visited
    *,
    sweeps: int,  # over all columns; scales move between two of them
    block_columns: int = 128,
) -> QuantizedTensor:
    """Return codes and scales with at most the error of `start`, on the same grid."""
    grid, parameters = start.grid, start.parameters
    values = start.dequantize().T.contiguous()  # [C, R]: a column is contiguous
    error = values - weight.T
    products = torch.addmm(error, hessian, error, beta=damping)  # [C, R], (H + damping) E^T
    del error
    codes = start.codes.T.contiguous()
    diagonal = hessian.diagonal() + damping
    for sweep in range(sweeps):
        rounder = grid.columns(parameters)
        for block in order.split(block_columns):
            rows = hessian[block]  # [B, C]
            inner = products[block]
            changes = _visit(codes, values, inner, rows[:, block], diagonal, block, rounder)
            products.addmm_(rows.T, changes)
            products[block] += damping * changes
        if sweep + 1 < sweeps:
            refit = grid.refit(codes.T, parameters)
            if refit is not None:
                _move_scales(refit, values, products, hessian, damping)
                parameters = refit.parameters()
    return QuantizedTensor(codes.T.contiguous(), parameters, grid)


def _visit(
    codes: Tensor,  # [C, R] uint8, updated in place
    values: Tensor,  # [C, R] updated in place
    products: Tensor,  # [B, R] of this block; consumed
    coupling: Tensor,  # [B, B] of H
    diagonal: Tensor,  # [C] of the damped H
    block: Tensor,  # [B] int64
    rounder: ColumnRounder,
) -> Tensor:
    """Choose the codes of one block of columns anew; return the changes of values [B, R]."""
    changes = torch.empty_like(products)
    scales = (-1.0 / diagonal[block]).tolist()
    for place, column in enumerate(block.tolist()):
        value, change = values[column], changes[place]
        wanted = torch.add(value, products[place], alpha=scales[place])
        code = rounder.encode(wanted, column)
        codes[column] = code
        torch.sub(rounder.decode(code, column), value, out=change)
        value += change
        if place + 1 < len(block):
            products[place + 1 :].addr_(coupling[place, place + 1 :], change)
    return changes


def _move_scales(
    refit: Refit,
    values: Tensor,  # [C, R] updated in place
    products: Tensor,  # [C, R] updated in place
    hessian: Tensor,
    damping: float,
) -> None:
    """Give every scale the storable value with the least error, one after another."""
    for columns, knobs in refit.groups():
        inner = hessian[columns, columns]
        near = products[columns].clone()  # [w, R]
        changed = torch.zeros_like(near)
        for knob in knobs:
            along = torch.addmm(knob.direction, inner, knob.direction, beta=damping)
            curvature = (knob.direction * along).sum(dim=0)
            slope = (knob.direction * near).sum(dim=0)
            wanted = torch.where(curvature > 0, -slope / curvature, 0.0)
            moved = knob.move(wanted)
            near.addcmul_(along, moved)
            changed.addcmul_(knob.direction, moved)
        values[columns] += changed
        products.addmm_(hessian[:, columns], changed)
        products[columns] += damping * changed
