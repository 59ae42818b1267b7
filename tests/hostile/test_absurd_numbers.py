"""Numbers of any length on the command line are refused, or mean what they say."""

import pytest
import torch
from builders.refusals import snapshot
from builders.tiny_models import tiny_model

DIGITS = "9" * 400
LINES = {
    "an output": ("quantize", "model", "-m", "rtn", "-g", "32", "-o", DIGITS),
    "a file of statistics": ("calibrate", "model", "-o", f"{DIGITS}.gguf"),
    "windows": ("calibrate", "model", "-o", "out.gguf", "-n", DIGITS),
    "a window": ("calibrate", "model", "-o", "out.gguf", "-l", DIGITS),
    "a window to evaluate": ("eval", "model", f"--ctx={DIGITS}"),
    "windows to evaluate": ("eval", "model", "-n", DIGITS),
    "memory of a GPU": ("estimate-memory", "model", f"--gpu={DIGITS}GB"),
    "memory": ("quantize", "model", "-m", "rtn", "-g", "32", "-o", "out", f"--max-ram={DIGITS}GB"),
    "a part of a file": (
        *("export", "model", "-f", "gguf:Q8_0", "-o", "out.gguf"),
        f"--split-max-size={DIGITS}",
    ),
    "a window of a recipe": (
        *("quantize", "model", "-m", "rtn", "-o", "out", "--set"),
        f"calibration.sequence_length={DIGITS}",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_an_endless_number_is_refused(server, tmp_path, name):
    tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    before = snapshot(tmp_path)
    ended = server.run(*LINES[name], cwd=tmp_path)
    assert ended.code == 2, ended.err
    assert "999" in ended.message or "less than" in ended.message
    assert snapshot(tmp_path) == before


def test_statistics_are_not_written_into_the_model(server, tmp_path):
    tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    before = snapshot(tmp_path)
    ended = server.run("calibrate", "model", "-o", "model/out.gguf", cwd=tmp_path)
    assert ended.code == 2, ended.err
    assert "inside the input" in ended.message
    assert snapshot(tmp_path) == before
