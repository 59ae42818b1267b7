"""What the writer lays out and fills in is what the safetensors library loads."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool.checkpoint.header import checkpoint_refs, read_header
from qtool.checkpoint.reader import DTYPE_NAMES, TORCH_DTYPES, TensorReader
from qtool.checkpoint.shards import ShardWriter, StoredTensor, plan_shards


def stored(tensors):
    return [StoredTensor(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]


def some_tensors():
    generator = torch.Generator().manual_seed(1)
    return {
        "model.embed.weight": torch.randn(100, 33, generator=generator).bfloat16(),
        "one byte": torch.tensor([7], dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "packed": torch.randint(-(2**31), 2**31 - 1, (72, 18), dtype=torch.int32),
        "empty": torch.empty(0, 3),
        'name with \N{GREEK SMALL LETTER MU} and "quotes"': torch.arange(9, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "scale": torch.randn(576, generator=generator).half(),
    }


def write(tensors, directory, max_shard_bytes):
    plan = plan_shards(stored(tensors), max_shard_bytes)
    with ShardWriter(plan, directory) as writer:
        for name in reversed(tensors):  # in any order
            writer.write(name, tensors[name])
    return plan, writer


@pytest.mark.parametrize("max_shard_bytes", [10**9, 8000, 4000, 1])
def test_the_library_loads_what_was_written(tmp_path, max_shard_bytes):
    tensors = some_tensors()
    plan, _ = write(tensors, tmp_path, max_shard_bytes)
    loaded = {}
    for shard in plan.shards:
        path = tmp_path / shard.file
        assert path.stat().st_size == shard.n_bytes
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        loaded |= load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert set(checkpoint_refs(tmp_path)) == set(tensors)


def test_one_file_has_the_plain_name_and_no_index(tmp_path):
    plan, _ = write(some_tensors(), tmp_path, 10**9)
    assert plan.index is None
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_files_are_numbered_and_indexed(tmp_path):
    plan, _ = write(some_tensors(), tmp_path, 8000)
    count = len(plan.shards)
    assert count > 1
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [shard.file for shard in plan.shards] == names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {n: p.file for n, p in plan.places.items()}
    total = sum(t.numel() * t.element_size() for t in some_tensors().values())
    assert index["metadata"]["total_size"] == total
    assert plan.n_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=30),
    limit=st.integers(1, 6000),
)
def test_shards_keep_order_and_limit(sizes, limit):
    tensors = [StoredTensor(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    plan = plan_shards(tensors, limit)
    assert list(plan.places) == [tensor.name for tensor in tensors]
    files = [place.file for place in plan.places.values()]
    assert files == sorted(files)
    for shard in plan.shards:
        assert len(shard.header) % 8 == 0
        assert shard.n_bytes <= limit or files.count(shard.file) == 1


def test_the_plan_places_each_tensor_where_the_header_says(tmp_path):
    plan, _ = write(some_tensors(), tmp_path, 8000)
    for shard in plan.shards:
        for ref in read_header(tmp_path / shard.file):
            place = plan.places[ref.name]
            assert (place.file, place.start, place.stop) == (shard.file, ref.start, ref.stop)


def test_bytes_are_copied_from_another_file(tmp_path):
    source = tmp_path / "source.safetensors"
    tensors = some_tensors()
    save_file(tensors, source)
    out = tmp_path / "out"
    out.mkdir()
    plan = plan_shards(stored({f"new.{name}": tensor for name, tensor in tensors.items()}))
    with ShardWriter(plan, out) as writer:
        for ref in read_header(source):
            writer.write_from(ref, f"new.{ref.name}")
    loaded = load_file(out / "model.safetensors")
    assert all(torch.equal(loaded[f"new.{name}"], tensor) for name, tensor in tensors.items())


def test_float8_scales_are_written_too(tmp_path):
    tensor = torch.arange(1, 9, dtype=torch.uint8).view(TORCH_DTYPES["F8_E8M0"])
    write({"x": tensor}, tmp_path, 10**9)
    with TensorReader(checkpoint_refs(tmp_path)) as reader:
        assert torch.equal(reader.read("x").view(torch.uint8), tensor.view(torch.uint8))


def test_a_view_is_written_as_it_looks(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    write({"x": tensor}, tmp_path, 10**9)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], tensor)


def test_digests_are_those_of_the_files(tmp_path):
    plan, writer = write(some_tensors(), tmp_path, 8000)
    assert writer.digests() == {
        shard.file: hashlib.sha256((tmp_path / shard.file).read_bytes()).hexdigest()
        for shard in plan.shards
    }


def test_nothing_is_written_twice_or_forgotten(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.ones(2)}
    writer = ShardWriter(plan_shards(stored(tensors)), tmp_path)
    writer.write("a", tensors["a"])
    with pytest.raises(RuntimeError, match="'a' was written before"):
        writer.write("a", tensors["a"])
    assert writer.tensors.missing == {"b"}
    with pytest.raises(RuntimeError, match="never written: b"):
        writer.close()


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(3).half(), torch.ones(1, 3)])
def test_what_was_not_planned_is_not_written(tmp_path, wrong):
    writer = ShardWriter(plan_shards(stored({"a": torch.ones(3)})), tmp_path)
    with pytest.raises(RuntimeError, match="planned"):
        writer.write("a", wrong)
    with pytest.raises(RuntimeError, match="planned None"):
        writer.write("b", torch.ones(3))


def test_names_must_differ():
    with pytest.raises(ValueError, match="distinct"):
        plan_shards([StoredTensor("a", "U8", (1,)), StoredTensor("a", "U8", (2,))])
