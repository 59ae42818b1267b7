"""A disk that fills up is said so, and nothing that was there before is touched."""

import subprocess
import sys
from pathlib import Path

import pytest

from qtool.checkpoint.shards import ShardWriter, StoredTensor, plan_shards
from qtool.errors import DamagedError

ROOT = Path(__file__).parents[2]


def test_a_full_disk_does_not_fit(tmp_path):
    """A limit on the file size stands in for the disk: the kernel answers the same way."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from qtool.checkpoint.shards import ShardWriter, StoredTensor, plan_shards\n"
        "from qtool.errors import QtoolError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "plan = plan_shards([StoredTensor('a', 'U8', (20_000,))])\n"
        f"try: ShardWriter(plan, Path({str(tmp_path)!r}))\n"
        "except QtoolError as error: print(error.message); sys.exit(error.exit_code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 4, result.stderr
    assert "model.safetensors" in result.stdout


def test_a_writer_never_replaces_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("somebody else's")
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        ShardWriter(plan_shards([StoredTensor("a", "U8", (2,))]), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "somebody else's"
