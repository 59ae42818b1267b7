"""The fuzzing harness of the GGUF pre-check runs and finds nothing in a few seconds."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("fuzz_gguf_header.py")
# Linux lets a process begin with the peak of the one it was forked from, and libFuzzer reads that
# peak: started from a test process that has loaded torch, it would be over its limit at once.
FROM_A_SMALL_PARENT = ["sh", "-c", '"$@"; exit $?', "sh"]


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: pip install atheris (it has wheels for Linux on x86-64)",
)
def test_a_short_run_finds_nothing(tmp_path):
    command = [*FROM_A_SMALL_PARENT, sys.executable, str(HARNESS), str(tmp_path / "corpus")]
    limits = ["-max_total_time=5", "-timeout=5", "-rss_limit_mb=1024", "-max_len=8192"]
    done = subprocess.run(
        [*command, *limits], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done" in done.stderr
    assert not list(tmp_path.glob("crash-*"))
