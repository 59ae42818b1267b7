"""Sums over inputs against numpy in float64 on all inputs at once."""

import numpy as np
import pytest
import torch

from qtool import device as devices
from qtool.calibration import moments
from qtool.calibration.moments import Moments, MomentSums

CPU = torch.device("cpu")
# Columns: below, at and above the strips in which a Hessian is summed, none of them a round number.
COLUMNS = [1, 33, 256, 576, 1100]


def inputs(tokens, columns, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5
    return (torch.randn(tokens, columns, generator=draw) @ mix + 0.1).to(dtype)


def summed(batches, columns, *, twins=None, **kinds):
    sums = MomentSums(columns, CPU, **{"hessian": True, **kinds})
    for index, batch in enumerate(batches):
        sums.add(batch, None if twins is None else twins[index])
    return sums.result()


def close(got, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hessian", [True, False], ids=["hessian", "diagonal"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_moments_are_means_over_all_tokens_of_all_batches(columns, hessian, dtype):
    batches = [inputs(n, columns, seed=n, dtype=dtype) for n in (100, 1, 33)]
    x = torch.cat(batches).double().numpy()
    got = summed(batches, columns, hessian=hessian)
    assert got.tokens == 134
    close(got.mean_abs, np.abs(x).mean(axis=0))
    close(got.diagonal, (x**2).mean(axis=0))
    assert (got.hessian is not None) == hessian
    if hessian:
        close(got.hessian, x.T @ x / 134)
        assert torch.equal(got.hessian, got.hessian.T)
        assert torch.equal(got.diagonal, got.hessian.diagonal())
    assert got.second is (got.hessian if hessian else got.diagonal)
    present = [t for t in (got.mean_abs, got.diagonal, got.hessian) if t is not None]
    assert {t.dtype for t in present} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_cross_moment_pairs_each_token_with_its_twin(columns, dtype):
    batches = [inputs(n, columns, seed=n, dtype=dtype) for n in (40, 7)]
    twins = [inputs(n, columns, seed=n + 1, dtype=dtype) for n in (40, 7)]
    got = summed(batches, columns, twins=twins, cross=True)
    x, twin = (torch.cat(t).double().numpy() for t in (batches, twins))
    close(got.cross, x.T @ twin / 47)
    close(got.hessian, x.T @ x / 47)


def test_equal_twins_make_the_cross_moment_the_hessian():
    """So that error propagation changes nothing where nothing is wrong yet."""
    batches = [inputs(n, 300, seed=n) for n in (40, 7)]
    got = summed(batches, 300, twins=batches, cross=True)
    torch.testing.assert_close(got.cross, got.hessian, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [[134], [1] * 134, [100, 34]])
def test_how_tokens_are_batched_does_not_matter(cut):
    x = inputs(134, 33)
    whole = summed([x], 33)
    parts = summed(list(x.split(cut)), 33)
    torch.testing.assert_close(parts.hessian, whole.hessian, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.mean_abs, whole.mean_abs, rtol=1e-5, atol=1e-6)


def test_more_rows_than_are_widened_at_once_are_all_summed(monkeypatch):
    monkeypatch.setattr(devices, "ROWS_AT_ONCE", 50)
    monkeypatch.setattr(moments, "ROWS_AT_ONCE", 50)
    x, twin = inputs(134, 33, dtype=torch.bfloat16), inputs(134, 33, seed=1, dtype=torch.bfloat16)
    exact, other = x.double().numpy(), twin.double().numpy()
    full = summed([x], 33, twins=[twin], cross=True)
    close(full.hessian, exact.T @ exact / 134)
    close(full.cross, exact.T @ other / 134)
    close(full.mean_abs, np.abs(exact).mean(axis=0))
    close(summed([x], 33, hessian=False).diagonal, (exact**2).mean(axis=0))


@pytest.mark.parametrize("hessian", [True, False], ids=["hessian", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_are_not_modified(dtype, hessian):
    """They are the model's own activations: the forward pass goes on with them."""
    x, twin = inputs(20, 33, dtype=dtype), inputs(20, 33, seed=1, dtype=dtype)
    before = x.clone(), twin.clone()
    sums = MomentSums(33, CPU, hessian=hessian, cross=hessian)
    sums.add(x, twin if hessian else None)
    sums.result()
    assert torch.equal(x, before[0])
    assert torch.equal(twin, before[1])


def test_half_precision_squares_do_not_overflow():
    x = torch.full((10, 4), 60000.0, dtype=torch.float16)
    for hessian in (True, False):
        got = summed([x], 4, hessian=hessian)
        assert torch.isfinite(got.diagonal).all()
        assert got.diagonal[0] == pytest.approx(float(x[0, 0]) ** 2)
        assert got.mean_abs[0] == pytest.approx(float(x[0, 0]))


def test_sums_of_bfloat16_do_not_stop_growing():
    """A sum kept in bfloat16 would stand still at 256."""
    x = torch.ones(3000, 2, dtype=torch.bfloat16)
    got = summed([x], 2)
    assert got.mean_abs.tolist() == [1, 1]
    assert got.hessian.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_device_does_not_matter(dtype, device):
    x, twin = inputs(50, 300, dtype=dtype), inputs(50, 300, seed=1, dtype=dtype)
    here = summed([x], 300, twins=[twin], cross=True)
    sums = MomentSums(300, device, hessian=True, cross=True)
    sums.add(x.to(device), twin.to(device))
    there = sums.result()
    for name in ("mean_abs", "diagonal", "hessian", "cross"):
        expected = getattr(here, name)
        torch.testing.assert_close(getattr(there, name).cpu(), expected, rtol=1e-3, atol=1e-4)


def test_no_tokens_give_zeros():
    got = MomentSums(3, CPU, hessian=True, cross=True).result()
    assert got.tokens == 0
    assert got.hessian.tolist() == [[0] * 3] * 3
    assert got.mean_abs.tolist() == [0] * 3


def test_the_mean_magnitude_can_be_left_out():
    got = summed([inputs(5, 3)], 3, absolute=False)
    assert got.mean_abs.tolist() == [0, 0, 0]
    assert got.hessian is not None


def test_a_missing_twin_is_a_programming_error():
    sums = MomentSums(3, CPU, hessian=True, cross=True)
    with pytest.raises(TypeError, match="float model's inputs"):
        sums.add(inputs(5, 3))


def test_infinite_inputs_show_in_the_moments():
    x = inputs(5, 3)
    x[2, 1] = float("inf")
    for hessian in (True, False):
        assert not torch.isfinite(summed([x], 3, hessian=hessian).second).all()


def test_moments_are_frozen():
    with pytest.raises(AttributeError):
        Moments(1, torch.ones(1), torch.ones(1)).tokens = 2
