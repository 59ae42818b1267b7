"""Descent after GPTQ: never worse, and in the end no single code or scale can be better."""

import itertools

import numpy as np
import pytest
import torch
from oracles.obq import output_error

from qtool.grids.ggml import LAYOUTS, GgmlGrid
from qtool.grids.integer import IntegerGrid
from qtool.methods.descent import descend
from qtool.methods.gptq import gptq
from qtool.methods.inverse_hessian import invert
from qtool.methods.protocol import RoundingOptions

INTEGERS = [
    IntegerGrid(bits=3, group_size=64),
    IntegerGrid(bits=4, group_size=32, symmetric=False, search=True),
    IntegerGrid(bits=2, granularity="channel", symmetric=False),
    IntegerGrid(bits=4, granularity="tensor"),
    IntegerGrid(bits=8, group_size=128, scale_dtype=torch.bfloat16),
]
GRIDS = [*INTEGERS, *(GgmlGrid(name) for name in LAYOUTS)]
DAMPING = 0.05


def problem(rows=7, columns=512, seed=0, tokens=700):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw)
    x = torch.randn(tokens, columns, generator=draw) @ mix
    x = x * torch.randn(columns, generator=draw).exp()
    return torch.randn(rows, columns, generator=draw) * 0.1, x.T @ x / tokens


def rounded(weight, hessian, grid, sweeps):
    options = RoundingOptions(damp_percent=DAMPING, sweeps=sweeps)
    parameters = grid.fit(weight, hessian.diagonal())
    inverse = invert(hessian, damp_percent=DAMPING, act_order=True)
    return gptq(weight, inverse, grid, parameters, options).tensor


def damped(hessian):
    """float64, as the descent sees it."""
    exact = hessian.double().numpy().copy()
    exact[np.diag_indices(len(exact))] += DAMPING * np.diag(exact).mean()
    return exact


def error(weight, quantized, hessian):
    return output_error(quantized.dequantize().double() - weight.double(), hessian)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_every_sweep_and_every_move_of_scales_lowers_the_error(grid):
    weight, hessian = problem(seed=1)
    exact = damped(hessian)
    errors = [error(weight, rounded(weight, hessian, grid, n), exact) for n in range(4)]
    assert errors[1] < errors[0]
    assert errors[3] < 0.999 * errors[1]
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_scales_that_moved_are_still_what_a_file_can_hold(grid):
    weight, hessian = problem(seed=2)
    quantized = rounded(weight, hessian, grid, 3)
    parameters = quantized.parameters
    if isinstance(grid, IntegerGrid):
        assert torch.equal(parameters.scale, grid.storable(parameters.scale))
        assert (parameters.scale > 0).all()
        return
    for half in (parameters.super_scale, parameters.super_offset):
        assert torch.equal(half, half.half().float())
    layout = grid.layout
    if layout.scales is not None:
        assert torch.equal(parameters.scales, parameters.scales.round())
        assert parameters.scales.min() >= layout.scales[0]
        assert parameters.scales.max() <= layout.scales[1]
    if layout.offset == "integer":
        assert parameters.offsets.min() >= 0
        assert parameters.offsets.max() <= {"Q2_K": 15}.get(grid.name, 63)
    assert int(quantized.codes.max()) < len(layout.levels)
    assert int(quantized.codes.min()) >= layout.least_code


@pytest.mark.parametrize("grid", [INTEGERS[0], GgmlGrid("Q4_K")], ids=lambda grid: grid.name)
def test_in_the_end_no_single_code_can_be_better(grid):
    """An oracle that tries every code of every weight, with everything else as it is."""
    weight, hessian = problem(rows=2, columns=256, seed=3)
    exact = damped(hessian)
    start = rounded(weight, hessian, grid, 0)
    step = DAMPING * float(hessian.diagonal().mean())
    found = descend(weight, start, hessian, step, torch.arange(256), sweeps=40)
    # The scales no longer move: only codes are looked at.
    found = descend(weight, found, hessian, step, torch.arange(256), sweeps=1)
    base = error(weight, found, exact)
    count = 8 if isinstance(grid, IntegerGrid) else len(grid.layout.levels)
    all_values = torch.stack(
        [grid.decode(torch.full_like(found.codes, c), found.parameters) for c in range(count)]
    ).double()
    residual = found.dequantize().double() - weight.double()
    for row, column in itertools.product(range(2), range(256)):
        change = all_values[:, row, column].numpy() - float(found.dequantize()[row, column])
        slope = 2 * float(residual[row].numpy() @ exact[:, column])
        assert (change * slope + change**2 * exact[column, column]).min() > -2e-5 * base


def test_inputs_are_not_modified():
    weight, hessian = problem(seed=4)
    start = rounded(weight, hessian, GRIDS[0], 0)
    kept = weight.clone(), hessian.clone(), start.codes.clone(), start.parameters.scale.clone()
    descend(weight, start, hessian, 0.1, torch.arange(512), sweeps=3)
    now = weight, hessian, start.codes, start.parameters.scale
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_an_input_that_was_never_seen_is_rounded_to_nearest():
    weight, hessian = problem(seed=5)
    hessian[17] = hessian[:, 17] = 0
    grid = IntegerGrid(bits=4, granularity="tensor")
    found = rounded(weight, hessian, grid, 3)
    nearest = grid.encode(weight, found.parameters)
    assert torch.equal(found.codes[:, 17], nearest[:, 17])


def test_a_matrix_whose_scale_is_shared_by_all_rows_keeps_it():
    weight, hessian = problem(seed=6)
    grid = IntegerGrid(bits=4, granularity="tensor")
    found = rounded(weight, hessian, grid, 3).parameters.scale
    assert torch.equal(found, grid.fit(weight, hessian.diagonal()).scale)
