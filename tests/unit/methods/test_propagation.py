"""The corrected target against least squares on explicit inputs."""

import numpy as np
import pytest
import torch

from qtool.methods.inverse_hessian import invert
from qtool.methods.propagation import corrected_target

TOKENS, ROWS, COLUMNS = 400, 7, 33


def inputs(seed=0, noise=0.2):
    """Weights [R, C], the float model's inputs [T, C], and those of a quantized one."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=draw, dtype=torch.float64)
    x = torch.randn(TOKENS, COLUMNS, generator=draw, dtype=torch.float64) @ mix
    bend = torch.randn(COLUMNS, COLUMNS, generator=draw, dtype=torch.float64)
    off = torch.randn(TOKENS, COLUMNS, generator=draw, dtype=torch.float64) + 0.1 * x @ bend
    weight = torch.randn(ROWS, COLUMNS, generator=draw, dtype=torch.float64)
    return weight, x, x + noise * off


def moments(x, seen):
    """Mean x~ x~^T and mean x~ x^T."""
    return seen.T @ seen / len(x), seen.T @ x / len(x)


def target(weight, x, seen, *, strength=1.0, damping=1e-12, act_order=True):
    hessian, cross = moments(x, seen)
    inverse = invert(hessian, damp_percent=damping, act_order=act_order)
    return corrected_target(weight, inverse, cross, strength=strength)


def test_the_full_correction_is_the_least_squares_solution():
    weight, x, seen = inputs()
    wanted = x.numpy() @ weight.numpy().T  # what the float model's layer gives
    solution = np.linalg.lstsq(seen.numpy(), wanted, rcond=None)[0].T
    np.testing.assert_allclose(target(weight, x, seen).numpy(), solution, rtol=1e-6, atol=1e-8)


def test_the_order_of_the_columns_does_not_matter():
    weight, x, seen = inputs(seed=2)
    turned, straight = (target(weight, x, seen, act_order=order) for order in (True, False))
    torch.testing.assert_close(turned, straight, rtol=1e-9, atol=1e-9)


def test_products_made_in_parts_are_the_whole(monkeypatch):
    weight, x, seen = inputs(seed=3)
    whole = target(weight, x, seen)
    monkeypatch.setattr("qtool.methods.propagation.AT_ONCE", 5)
    torch.testing.assert_close(target(weight, x, seen), whole, rtol=1e-9, atol=1e-9)


def test_damping_pulls_the_solution_towards_the_weight_as_ridge_regression_does():
    """min ||X~ W*^T - X W^T||^2 / T + lambda ||W* - W||^2, solved by stacking the two terms."""
    weight, x, seen = inputs(seed=1)
    hessian, _ = moments(x, seen)
    penalty = float(0.05 * hessian.diagonal().mean() * TOKENS) ** 0.5
    stacked = np.vstack([seen.numpy(), penalty * np.eye(COLUMNS)])
    wanted = np.vstack([x.numpy() @ weight.numpy().T, penalty * weight.numpy().T])
    solution = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    got = target(weight, x, seen, damping=0.05)
    np.testing.assert_allclose(got.numpy(), solution, rtol=1e-6, atol=1e-8)


def output_error(weight, other, x, seen):
    return (x @ weight.T - seen @ other.T).norm().item()


@pytest.mark.parametrize("seed", range(3))
def test_more_strength_is_nearer_to_the_float_output(seed):
    weight, x, seen = inputs(seed=seed)
    errors = [
        output_error(weight, target(weight, x, seen, strength=s), x, seen)
        for s in (0.0, 0.25, 0.5, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_strength_zero_leaves_the_weight():
    weight, x, seen = inputs()
    assert target(weight, x, seen, strength=0.0) is weight


def test_half_the_strength_goes_half_the_way():
    weight, x, seen = inputs()
    full = target(weight, x, seen) - weight
    half = target(weight, x, seen, strength=0.5) - weight
    torch.testing.assert_close(half, full / 2)


@pytest.mark.parametrize("damping", [1e-12, 0.05, 10.0])
def test_equal_inputs_leave_the_weight_unchanged_at_any_damping(damping):
    weight, x, _ = inputs()
    got = target(weight.float(), x.float(), x.float(), damping=damping)
    assert torch.equal(got, weight.float())


def test_float32_is_near_enough():
    weight, x, seen = inputs()
    exact = target(weight, x, seen, damping=0.05)
    got = target(weight.float(), x.float(), seen.float(), damping=0.05)
    torch.testing.assert_close(got, exact.float(), rtol=1e-3, atol=1e-3)


def test_inputs_never_seen_keep_their_weights():
    weight, x, seen = inputs()
    x, seen = x.clone(), seen.clone()
    x[:, 4], seen[:, 4] = 0, 0
    got = target(weight, x, seen, damping=0.01)
    assert torch.equal(got[:, 4], weight[:, 4])
    assert torch.isfinite(got).all()


def test_fewer_tokens_than_inputs_give_a_finite_target():
    weight, x, seen = inputs()
    got = target(weight.float(), x[:8].float(), seen[:8].float(), damping=0.05)
    assert torch.isfinite(got).all()
    assert (got - weight).norm() < weight.norm()


def test_inputs_are_not_modified():
    weight, x, seen = inputs()
    hessian, cross = moments(x, seen)
    tensors = (weight, hessian, cross)
    before = [tensor.clone() for tensor in tensors]
    corrected_target(weight, invert(hessian, damp_percent=0.05), cross, strength=0.7)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
