"""GGUF files as qtool writes them: read by the gguf package and run by llama.cpp."""

import fcntl
import hashlib
import itertools
import struct
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
from builders.gguf_containers import LLAMA, by_package, llama_weights

from qtool.checkpoint import gguf_writer
from qtool.checkpoint.gguf_file import GgufTensor, plan_gguf
from qtool.checkpoint.gguf_header import read_gguf
from qtool.checkpoint.gguf_split import read_gguf_split
from qtool.checkpoint.gguf_values import Value, f32, flag, many, text, u32
from qtool.checkpoint.gguf_writer import GgufWriter
from qtool.errors import CapacityError, DamagedError, UsageError

N = LLAMA["vocabulary"]
METADATA = {
    "general.architecture": text("llama"),
    "general.name": text("Tiny"),
    "llama.block_count": u32(LLAMA["layers"]),
    "llama.context_length": u32(64),
    "llama.embedding_length": u32(LLAMA["hidden"]),
    "llama.feed_forward_length": u32(LLAMA["inner"]),
    "llama.attention.head_count": u32(4),
    "llama.attention.head_count_kv": u32(2),
    "llama.attention.layer_norm_rms_epsilon": f32(2.0**-17),  # exact in 32 bits
    "llama.rope.dimension_count": u32(16),
    "tokenizer.ggml.model": text("llama"),
    "tokenizer.ggml.tokens": many("string", ["<unk>", "<s>", "</s>", *map(str, range(3, N))]),
    "tokenizer.ggml.scores": many("f32", [0.0] * N),
    "tokenizer.ggml.token_type": many("i32", [2, 3, 3] + [1] * (N - 3)),
    "tokenizer.ggml.add_bos_token": flag(True),
}
ODD = (
    GgufTensor("a", "F32", (3, 5)),
    GgufTensor("b", "Q8_0", (7, 32)),
    GgufTensor("c", "F16", (1,)),
)


def bytes_of(tensor, seed=0):
    return np.random.default_rng([seed, len(tensor.name)]).bytes(tensor.n_bytes)


def write_all(plan, directory, **settings):
    with GgufWriter(plan, directory, **settings) as writer:
        for tensor in reversed(plan.tensors.values()):  # in any order
            writer.write(tensor.name, [bytes_of(tensor)])
    return writer


def llama_plan(weights, types, **settings):
    tensors = [GgufTensor(name, types.get(name, "F32"), w.shape) for name, w in weights.items()]
    return plan_gguf(METADATA, tensors, file="tiny.gguf", **settings)


def packed(values, kind):
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


def test_the_plan_knows_every_byte_before_one_is_written(tmp_path):
    plan = plan_gguf(METADATA, ODD, file="odd.gguf")
    write_all(plan, tmp_path)
    (file,) = plan.files
    content = (tmp_path / "odd.gguf").read_bytes()
    assert len(content) == file.n_bytes == plan.n_bytes
    assert content.startswith(file.header)
    covered = len(file.header)
    for tensor in ODD:
        place = plan.places[tensor.name]
        assert (place.file, place.start % 32) == ("odd.gguf", 0)
        assert content[place.start : place.stop] == bytes_of(tensor)
        assert not any(content[covered : place.start])
        covered = place.stop
    assert not any(content[covered:])
    assert len(content) % 32 == 0
    assert plan.tensor_bytes == 60 + 7 * 34 + 2


@pytest.mark.parametrize("alignment", [None, 32, 8, 256])
def test_what_is_written_reads_back_here_and_in_the_package(tmp_path, alignment):
    metadata = METADATA | {
        "k.u8": Value("u8", 255),
        "k.i8": Value("i8", -1),
        "k.u16": Value("u16", 65535),
        "k.i16": Value("i16", -2),
        "k.i32": Value("i32", -3),
        "k.u64": Value("u64", 2**64 - 1),
        "k.i64": Value("i64", -(2**63)),
        "k.f64": Value("f64", 0.1),
        "k.nothing": many("string", []),
        "k.flags": many("bool", [True, False]),
        "k.bytes": many("string", [b"\xf0\x9f".decode("utf-8", "surrogateescape"), "✓"]),
        "k.half": f32(0.5),
    }
    if alignment is not None:
        metadata["general.alignment"] = u32(alignment)
    plan = plan_gguf(metadata, ODD, file="odd.gguf")
    write_all(plan, tmp_path)
    ours = read_gguf(tmp_path / "odd.gguf")
    if alignment == 32:
        del metadata["general.alignment"]
    assert ours.metadata == metadata
    assert list(ours.metadata) == list(metadata)
    assert {ref.name: (ref.start, ref.stop) for ref in ours.tensors} == {
        name: (place.start, place.stop) for name, place in plan.places.items()
    }
    theirs = gguf.GGUFReader(tmp_path / "odd.gguf")
    names = [name for name in theirs.fields if not name.startswith("GGUF.")]
    assert names == list(metadata)
    assert theirs.fields["k.i64"].contents() == -(2**63)
    for one, tensor in zip(theirs.tensors, ODD, strict=True):
        assert one.data.tobytes() == bytes_of(tensor)
        assert one.tensor_type.name == tensor.kind


