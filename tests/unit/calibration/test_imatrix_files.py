"""Importance matrices as others write them: old and new forms, experts, faults, and lies."""

import math
import random
import struct

import gguf
import numpy as np
import pytest
import torch

from qtool.calibration.legacy_imatrix import LegacyEntry, read_legacy
from qtool.calibration.merging import merged
from qtool.calibration.moments import Moments
from qtool.calibration.statistics_file import (
    ExpertMoments,
    Statistics,
    read_statistics,
    write_statistics,
)
from qtool.errors import DamagedError, UsageError
from qtool.pipeline.calibrate import importance_for

NAME = "blk.0.attn_q.weight"
OTHER = "blk.0.ffn_down.weight"


def means(columns, seed=0, matrices=None):
    shape = columns if matrices is None else (matrices, columns)
    return np.random.default_rng(seed).lognormal(size=shape).astype(np.float32)


# --- the form before GGUF ---------------------------------------------------------------------


def legacy(path, entries, chunks=7, dataset="wiki.raw", *, trailer=True):
    """Write what llama-imatrix wrote: entries are name -> (calls, mean x^2)."""
    out = bytearray(struct.pack("<i", len(entries)))
    for name, (calls, values) in entries.items():
        raw = name.encode()
        out += struct.pack("<i", len(raw)) + raw
        out += struct.pack("<ii", calls, len(values))
        out += (np.asarray(values, np.float32) * np.float32(calls)).astype("<f4").tobytes()
    if trailer:
        raw = dataset.encode()
        out += struct.pack("<ii", chunks, len(raw)) + raw
    path.write_bytes(out)
    return path


def test_the_old_form_is_recognised_by_its_content(tmp_path):
    expected = {NAME: (3, means(33)), OTHER: (3, means(100, 1))}
    path = legacy(tmp_path / "named.gguf", expected, dataset="/home/x/wiki.raw")
    got = read_statistics(path)
    assert set(got.moments) == {NAME, OTHER}
    for name, (_, values) in expected.items():
        np.testing.assert_allclose(got.moments[name].diagonal.numpy(), values, rtol=1e-6)
        np.testing.assert_allclose(got.moments[name].mean_abs.numpy(), values**0.5, rtol=1e-6)
        assert got.moments[name].tokens == 3 * 512
    assert got.windows == 7
    assert got.datasets == ("wiki.raw",)  # where somebody keeps a text is nobody's business
    assert got.warnings == ()


def test_the_end_of_the_old_form_may_be_absent(tmp_path):
    path = legacy(tmp_path / "imatrix.dat", {NAME: (2, means(8))}, trailer=False)
    got = read_statistics(path)
    assert (got.windows, got.datasets) == (0, ())


def test_old_values_without_calls_are_means_already(tmp_path):
    path = legacy(tmp_path / "imatrix.dat", {NAME: (1, means(8))})
    raw = bytearray(path.read_bytes())
    place = 8 + len(NAME)
    raw[place : place + 4] = struct.pack("<i", 0)
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_statistics(path).moments[NAME].diagonal.numpy(), means(8))
    assert read_legacy(path).entries[NAME].calls == 0
    assert isinstance(read_legacy(path).entries[NAME], LegacyEntry)


def test_experts_of_the_old_form_lie_end_to_end(tmp_path):
    values = means(8, matrices=4)
    name = "blk.0.ffn_down_exps.weight"
    path = legacy(tmp_path / "imatrix.dat", {name: (1, values.reshape(-1))})
    found, _ = importance_for(path, {name: (4, 8)})
    np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-6)
    with pytest.raises(UsageError, match="another size"):
        importance_for(path, {name: 8})


def test_an_old_file_cut_anywhere_but_before_its_end_is_refused(tmp_path):
    path = legacy(tmp_path / "imatrix.dat", {NAME: (3, means(9)), OTHER: (3, means(5))})
    content = path.read_bytes()
    end = len(content) - 8 - len("wiki.raw")
    for length in [x for x in range(len(content)) if x not in {end, end + 4}]:
        path.write_bytes(content[:length])
        with pytest.raises((DamagedError, UsageError)):
            read_statistics(path)
    for length in (end, end + 4, len(content)):
        path.write_bytes(content[:length])
        assert len(read_statistics(path).moments) == 2


