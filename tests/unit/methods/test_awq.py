"""AWQ's scale search against explicit inputs and a search of its own."""

import numpy as np
import pytest
import torch
from oracles.obq import output_error as oracle_error

from qtool.grids.integer import IntegerGrid
from qtool.methods.awq import output_error, search_scale, tie_repeated, untie_repeated

GRID = IntegerGrid(bits=3, group_size=32, symmetric=False)
COLUMNS = 96


def inputs(seed=0, outliers=True, tokens=256, columns=COLUMNS):
    """Inputs [T, C] of which a few channels are thirty times larger."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=draw)
    if outliers:
        x[:, ::17] *= 30
    return x


def weights(rows=24, seed=1, columns=COLUMNS):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments(x, full=True):
    hessian = x.T @ x / len(x)
    return x.abs().mean(dim=0), hessian if full else hessian.diagonal().clone()


def rounded(weight, scale, grid=GRID):
    """The weight that is left of `weight` when it is rounded under a scale."""
    scaled = weight * scale
    parameters = grid.plain().fit(scaled)
    return grid.decode(grid.encode(scaled, parameters), parameters) / scale


def loss(weight, scale, x, grid=GRID):
    """Mean squared output error on the inputs themselves, by running them."""
    difference = (rounded(weight, scale, grid) - weight).double().numpy()
    return float(((x.double().numpy() @ difference.T) ** 2).sum() / len(x))


@pytest.mark.parametrize("full", [True, False], ids=["hessian", "diagonal"])
@pytest.mark.parametrize("seed", range(3))
def test_scaling_helps_where_some_inputs_stand_out(seed, full):
    x, weight = inputs(seed), weights(seed=seed + 10)
    found = search_scale([(weight, GRID)], *moments(x, full))
    assert found.helped
    assert 0 < found.ratio < 1
    assert loss(weight, found.scale, x) < 0.5 * loss(weight, torch.ones(COLUMNS), x)
    large = torch.arange(COLUMNS) % 17 == 0
    assert found.scale[large].min() > found.scale[~large].max()


@pytest.mark.parametrize("outliers", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_measured_error_never_rises(seed, bits, outliers):
    grid = IntegerGrid(bits=bits, group_size=32, symmetric=seed % 2 == 0)
    x, weight = inputs(seed, outliers), weights(seed=seed)
    found = search_scale([(weight, grid)], *moments(x))
    assert found.error <= found.plain_error
    # ... nor does the error on the inputs themselves, which these are sums of.
    assert loss(weight, found.scale, x, grid) <= loss(weight, torch.ones(COLUMNS), x, grid) * 1.001
    assert found.error == pytest.approx(loss(weight, found.scale, x, grid), rel=1e-3)
    assert found.plain_error == pytest.approx(loss(weight, torch.ones(COLUMNS), x, grid), rel=1e-3)


def test_the_ratio_is_the_best_of_the_grid():
    x, weight = inputs(2), weights(seed=2)
    mean_abs, hessian = moments(x)
    losses = {}
    for step in range(20):
        scale = mean_abs ** (step / 20)
        losses[step / 20] = loss(weight, scale / (scale.max() * scale.min()).sqrt(), x)
    found = search_scale([(weight, GRID)], mean_abs, hessian)
    assert found.error == pytest.approx(min(losses.values()), rel=1e-3)
    assert losses[found.ratio] == pytest.approx(min(losses.values()), rel=1e-3)


def test_all_linears_of_a_tap_count():
    x = inputs(3)
    mean_abs, hessian = moments(x)
    parts = [(weights(rows, seed=rows), GRID) for rows in (24, 8, 40)]
    found = search_scale(parts, mean_abs, hessian)
    assert found.error == pytest.approx(sum(loss(w, found.scale, x) for w, _ in parts), rel=1e-3)
    each_has_its_own_grid = search_scale(
        [(weight, IntegerGrid(bits=8, group_size=32)) for weight, _ in parts], mean_abs, hessian
    )
    assert each_has_its_own_grid.plain_error < 0.01 * found.plain_error


def test_equal_inputs_want_no_scale():
    weight = weights()
    found = search_scale([(weight, GRID)], torch.ones(COLUMNS), torch.eye(COLUMNS))
    assert not found.helped
    assert torch.equal(found.scale, torch.ones(COLUMNS))
    assert found.ratio == 0
    assert found.error == found.plain_error


def test_weights_that_are_on_the_grid_already_are_left_alone():
    draw = torch.Generator().manual_seed(4)
    weight = torch.randint(0, 8, (24, COLUMNS), generator=draw) * 0.25
    weight[:, ::32], weight[:, 1::32] = 0, 1.75
    found = search_scale([(weight, GRID)], *moments(inputs(4)))
    assert found.plain_error == 0
    assert not found.helped


def test_the_search_rounds_with_plain_fits_whatever_the_grid():
    x, weight = inputs(5), weights(seed=5)
    searching = IntegerGrid(bits=3, group_size=32, symmetric=False, search=True)
    a = search_scale([(weight, searching)], *moments(x))
    b = search_scale([(weight, GRID)], *moments(x))
    assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_scales_are_centred_positive_and_finite(size):
    x = inputs(6) * size
    x[:, 5] = 0  # an input that is never on
    found = search_scale([(weights(seed=6), GRID)], *moments(x))
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()
    assert found.scale.max() * found.scale.min() == pytest.approx(1, rel=1e-4)


def test_an_overflowing_candidate_is_passed_over():
    x = inputs(7)
    found = search_scale([(weights(seed=7) * 1e15, GRID)], *moments(x * 1e10))
    assert torch.isfinite(found.scale).all()


def test_the_device_does_not_matter(device):
    x, weight = inputs(8), weights(seed=8)
    here = search_scale([(weight, GRID)], *moments(x))
    there = search_scale([(weight.to(device), GRID)], *(m.to(device) for m in moments(x)))
    assert there.error == pytest.approx(here.error, rel=1e-3)
    assert there.scale.device.type == device.type


def test_inputs_are_not_modified():
    x, weight = inputs(8), weights(seed=8)
    for full in (True, False):
        mean_abs, moment = moments(x, full)
        tensors = (weight, mean_abs, moment)
        before = [tensor.clone() for tensor in tensors]
        search_scale([(weight, GRID)], mean_abs, moment, shared=8, repeats=3)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(("key_value_heads", "repeats", "head"), [(2, 2, 3), (1, 4, 5), (3, 1, 4)])
def test_tied_values_repeat_as_keys_and_values_do(key_value_heads, repeats, head):
    """Head h of the queries reads key-value head h // repeats."""
    columns = key_value_heads * repeats * head
    values = torch.arange(columns, dtype=torch.float32).square()
    tied = tie_repeated(values, head, repeats).tolist()
    for query_head in range(key_value_heads * repeats):
        first = query_head // repeats * repeats
        for place in range(head):
            copies = [values[(first + r) * head + place].item() for r in range(repeats)]
            assert tied[query_head * head + place] == pytest.approx(np.mean(copies))


