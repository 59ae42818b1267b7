"""The factor of an inverse Hessian, against float64 inverses and in little memory."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders.command_line import ROOT

from qtool.errors import NumericalError
from qtool.methods import inverse_hessian as subject
from qtool.methods.inverse_hessian import invert


def hessian_of(columns, seed=0, tokens=None):
    """Mean x x^T over correlated inputs, some channels far larger than others."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * columns, columns, generator=draw, dtype=torch.float64)
    mixed = x + x @ torch.randn(columns, columns, generator=draw, dtype=torch.float64) / columns
    mixed *= torch.randn(columns, generator=draw, dtype=torch.float64).exp()
    return mixed.T @ mixed / len(x)


def damped(hessian, damping):
    exact = hessian.double().numpy().copy()
    exact[np.diag_indices(len(exact))] += damping * np.diag(exact).mean()
    return exact


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("columns", "panel"),
    [*itertools.product([1, 2, 3, 33, 64], [1, 7, 32, 256]), (257, 32), (257, 256), (600, 256)],
)
def test_the_factor_is_that_of_the_inverse_of_the_damped_hessian(
    columns, panel, act_order, monkeypatch
):
    monkeypatch.setattr(subject, "PANEL", panel)
    hessian = hessian_of(columns, seed=columns)
    found = invert(hessian, damp_percent=0.02, act_order=act_order)
    upper, order = found.factor, found.order.numpy()
    inverse = np.linalg.inv(damped(hessian, 0.02))[order][:, order]
    np.testing.assert_allclose((upper.T @ upper).numpy(), inverse, rtol=1e-9, atol=1e-11)
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    assert found.damp_percent == 0.02
    assert found.hessian is hessian
    if act_order:
        assert (hessian.diagonal()[found.order].diff() <= 0).all()


@pytest.mark.parametrize("columns", [300, 577])
def test_float32_is_as_near_as_inverting_first(columns):
    """The longer way is the usual one: invert by Cholesky, then factor the inverse."""
    hessian = hessian_of(columns, tokens=columns // 2).float()
    exact = np.linalg.cholesky(np.linalg.inv(damped(hessian, 0.01))).T
    square = torch.from_numpy(damped(hessian, 0.01)).float()
    longer = torch.cholesky_inverse(torch.linalg.cholesky(square))
    longer = torch.linalg.cholesky(longer, upper=True).double().numpy()
    found = invert(hessian, damp_percent=0.01).factor.double().numpy()
    assert np.linalg.norm(found - exact) < 1.2 * np.linalg.norm(longer - exact)
    assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)


def test_the_hessian_is_not_modified():
    hessian = hessian_of(40)
    hessian[3], hessian[:, 3] = 0, 0
    before = hessian.clone()
    for act_order in (False, True):
        invert(hessian, damp_percent=0.01, act_order=act_order)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_were_never_seen_disturb_no_others(act_order):
    hessian = hessian_of(40)
    for dead in (0, 7, 39):
        hessian[dead], hessian[:, dead] = 0, 0
    found = invert(hessian, damp_percent=0.01, act_order=act_order)
    place = {int(column): i for i, column in enumerate(found.order)}
    for dead in (0, 7, 39):
        row = found.factor[place[dead]].clone()
        column = found.factor[:, place[dead]].clone()
        row[place[dead]] = column[place[dead]] = 0
        assert not row.any()
        assert not column.any()
    assert torch.isfinite(found.factor).all()


def test_damping_is_raised_until_there_is_a_factor():
    hessian = hessian_of(24)
    hessian -= 0.15 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert np.linalg.eigvalsh(hessian.numpy()).min() < 0
    found = invert(hessian, damp_percent=0.02)
    assert found.damp_percent == pytest.approx(0.2)
    inverse = np.linalg.inv(damped(hessian, 0.2))
    np.testing.assert_allclose((found.factor.T @ found.factor).numpy(), inverse, rtol=1e-8)


@pytest.mark.parametrize("at", [0, 3, 299])
def test_a_panel_without_a_factor_is_noticed_wherever_it_lies(at):
    hessian = torch.eye(300)
    hessian[at, at] = -1e9
    with pytest.raises(NumericalError, match="not positive definite"):
        invert(hessian, damp_percent=0.0)


PEAK = """
import torch
from qtool.methods.inverse_hessian import invert

def resident(name):
    lines = dict(line.split(":") for line in open("/proc/self/status") if "kB" in line)
    return int(lines[name].split()[0]) * 1024

invert(torch.eye(512), damp_percent=0.01)  # what the first call loads
square = torch.full((3072, 3072), 0.5) + torch.eye(3072)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
invert(square, damp_percent=0.01, act_order=True)
print((resident("VmHWM") - before) / square.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
def test_it_takes_less_than_two_squares():
    completed = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert float(completed.stdout) < 2
