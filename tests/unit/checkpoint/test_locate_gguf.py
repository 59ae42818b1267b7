"""A GGUF file is found as a model where a command can read one, and refused where it cannot."""

import numpy as np
import pytest
import torch
from builders.gguf_containers import by_package, llama_weights, small

from qtool.checkpoint.locate import locate
from qtool.checkpoint.reader import TensorReader
from qtool.errors import DamagedError, UnsupportedError, UsageError

KIND = {"blk.0.attn_q.weight": "Q8_0", "blk.0.attn_k.weight": "BF16"}


def test_a_file_is_a_checkpoint(tmp_path):
    weights = llama_weights()
    path = by_package(tmp_path / "Tiny-Q8_0.gguf", weights, types=KIND)
    found = locate(str(path), gguf=True)
    assert (found.name, found.path, found.source) == ("Tiny-Q8_0", tmp_path, str(path))
    assert (found.config, found.extra_files, found.revision) == ({}, (), None)
    assert found.refs.keys() == weights.keys()
    assert found.refs["blk.0.attn_q.weight"].dtype == "Q8_0"
    assert found.gguf[0].metadata["general.name"].content == "Tiny"


def test_any_part_is_the_whole_checkpoint(tmp_path):
    weights = llama_weights()
    by_package(tmp_path / "Tiny.gguf", weights, split_max_tensors=7)
    found = locate(str(tmp_path / "Tiny-00002-of-00003.gguf"), gguf=True)
    assert (found.name, len(found.gguf)) == ("Tiny", 3)
    assert found.refs.keys() == weights.keys()
    assert len({ref.file for ref in found.refs.values()}) == 3


def test_parts_in_the_cache_of_the_hub_are_found_by_their_links(tmp_path):
    weights = llama_weights()
    blobs, snapshot = (tmp_path / "models--a--b" / name for name in ("blobs", "snapshots"))
    blobs.mkdir(parents=True)
    snapshot.mkdir()
    by_package(tmp_path / "Tiny.gguf", weights, split_max_tensors=7)
    for number, part in enumerate(sorted(tmp_path.glob("Tiny-*.gguf"))):
        part.rename(blobs / f"hash{number}")
        (snapshot / part.name).symlink_to(blobs / f"hash{number}")
    found = locate(str(snapshot / "Tiny-00001-of-00003.gguf"), gguf=True)
    assert (found.name, found.path) == ("Tiny", snapshot)
    assert found.refs.keys() == weights.keys()


def test_a_file_stored_under_its_hash_is_found_too(tmp_path):
    path = small().at(tmp_path / "sha256-0123")
    assert set(locate(str(path), gguf=True).refs) == {"a.weight", "b"}


@pytest.mark.parametrize("headers_only", [False, True])
def test_commands_that_need_a_directory_say_so(tmp_path, headers_only):
    path = small().at(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedError, match=r"x\.gguf is a GGUF file") as caught:
        locate(str(path), headers_only=headers_only)
    assert "safetensors directory" in caught.value.hint
    with pytest.raises(UnsupportedError, match=r"holds GGUF files \(x\.gguf\)") as caught:
        locate(str(tmp_path), gguf=True)
    assert "name the file" in caught.value.hint


def test_damage_is_told_as_damage(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(DamagedError, match="truncated"):
        locate(str(tmp_path / "x.gguf"), gguf=True)
    with pytest.raises(UsageError):
        locate(str(tmp_path / "absent.gguf"), gguf=True)


def test_tensors_are_read_as_those_of_a_directory(tmp_path):
    weights = llama_weights()
    path = by_package(tmp_path / "x.gguf", weights, types=KIND)
    found = locate(str(path), gguf=True)
    with TensorReader(found.refs) as reader:
        for name in ("output.weight", "blk.1.ffn_norm.weight"):
            np.testing.assert_array_equal(reader.read(name).numpy(), weights[name])
        name = "blk.0.attn_k.weight"
        assert torch.equal(reader.read(name), torch.tensor(weights[name]).bfloat16())
        with pytest.raises(UnsupportedError, match="Q8_0"):
            reader.read("blk.0.attn_q.weight")
        raw = b"".join(bytes(chunk) for chunk in reader.chunks("blk.0.attn_q.weight"))
    ref = found.refs["blk.0.attn_q.weight"]
    assert raw == path.read_bytes()[ref.start : ref.stop]


def test_a_file_cut_short_after_it_was_found_is_refused(tmp_path):
    path = by_package(tmp_path / "x.gguf", llama_weights())
    found = locate(str(path), gguf=True)
    last = max(found.refs.values(), key=lambda ref: ref.stop)
    with path.open("r+b") as file:
        file.truncate(last.start + 8)
    with TensorReader(found.refs) as reader, pytest.raises(DamagedError, match="cut short"):
        reader.read(last.name)