def lying(**changes):
    """One entry whose fields claim what they like."""
    fields = {"entries": 1, "length": 4, "name": b"name", "calls": 1, "values": 2, **changes}
    head = struct.pack("<ii", fields["entries"], fields["length"]) + fields["name"]
    return head + struct.pack("<ii", fields["calls"], fields["values"]) + struct.pack("<ff", 1, 2)


@pytest.mark.parametrize(
    "content",
    [
        lying(entries=0),
        lying(entries=-1),
        lying(entries=2**31 - 1),
        lying(entries=2**20),
        lying(entries=2),
        lying(length=0),
        lying(length=-4),
        lying(length=2**31 - 1),
        lying(length=100),
        lying(name=b"na\x00e"),
        lying(name=b"\x1b[2J"),
        lying(name=b"\xff\xfe\xfd\xfc"),
        lying(values=0),
        lying(values=-2),
        lying(values=2**31 - 1),
        lying(values=3),
        lying() + struct.pack("<ii", 1, -1),
        lying() + struct.pack("<ii", 1, 2**31 - 1),
        lying() + b"\0",
        struct.pack("<i", 2) + 2 * lying()[4:],  # one name twice
    ],
)
def test_an_old_file_that_lies_is_refused(content, tmp_path):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(content)
    with pytest.raises((DamagedError, UsageError)) as caught:
        read_statistics(path)
    assert "imatrix.dat" in caught.value.message
    assert "\x1b" not in caught.value.message
    path.write_bytes(lying())  # the same bytes, telling the truth
    assert read_statistics(path).moments["name"].diagonal.tolist() == [1, 2]


def test_flipped_bytes_of_an_old_file_are_refused_or_read(tmp_path):
    path = legacy(tmp_path / "imatrix.dat", {NAME: (3, means(9)), OTHER: (3, means(5))})
    content = path.read_bytes()
    draw = random.Random(1)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] = draw.choice([0, 1, 127, 128, 255])
        path.write_bytes(damaged)
        try:
            found = read_statistics(path)
        except (DamagedError, UsageError):
            refused += 1
            continue
        assert all(bool(torch.isfinite(m.diagonal).all()) for m in found.moments.values())
    assert 20 < refused < 380


# --- the GGUF form ----------------------------------------------------------------------------