def test_the_package_writes_the_same_bytes(tmp_path):
    weights = {"b.weight": llama_weights()["output.weight"], "a": np.ones(3, np.float32)}
    keys = [("add_name", "Tiny"), ("add_array", "k", ["x", "y"]), ("add_float32", "f", 0.1)]
    by_package(tmp_path / "theirs.gguf", weights, keys, types={"b.weight": "Q8_0"})
    metadata = {
        "general.architecture": text("llama"),
        "general.name": text("Tiny"),
        "k": many("string", ["x", "y"]),
        "f": f32(0.1),
    }
    tensors = [GgufTensor("b.weight", "Q8_0", weights["b.weight"].shape)]
    tensors += [GgufTensor("a", "F32", (3,))]
    plan = plan_gguf(metadata, tensors, file="ours.gguf")
    with GgufWriter(plan, tmp_path) as writer:
        writer.write("b.weight", [packed(weights["b.weight"], "Q8_0")])
        writer.write("a", [weights["a"]])
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_llama_cpp_runs_what_is_written_whole_and_in_parts(tmp_path):
    from oracles import llama_cpp as oracle

    weights = llama_weights()
    types = {f"blk.{i}.{name}.weight": "Q8_0" for i in (0, 1) for name in ("attn_q", "ffn_up")}
    types["blk.0.attn_k.weight"] = "F16"
    stored = {n: packed(w, types[n]) if n in types else w for n, w in weights.items()}
    theirs = by_package(tmp_path / "theirs.gguf", weights, types=types)
    ids = [1, 5, 30, 7, 7, 12]
    answers = []
    for limit in (None, 100_000, 20_000):
        directory = tmp_path / str(limit)
        directory.mkdir()
        plan = llama_plan(weights, types, max_bytes=limit)
        with GgufWriter(plan, directory) as writer:
            for name, values in stored.items():
                writer.write(name, [values])
        assert (len(plan.files) > 1) == (limit is not None)
        model = oracle.Model(directory / plan.files[0].file, n_ctx=64)
        answers.append(model.logits(ids))
        model.close()
    model = oracle.Model(theirs, n_ctx=64)
    expected = model.logits(ids)
    model.close()
    assert np.ptp(expected) > 1
    for answer in answers:
        np.testing.assert_array_equal(answer, expected)


def test_parts_are_no_larger_than_asked_and_keep_every_tensor_whole(tmp_path):
    weights = llama_weights()
    limit = 30_000
    plan = llama_plan(weights, {}, max_bytes=limit)
    write_all(plan, tmp_path)
    found = read_gguf_split(tmp_path / plan.files[3].file)
    assert [one.path.name for one in found] == [file.file for file in plan.files]
    assert [ref.name for one in found for ref in one.tensors] == list(weights)
    for one, file in zip(found, plan.files, strict=True):
        assert one.file_bytes == file.n_bytes
        assert one.file_bytes <= limit
    first, second = found[0].metadata, found[1].metadata
    assert {k: v for k, v in first.items() if not k.startswith("split.")} == METADATA
    assert second == {
        "split.no": Value("u16", 1),
        "split.count": Value("u16", len(found)),
        "split.tensors.count": Value("i32", len(weights)),
    }
    # As many as fit: the first tensor of a part would not have fitted into the one before.
    for before, after in itertools.pairwise(found):
        assert before.file_bytes + after.tensors[0].n_bytes > limit


def test_a_tensor_larger_than_a_file_gets_its_own(tmp_path):
    tensors = [GgufTensor("s", "F32", (4,)), GgufTensor("l", "F32", (64, 64))]
    plan = plan_gguf({}, [*tensors, GgufTensor("e", "F32", (4,))], file="x.gguf", max_bytes=1000)
    assert len(plan.files) == 3
    assert plan.places["l"].file == "x-00002-of-00003.gguf"
    too_many = [GgufTensor(f"t{i}", "F32", (1,)) for i in range(65536)]
    with pytest.raises(UsageError, match="65535"):
        plan_gguf({}, too_many, file="x.gguf", max_bytes=1)


