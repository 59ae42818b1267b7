"""Old importance matrices of any claimed size are refused without being read as a whole."""

import struct

import pytest
import torch
from builders.tiny_models import tiny_model

from qtool.errors import UsageError
from qtool.pipeline.calibrate import importance_for

ENTRY = struct.pack("<i", 1) + b"a" + struct.pack("<iif", 1, 1, 1.0)


@pytest.mark.parametrize(
    ("beginning", "n_bytes", "said"),
    [
        (struct.pack("<i", 1 << 20) + ENTRY, 1 << 30, "the name of entry 2 of 1048576 claims 0"),
        (struct.pack("<i", 2) + ENTRY, 20 << 30, "more than the 4294967296 qtool reads"),
        (
            struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 29),
            3 << 30,
            "'a' claims 536870912 values",
        ),
    ],
)
def test_a_matrix_of_gigabytes_is_refused_in_little_memory(
    server, tmp_path, beginning, n_bytes, said
):
    tiny_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    with (tmp_path / "old.dat").open("wb") as file:
        file.write(beginning)
        file.truncate(n_bytes)
    arguments = ("export", "model", "-f", "gguf:Q4_0", "-o", "x.gguf", "--statistics", "old.dat")
    ended = server.run(*arguments, cwd=tmp_path)
    assert ended.code == 6, ended.err
    assert "old.dat" in ended.message
    assert said in ended.message
    assert not ended.heavy
    assert ended.peak_bytes < 100e6


def test_a_matrix_without_a_usable_value_is_not_said_to_lack_the_tensor(tmp_path):
    name = b"blk.0.attn_q.weight"
    values = struct.pack("<64f", *[float("nan")] * 64)
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, 64) + values
    (tmp_path / "old.dat").write_bytes(struct.pack("<i", 1) + entry)
    with pytest.raises(UsageError, match=r"old\.dat has no usable value for 'blk\.0\.attn_q"):
        importance_for(tmp_path / "old.dat", {name.decode(): 64})
