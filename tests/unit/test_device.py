"""What is said of memory is this program's own."""

import os
import subprocess
import sys

import pytest
from builders.command_line import ROOT

LARGE = 1 << 30
# Holds much, and then becomes another program, as a shell or a test runner that starts one does.
BECOMES = f"""
import os, sys
held = bytearray({LARGE})
held[::4096] = b"x" * len(held[::4096])
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
TELLS = """
import torch
from qtool.device import peak_memory
print(peak_memory(torch.device("cpu"))[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a program's own peak")
def test_the_peak_of_what_a_process_was_before_is_not_counted():
    done = subprocess.run(
        [sys.executable, "-c", BECOMES, TELLS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 50 << 20 < int(done.stdout) < LARGE