def test_parts_of_another_alignment_say_so(tmp_path):
    metadata = {"general.alignment": u32(64)}
    plan = plan_gguf(metadata, ODD, file="x.gguf", max_bytes=200)
    write_all(plan, tmp_path)
    found = read_gguf_split(tmp_path / plan.files[0].file)
    assert [one.alignment for one in found] == [64, 64, 64]
    assert all(gguf.GGUFReader(one.path).tensors for one in found)


def test_pieces_of_any_size_make_a_tensor(tmp_path):
    plan = plan_gguf({}, ODD, file="x.gguf")
    content = {tensor.name: bytes_of(tensor) for tensor in ODD}
    with GgufWriter(plan, tmp_path) as writer:
        assert writer.tensors.missing == {"a", "b", "c"}
        writer.write("b", (content["b"][i : i + 11] for i in range(0, 238, 11)))
        assert writer.tensors.missing == {"a", "c"}
        writer.write("a", [b"", memoryview(content["a"]), np.empty((0, 4), np.uint8)])
        writer.write("c", [np.frombuffer(content["c"], np.float16)])
    places = plan.places
    raw = (tmp_path / "x.gguf").read_bytes()
    assert {name: raw[p.start : p.stop] for name, p in places.items()} == content
    assert writer.digests() == {"x.gguf": hashlib.sha256(raw).hexdigest()}


def test_bugs_of_the_caller_are_told(tmp_path):
    plan = plan_gguf({}, ODD, file="x.gguf")
    writer = GgufWriter(plan, tmp_path)
    good = bytes_of(ODD[0])
    for name, chunks, expected in (
        ("z", [good], "not planned"),
        ("a", [good, b"x"], "more than 60"),
        ("a", [good[:-1]], "1 bytes early"),
    ):
        with pytest.raises(RuntimeError, match=expected):
            writer.write(name, chunks)
    writer.write("a", [good])
    with pytest.raises(RuntimeError, match="written before"):
        writer.write("a", [good])
    with pytest.raises(RuntimeError, match="never written: b, c"):
        writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "metadata", "file"),
    [
        ([ODD[0], ODD[0]], {}, "x.gguf"),
        ([GgufTensor("a", "Q8_0", (2, 33))], {}, "x.gguf"),
        ([GgufTensor("a" * 64, "F32", (2,))], {}, "x.gguf"),
        ([GgufTensor("", "F32", (2,))], {}, "x.gguf"),
        ([GgufTensor("a", "F32", ())], {}, "x.gguf"),
        ([GgufTensor("a", "F32", (1,) * 5)], {}, "x.gguf"),
        ([GgufTensor("a", "F32", (0, 2))], {}, "x.gguf"),
        ([], {"": u32(1)}, "x.gguf"),
        ([], {"k": u32(-1)}, "x.gguf"),
        ([], {"k": f32(1e300)}, "x.gguf"),
        ([], {"k": Value("array", 1)}, "x.gguf"),
        ([], {"general.alignment": u32(24)}, "x.gguf"),
        ([], {}, "x.bin"),
        ([], {}, "a/x.gguf"),
        ([], {}, ".gguf"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tensors, metadata, file):
    with pytest.raises(ValueError, match=r"."):
        plan_gguf(metadata, tensors, file=file)


def test_half_a_character_in_the_metadata_is_damage_of_the_source():
    with pytest.raises(DamagedError, match=r"'tokenizer.chat_template' is not Unicode"):
        plan_gguf({"tokenizer.chat_template": text("ab\ud800")}, [], file="x.gguf")


def test_long_metadata_takes_room_in_the_first_part_only():
    metadata = {"tokenizer.chat_template": text("x" * 50_000)}
    tensors = [GgufTensor(f"t{i}", "F32", (1280,)) for i in range(12)]
    plan = plan_gguf(metadata, tensors, file="x.gguf", max_bytes=60_000)
    in_parts = Counter(place.file for place in plan.places.values())
    assert list(in_parts.values()) == [1, 11]
    assert max(file.n_bytes for file in plan.files) <= 60_000


def test_the_first_part_appears_when_the_others_are_there(tmp_path, monkeypatch):
    plan = plan_gguf({}, ODD, file="x.gguf", max_bytes=500)
    order = []
    replace = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, target: order.append(target.name) or replace(self, target)
    )
    write_all(plan, tmp_path)
    assert len(order) == len(plan.files) > 1
    assert order[-1] == plan.files[0].file


