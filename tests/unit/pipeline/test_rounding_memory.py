"""Rounding a tap takes what the estimate says: nothing of its size is kept that is done with."""

import subprocess
import sys

import pytest
from builders.command_line import ROOT

from qtool.pipeline.quantize_memory import _rounding
from qtool.pipeline.run_sizes import Run, Tap

COLUMNS, ROWS = 1024, 8192
# Rounds two linears that read one input and prints by how much the resident set rose meanwhile.
TAP = """
import sys
from types import SimpleNamespace
import torch
from qtool.calibration.moments import Moments
from qtool.grids.ggml import GgmlGrid
from qtool.grids.integer import IntegerGrid
from qtool.methods import descent, gptq  # what the first call would load
from qtool.methods.protocol import ROUNDINGS, RoundingOptions
from qtool.pipeline.rounding import round_tap

def resident(name):
    lines = dict(line.split(":") for line in open("/proc/self/status") if "kB" in line)
    return int(lines[name].split()[0]) * 1024

class Linear(SimpleNamespace):
    __hash__ = object.__hash__

rounding, kind, columns, rows = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
grid = GgmlGrid(kind) if kind.startswith("Q") else IntegerGrid(bits=4, symmetric=False, search=True)
draw = torch.Generator().manual_seed(0)
inputs = torch.randn(512, columns, generator=draw) * torch.randn(columns, generator=draw).exp()
others = inputs + 0.05 * torch.randn(512, columns, generator=draw)
hessian, cross = inputs.T @ inputs / 512, inputs.T @ others / 512
moments = Moments(512, inputs.abs().mean(0), hessian.diagonal().clone(), hessian, cross)
linears = [Linear(path=n, name=n, shape=(rows // 2, columns), grid=grid) for n in ("gate", "up")]
weights = {x.path: torch.randn(x.shape, generator=draw).mul_(0.02).bfloat16() for x in linears}
recipe = SimpleNamespace(quantize=SimpleNamespace(error_propagation=1.0))
plan = SimpleNamespace(
    rounding=ROUNDINGS[rounding], options=RoundingOptions(sweeps=2), recipe=recipe
)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
round_tap(plan, linears, weights, moments, torch.device("cpu"))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
@pytest.mark.parametrize(
    ("method", "grid"), [("gptq", "int4"), ("gptq", "Q4_K"), ("awq", "int4"), ("awq", "Q6_K")]
)
def test_the_peak_of_a_tap_is_the_estimates(method, grid):
    rounding = {"gptq": "gptq", "awq": "rtn"}[method]
    completed = subprocess.run(
        [sys.executable, "-c", TAP, rounding, grid, str(COLUMNS), str(ROWS)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    said = _rounding(Tap(COLUMNS, (ROWS // 2, ROWS // 2)), Run(method))
    # Half of the weights more: moving the scales of a super-block takes six times 256 columns, a
    # large part of so few, and the libraries have buffers of their own.
    assert int(completed.stdout) < said.size.high + 4 * COLUMNS * ROWS // 2