@pytest.mark.parametrize(("key_value_heads", "repeats", "head"), [(2, 2, 3), (1, 4, 5), (3, 1, 4)])
def test_untied_values_spread_over_the_repeated_heads_are_the_tied_ones(
    key_value_heads, repeats, head
):
    from transformers.models.llama.modeling_llama import repeat_kv

    columns = key_value_heads * repeats * head
    draw = torch.Generator().manual_seed(9)
    tied = tie_repeated(torch.rand(columns, generator=draw), head, repeats)
    untied = untie_repeated(tied, head, repeats)
    assert untied.shape == (key_value_heads * head,)
    spread = repeat_kv(untied.reshape(1, key_value_heads, 1, head), repeats)
    assert torch.equal(spread.reshape(-1), tied)


def test_a_search_over_repeated_heads_gives_a_scale_that_can_be_untied():
    x, weight = inputs(10), weights(seed=10)
    found = search_scale([(weight, GRID)], *moments(x), shared=12, repeats=4)
    heads = found.scale.reshape(-1, 4, 12)
    assert found.helped
    assert all(torch.equal(heads[:, 0], heads[:, r]) for r in range(4))
    assert found.error == pytest.approx(loss(weight, found.scale, x), rel=1e-3)


@pytest.mark.parametrize("columns", [33, 100])
def test_the_output_error_is_the_trace_and_its_diagonal_stand_in(columns):
    x = inputs(11, columns=columns)
    difference = weights(7, seed=11, columns=columns)
    hessian = (x.T @ x / len(x)).double()
    expected = oracle_error(difference, hessian)
    assert output_error(difference.double(), hessian) == pytest.approx(expected, rel=1e-10)
    diagonal = float((difference.double().square() * hessian.diagonal()).sum())
    assert output_error(difference.double(), hessian.diagonal()) == pytest.approx(diagonal)
