"""GPTQ against oracles that share no code with it."""

import numpy as np
import pytest
import torch
from oracles.obq import obq, output_error

from qtool.errors import NumericalError
from qtool.grids.integer import IntegerGrid
from qtool.methods.gptq import gptq
from qtool.methods.inverse_hessian import invert
from qtool.methods.protocol import METHODS, ROUNDINGS, RoundingOptions, method_named
from qtool.methods.rtn import rtn

GRIDS = {
    "asym-g8": IntegerGrid(bits=4, group_size=8, symmetric=False, search=True),
    "sym-g16": IntegerGrid(bits=4, group_size=16),
    "w3-channel": IntegerGrid(bits=3, granularity="channel", symmetric=False),
    "w2-tensor": IntegerGrid(bits=2, granularity="tensor"),
}
GRID = GRIDS["asym-g8"]


def problem(rows=6, columns=48, seed=0, tokens=256):
    """Weights and the mean of x x^T over correlated inputs, some channels far larger."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw)
    x = torch.randn(tokens, columns, generator=draw) @ mix
    x = x * torch.randn(columns, generator=draw).exp()
    return torch.randn(rows, columns, generator=draw), x.T @ x / tokens


def options(**changes):
    return RoundingOptions(**{"damp_percent": 0.01, "sweeps": 0, **changes})


def rounded(weight, hessian, grid, parameters, settings):
    inverse = invert(hessian, damp_percent=settings.damp_percent, act_order=settings.act_order)
    return gptq(weight, inverse, grid, parameters, settings)


def run(weight, hessian, grid=GRID, **changes):
    return rounded(weight, hessian, grid, grid.fit(weight.float()), options(**changes))


def spread(values, grid, columns):
    return np.repeat(values.double().numpy(), grid.width(columns), axis=1)


def oracle(weight, hessian, grid, act_order, damping):
    parameters = grid.fit(weight.float())
    columns = weight.shape[1]
    order = list(range(columns))
    if act_order:
        order = sorted(order, key=lambda c: -hessian[c, c].item())
    return obq(
        weight.numpy(),
        hessian.numpy(),
        spread(parameters.scale, grid, columns),
        spread(parameters.zero, grid, columns),
        2**grid.bits - 1,
        order,
        damping,
    )


@pytest.mark.parametrize("damping", [0.01, 0.05])
@pytest.mark.parametrize("act_order", [False, True], ids=["column-order", "act-order"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_gptq_matches_textbook_obq(grid, act_order, damping):
    for seed in range(3):
        # In float64, so that no weight falls to the other side by the rounding of sums.
        weight, hessian = (tensor.double() for tensor in problem(seed=seed))
        ours = run(
            weight, hessian, grid, act_order=act_order, damp_percent=damping, block_columns=16
        )
        expected = oracle(weight, hessian, grid, act_order, damping)
        np.testing.assert_array_equal(ours.tensor.codes.numpy(), expected)


@pytest.mark.parametrize("act_order", [False, True], ids=["column-order", "act-order"])
def test_float32_loses_nothing_that_matters(act_order):
    weight, hessian = problem(rows=33, columns=100, seed=5, tokens=1000)
    grid = IntegerGrid(bits=4, group_size=20)
    ours = run(weight, hessian, grid, act_order=act_order)
    expected = oracle(weight, hessian, grid, act_order, 0.01)
    assert np.mean(ours.tensor.codes.numpy() == expected) > 0.97
    exact = grid.decode(torch.from_numpy(expected), ours.tensor.parameters)
    got = output_error(ours.tensor.dequantize() - weight, hessian)
    assert got == pytest.approx(output_error(exact - weight, hessian), rel=0.03)


@pytest.mark.parametrize("act_order", [False, True], ids=["column-order", "act-order"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_gptq_with_identity_hessian_is_rtn(grid, act_order):
    weight, _ = problem()
    parameters = grid.fit(weight)
    ours = rounded(weight, torch.eye(48), grid, parameters, options(act_order=act_order))
    plain = rtn(weight, None, grid, parameters, options())
    assert torch.equal(ours.tensor.codes, plain.tensor.codes)


def ratios(bits, act_order, shape=(16, 96), tokens=512, seeds=8):
    grid = IntegerGrid(bits=bits, group_size=32)
    found = []
    for seed in range(seeds):
        weight, hessian = problem(*shape, seed=seed, tokens=tokens)
        parameters = grid.fit(weight)
        ours = rounded(weight, hessian, grid, parameters, options(act_order=act_order))
        plain = rtn(weight, None, grid, parameters, options())
        found.append(
            output_error(ours.tensor.dequantize() - weight, hessian)
            / output_error(plain.tensor.dequantize() - weight, hessian)
        )
    return found


@pytest.mark.parametrize("act_order", [False, True], ids=["column-order", "act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rtn_on_correlated_inputs(bits, act_order):
    found = ratios(bits, act_order)
    assert max(found) < 0.9
    assert np.mean(found) < 0.6


def test_act_order_beats_column_order_where_inputs_differ_in_size():
    assert np.mean(ratios(4, act_order=True)) < 0.8 * np.mean(ratios(4, act_order=False))


@pytest.mark.parametrize("act_order", [False, True], ids=["column-order", "act-order"])
def test_block_size_does_not_change_the_result(act_order):
    weight, hessian = (tensor.double() for tensor in problem(rows=5, columns=100, seed=1))
    grid = IntegerGrid(bits=4, group_size=20, symmetric=False)
    codes = [
        run(weight, hessian, grid, act_order=act_order, block_columns=block).tensor.codes
        for block in (1, 7, 20, 33, 100, 128)
    ]
    assert all(torch.equal(codes[0], other) for other in codes)


def test_parameters_are_those_that_were_fitted():
    weight, hessian = problem()
    parameters = GRID.fit(weight)
    ours = rounded(weight, hessian, GRID, parameters, options()).tensor
    assert ours.parameters is parameters
    assert ours.grid is GRID
    assert ours.codes.dtype == torch.uint8
    assert ours.codes.is_contiguous()
    assert ours.shape == (6, 48)


def test_rows_do_not_know_of_each_other():
    weight, hessian = problem(rows=8, seed=2)
    together = run(weight, hessian).tensor.codes
    upper = run(weight[:3], hessian).tensor.codes
    assert torch.equal(together[:3], upper)


@pytest.mark.parametrize("act_order", [False, True], ids=["column-order", "act-order"])
def test_dead_inputs_are_rounded_to_nearest_and_disturb_nothing(act_order):
    weight, hessian = (tensor.double() for tensor in problem(seed=3))
    dead = [0, 7, 8, 30, 47]
    alive = [c for c in range(48) if c not in dead]
    hessian[dead], hessian[:, dead] = 0, 0
    parameters = GRID.fit(weight.float())
    ours = rounded(weight, hessian, GRID, parameters, options(act_order=act_order)).tensor
    nearest = GRID.encode(weight.float(), parameters)
    assert torch.equal(ours.codes[:, dead], nearest[:, dead])
    # The others are what they are without those inputs, at the same absolute damping.
    order = sorted(alive, key=lambda c: -hessian[c, c].item()) if act_order else alive
    small = {c: i for i, c in enumerate(alive)}
    expected = obq(
        weight.numpy()[:, alive],
        hessian.numpy()[np.ix_(alive, alive)],
        spread(parameters.scale, GRID, 48)[:, alive],
        spread(parameters.zero, GRID, 48)[:, alive],
        15,
        [small[c] for c in order],
        0.01 * len(alive) / 48,
    )
    np.testing.assert_array_equal(ours.codes.numpy()[:, alive], expected)


def test_all_inputs_dead_is_rtn():
    weight, _ = problem()
    ours = run(weight, torch.zeros(48, 48))
    assert torch.equal(ours.tensor.codes, GRID.encode(weight, ours.tensor.parameters))
    assert torch.isfinite(ours.tensor.dequantize()).all()


def test_the_damping_used_is_reported():
    weight, hessian = problem()
    done = run(weight, hessian, damp_percent=0.03)
    assert (done.damp_percent, done.damp_raised) == (0.03, False)


def test_damping_raises_itself_on_a_hessian_that_cannot_be_factored_and_says_so():
    weight, hessian = problem()
    # A negative eigenvalue, as float32 sums of nearly dependent inputs give: -0.3 mean(diag).
    values, vectors = torch.linalg.eigh(hessian.double())
    values[0] = -0.3 * hessian.diagonal().mean().double()
    broken = (vectors * values @ vectors.T).float()
    done = run(weight, broken, damp_percent=0.01)
    assert done.damp_raised
    assert done.damp_percent == pytest.approx(1.0)
    assert torch.isfinite(done.tensor.dequantize()).all()


def test_no_damping_asked_for_is_raised_from_one_percent():
    weight, hessian = problem(tokens=8)  # rank 8 of 48
    hessian -= 1e-4 * hessian.diagonal().mean() * torch.eye(48)
    done = run(weight, hessian, damp_percent=0.0)
    assert done.damp_raised
    assert done.damp_percent == 0.01


def test_few_tokens_still_beat_rtn():
    weight, hessian = problem(rows=16, tokens=8, seed=4)
    done = run(weight, hessian, damp_percent=0.05)
    plain = GRID.decode(GRID.encode(weight, done.tensor.parameters), done.tensor.parameters)
    ours = output_error(done.tensor.dequantize() - weight, hessian)
    assert ours < 0.5 * output_error(plain - weight, hessian)


def test_a_hopeless_hessian_is_refused_after_every_damping():
    weight, hessian = problem()
    with pytest.raises(NumericalError, match="not positive definite even with damping") as caught:
        run(weight, -hessian)
    assert caught.value.exit_code == 8
    assert "--damp-percent" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_hessian_that_is_not_finite_is_a_numerical_error(value):
    weight, hessian = problem()
    hessian[3, 5] = value
    with pytest.raises(NumericalError, match="not finite") as caught:
        run(weight, hessian)
    assert caught.value.exit_code == 8


def test_a_missing_hessian_is_a_programming_error():
    with pytest.raises(TypeError, match="Hessian"):
        gptq(problem()[0], None, GRID, GRID.fit(problem()[0]), options())


def test_inputs_are_not_modified():
    weight, hessian = problem()
    hessian[3], hessian[:, 3] = 0, 0
    parameters = GRID.fit(weight)
    tensors = (weight, hessian, parameters.scale, parameters.zero)
    before = [tensor.clone() for tensor in tensors]
    for act_order in (False, True):
        rounded(weight, hessian, GRID, parameters, options(act_order=act_order))
    rtn(weight, None, GRID, parameters, options())
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("act_order", [False, True], ids=["column-order", "act-order"])
def test_the_device_does_not_matter(act_order, device):
    weight, hessian = (tensor.double() for tensor in problem(rows=9, columns=96))
    grid = IntegerGrid(bits=4, group_size=32)
    here = run(weight, hessian, grid, act_order=act_order).tensor
    there = run(weight.to(device), hessian.to(device), grid, act_order=act_order).tensor.cpu()
    assert torch.equal(here.codes, there.codes)
    assert torch.equal(here.parameters.scale, there.parameters.scale)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_the_unit_of_the_inputs_does_not_matter(scale):
    weight, hessian = problem()
    expected = run(weight, hessian).tensor.codes
    got = run(weight, hessian * scale).tensor.codes
    assert (got == expected).float().mean() > 0.99


def test_every_method_names_a_rounding_that_exists():
    for name, method in METHODS.items():
        assert method_named(name) is method
        rounding = ROUNDINGS[method.rounding]
        assert rounding.name == method.rounding
        assert rounding.needs <= {"hessian"}