def test_a_directory_is_not_overwritten(tmp_path):
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(UsageError, match="exists"):
        GgufWriter(plan_gguf({}, ODD, file="x.gguf"), tmp_path, overwrite=True)


def test_nothing_has_its_name_before_the_end(tmp_path):
    plan = plan_gguf({}, ODD, file="x.gguf", max_bytes=500)
    assert len(plan.files) > 1
    writer = GgufWriter(plan, tmp_path)
    for tensor in ODD:
        writer.write(tensor.name, [bytes_of(tensor)])
    assert all(path.suffix == ".partial" for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == len(plan.files)
    writer.close()
    assert {path.name for path in tmp_path.iterdir()} == {file.file for file in plan.files}


def test_the_body_takes_no_room_before_it_is_written(tmp_path):
    plan = plan_gguf({}, [GgufTensor("w", "F32", (1 << 20, 64))], file="x.gguf")
    writer = GgufWriter(plan, tmp_path)
    status = (tmp_path / "x.gguf.partial").stat()
    assert status.st_size == plan.n_bytes > 1 << 28
    assert status.st_blocks * 512 < 1 << 20
    writer.abandon()


def test_an_exception_leaves_nothing_behind(tmp_path):
    plan = plan_gguf({}, ODD, file="x.gguf")
    with pytest.raises(KeyboardInterrupt), GgufWriter(plan, tmp_path) as writer:  # noqa: PT012
        writer.write("a", [bytes_of(ODD[0])])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    writer.abandon()  # a second time does no harm


def test_an_existing_file_stays_until_the_new_one_is_whole(tmp_path):
    old = tmp_path / "x.gguf"
    old.write_text("precious")
    plan = plan_gguf({}, ODD, file="x.gguf")
    with pytest.raises(UsageError, match="exists"):
        GgufWriter(plan, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    writer = GgufWriter(plan, tmp_path, overwrite=True)
    writer.abandon()
    assert old.read_text() == "precious"
    write_all(plan, tmp_path, overwrite=True)
    assert old.read_bytes()[:4] == b"GGUF"
    old.unlink()
    writer = GgufWriter(plan, tmp_path)
    for tensor in ODD:
        writer.write(tensor.name, [bytes_of(tensor)])
    old.write_text("appeared meanwhile")
    with pytest.raises(UsageError, match="exists"):
        writer.close()
    assert old.read_text() == "appeared meanwhile"
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_links_are_neither_followed_nor_replaced(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "out").mkdir()
    plan = plan_gguf({}, ODD, file="x.gguf")
    link = tmp_path / "out" / "x.gguf"
    link.symlink_to(target)
    with pytest.raises(UsageError, match="is a link"):
        GgufWriter(plan, tmp_path / "out", overwrite=True)
    link.rename(tmp_path / "out" / "x.gguf.partial")
    with pytest.raises(DamagedError):
        GgufWriter(plan, tmp_path / "out")
    assert target.read_text() == "precious"


def test_what_a_killed_process_left_is_replaced_but_not_what_a_living_one_writes(tmp_path):
    plan = plan_gguf({}, ODD, file="x.gguf")
    left = tmp_path / "x.gguf.partial"
    write_all(plan, tmp_path)
    expected = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").unlink()
    left.write_bytes(b"\xff" * 10_000)
    write_all(plan, tmp_path)
    assert (tmp_path / "x.gguf").read_bytes() == expected  # nothing of it shows between tensors
    (tmp_path / "x.gguf").unlink()
    left.write_bytes(b"theirs")
    with left.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process"):
            GgufWriter(plan, tmp_path)
    assert left.read_bytes() == b"theirs"


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "fsync"])
def test_a_full_disk_is_told_and_cleaned_up(tmp_path, monkeypatch, call):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    plan = plan_gguf({}, ODD, file="x.gguf")
    monkeypatch.setattr(gguf_writer.os, call, full)
    with pytest.raises(CapacityError, match=r"x.gguf.partial"):
        write_all(plan, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DamagedError):
        GgufWriter(plan_gguf({}, ODD, file="x.gguf"), tmp_path / "absent")


def test_a_file_without_tensors_is_a_file(tmp_path):
    write_all(plan_gguf(METADATA, [], file="vocabulary.gguf"), tmp_path)
    found = read_gguf(tmp_path / "vocabulary.gguf")
    assert found.tensors == ()
    assert struct.unpack_from("<Q", (tmp_path / "vocabulary.gguf").read_bytes(), 8) == (0,)