def new_form(path, tensors, *, required=True):
    """Write tensors as llama-imatrix does, with everything that llama-quantize insists on."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("imatrix")
    if required:
        writer.add_array("imatrix.datasets", ["/data/wiki.train.raw"])
        writer.add_uint32("imatrix.chunk_count", 4)
        writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_means_and_statistics_of_newer_builds_are_skipped(tmp_path):
    tensors = {
        f"{NAME}.in_sum2": means(33)[None] * 2048,
        f"{NAME}.in_sum": -means(33, 1)[None],
        f"{NAME}.counts": [[2048]],
        f"{NAME}.stats": [math.nan] * 12,
    }
    got = read_statistics(new_form(tmp_path / "imatrix.gguf", tensors))
    assert set(got.moments) == {NAME}
    np.testing.assert_allclose(got.moments[NAME].diagonal.numpy(), means(33), rtol=1e-6)
    assert (got.windows, got.sequence_length) == (4, 512)
    assert got.datasets == ("wiki.train.raw",)
    assert got.warnings == ()


def test_experts_have_counts_of_their_own_and_unseen_ones_count_alike(tmp_path):
    name, values = "blk.3.ffn_up_exps.weight", means(16, matrices=3)
    counts = np.array([[10], [0], [30]], np.float32)
    tensors = {f"{name}.in_sum2": values * counts, f"{name}.counts": counts}
    path = new_form(tmp_path / "imatrix.gguf", tensors)
    got = read_statistics(path)
    np.testing.assert_allclose(got.experts[name].diagonal[[0, 2]], values[[0, 2]], rtol=1e-6)
    assert got.experts[name].diagonal[1].tolist() == [1] * 16
    assert got.experts[name].counts.tolist() == [10, 0, 30]
    assert len(got.warnings) == 1
    assert "experts that read no text" in got.warnings[0]
    assert name in got.warnings[0]
    found, _ = importance_for(path, {name: (3, 16)})
    assert found[name].shape == (3, 16)


def faulty(tmp_path, spoil):
    """Read a file of two tensors, the first of them spoiled: (mean x^2 as read, statistics)."""
    sums = means(20) * 64
    spoil(sums)
    tensors = {f"{NAME}.in_sum2": sums[None], f"{NAME}.counts": [[64]]}
    tensors |= {f"{OTHER}.in_sum2": means(8)[None], f"{OTHER}.counts": [[1]]}
    got = read_statistics(new_form(tmp_path / "imatrix.gguf", tensors))
    assert OTHER in got.moments
    return got.moments.get(NAME), got


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1.0, 3e38])
def test_a_value_that_cannot_be_takes_the_mean_of_the_others(wrong, tmp_path):
    def spoil(sums):
        sums[[3, 11]] = wrong

    found, got = faulty(tmp_path, spoil)
    left = np.delete(means(20), [3, 11])
    np.testing.assert_allclose(np.delete(found.diagonal.numpy(), [3, 11]), left, rtol=1e-6)
    np.testing.assert_allclose(found.diagonal[[3, 11]].numpy(), left.mean(), rtol=1e-5)
    assert len(got.warnings) == 1
    assert NAME in got.warnings[0]
    assert OTHER not in got.warnings[0]


def test_zero_columns_stay_zero_and_are_told(tmp_path):
    def spoil(sums):
        sums[5] = 0

    found, got = faulty(tmp_path, spoil)
    assert found.diagonal[5] == 0
    assert found.diagonal[4] > 0
    assert "1 columns that are always zero" in got.warnings[0]


@pytest.mark.parametrize("wrong", [0.0, math.nan, -1.0])
def test_a_tensor_without_a_usable_column_is_as_good_as_missing(wrong, tmp_path):
    def spoil(sums):
        sums[:] = wrong

    found, got = faulty(tmp_path, spoil)
    assert found is None
    assert "nothing usable" in got.warnings[0]
    assert NAME in got.warnings[0]


@pytest.mark.parametrize("count", [0.0, math.nan, math.inf, -5.0])
def test_a_linear_without_tokens_is_as_good_as_missing(count, tmp_path):
    tensors = {f"{NAME}.in_sum2": means(8)[None], f"{NAME}.counts": [[count]]}
    got = read_statistics(new_form(tmp_path / "imatrix.gguf", tensors))
    assert got.moments == {}
    assert "nothing usable" in got.warnings[0]


def test_hundreds_of_faults_are_one_line(tmp_path):
    tensors = {}
    for block in range(200):
        name = f"blk.{block}.attn_q.weight"
        tensors |= {f"{name}.in_sum2": [[1, math.nan]], f"{name}.counts": [[1]]}
    got = read_statistics(new_form(tmp_path / "imatrix.gguf", tensors))
    assert len(got.warnings) == 1
    assert "and 197 more" in got.warnings[0]
    assert len(got.warnings[0]) < 400


# --- what llama-quantize makes of a file of ours ------------------------------------------------


def as_llama_quantize_reads(path):
    """Name -> mean x^2, by the rules of common_imatrix_load and load_imatrix of b11549."""
    reader = gguf.GGUFReader(path)
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        assert key in reader.fields
    types = reader.fields["imatrix.datasets"].types
    assert types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
    for key in ("imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.fields[key].types == [gguf.GGUFValueType.UINT32]
    sums, counts = {}, {}
    for tensor in reader.tensors:
        assert len(tensor.name) < 64  # GGML_MAX_NAME, with its zero
        for suffix, place in ((".in_sum2", sums), (".counts", counts)):
            if tensor.name.endswith(suffix):
                assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
                place[tensor.name.removesuffix(suffix)] = np.array(tensor.data).reshape(-1)
    assert set(sums) == set(counts)
    found = {}
    for name, values in sums.items():
        columns = len(values) // len(counts[name])
        found[name] = np.ones_like(values)
        for matrix, count in enumerate(counts[name]):
            if (tokens := math.floor(float(count) + 0.5)) > 0:
                part = slice(matrix * columns, (matrix + 1) * columns)
                found[name][part] = values[part] / np.float32(tokens)
    return found


def ours(tokens=1000, seed=0):
    dense = {
        name: Moments(
            tokens, torch.from_numpy(means(n, seed + 5)), torch.from_numpy(means(n, seed))
        )
        for name, n in ((NAME, 33), (OTHER, 100), ("output.weight", 7))
    }
    counts = torch.tensor([5.0, 0.0, float(tokens)])
    diagonal = torch.from_numpy(means(12, seed, matrices=3))
    diagonal[1] = 1
    experts = {"blk.1.ffn_up_exps.weight": ExpertMoments(counts, diagonal)}
    return Statistics(dense, ("builtin",), 4, 250, experts)


def test_a_file_of_ours_gives_llama_quantize_the_same_means(tmp_path):
    path = tmp_path / "stats.gguf"
    write_statistics(path, ours(), "llama")
    read = as_llama_quantize_reads(path)
    expected = {name: m.diagonal for name, m in ours().moments.items()}
    expected |= {name: m.diagonal for name, m in ours().experts.items()}
    assert set(read) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(read[name], values.reshape(-1).numpy(), rtol=1e-6)


def test_a_file_of_ours_is_whole_for_llama_quantize_even_without_the_name_of_a_text(tmp_path):
    path = tmp_path / "stats.gguf"
    write_statistics(path, Statistics({NAME: ours().moments[NAME]}, (), 0, 0), "llama")
    assert set(as_llama_quantize_reads(path)) == {NAME}


# --- merging ------------------------------------------------------------------------------------


def test_merging_counts_every_token_once():
    one, other = ours(1000), ours(3000, seed=9)
    both = merged(one, other)
    for name, found in both.moments.items():
        a, b = one.moments[name], other.moments[name]
        assert found.tokens == 4000
        expected = 0.25 * a.diagonal + 0.75 * b.diagonal
        torch.testing.assert_close(found.diagonal, expected, rtol=1e-6, atol=0)
        expected = 0.25 * a.mean_abs + 0.75 * b.mean_abs
        torch.testing.assert_close(found.mean_abs, expected, rtol=1e-6, atol=0)
    name = "blk.1.ffn_up_exps.weight"
    found, a, b = both.experts[name], one.experts[name], other.experts[name]
    assert found.counts.tolist() == [10, 0, 4000]
    torch.testing.assert_close(found.diagonal[0], (a.diagonal[0] + b.diagonal[0]) / 2)
    assert found.diagonal[1].tolist() == [1] * 12
    assert (both.windows, both.sequence_length) == (8, 250)


def test_merging_keeps_what_only_one_knows_and_counts_windows_in_one_length():
    one = Statistics({NAME: ours().moments[NAME]}, ("builtin",), 4, 250)
    other = Statistics({OTHER: ours().moments[OTHER]}, ("notes.txt", "builtin"), 3, 100)
    both = merged(one, other)
    assert set(both.moments) == {NAME, OTHER}
    assert both.datasets == ("builtin", "notes.txt")
    assert (both.windows, both.sequence_length) == (6, 250)  # 1300 tokens


def test_statistics_of_different_models_do_not_merge():
    one = Statistics({NAME: Moments(1, torch.ones(8), torch.ones(8))}, (), 1, 1)
    other = Statistics({NAME: Moments(1, torch.ones(9), torch.ones(9))}, (), 1, 1)
    with pytest.raises(UsageError, match=r"size of 'blk\.0\.attn_q\.weight'"):
        merged(one, other)
    experts = Statistics({}, (), 1, 1, {NAME: ExpertMoments(torch.ones(2), torch.ones(2, 8))})
    for pair in ((one, experts), (experts, one)):
        with pytest.raises(UsageError, match="differ in the size"):
            merged(*pair)
