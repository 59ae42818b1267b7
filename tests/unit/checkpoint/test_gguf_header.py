"""GGUF headers: read as the gguf package reads them, and refused by name where they are wrong."""

import struct

import gguf
import numpy as np
import pytest
from builders.gguf_containers import (
    ByHand,
    array,
    by_package,
    key,
    llama_keys,
    llama_weights,
    small,
    string,
    tensor,
)
from builders.work import calls_of

from qtool.checkpoint.gguf_header import MAX_ITEMS, is_gguf, read_gguf
from qtool.checkpoint.gguf_split import model_stem, read_gguf_split
from qtool.checkpoint.gguf_values import Value
from qtool.errors import DamagedError, UnsupportedError

KINDS = {
    "UINT8": "u8",
    "INT8": "i8",
    "UINT16": "u16",
    "INT16": "i16",
    "UINT32": "u32",
    "INT32": "i32",
    "FLOAT32": "f32",
    "BOOL": "bool",
    "STRING": "string",
    "UINT64": "u64",
    "INT64": "i64",
    "FLOAT64": "f64",
}


def assert_agrees_with_the_package(path):
    """Every key and every tensor is what gguf.GGUFReader, behind gguf-dump, makes of them."""
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {name: f for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, value in ours.metadata.items():
        field = fields[name]
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        assert (value.array, value.kind) == (is_array, KINDS[field.types[-1].name]), name
        if not is_array or len(field.data):
            content = field.contents()
            assert list(np.ravel(value.content)) == list(np.ravel(content)), name
    assert (ours.alignment, ours.data_start) == (theirs.alignment, theirs.data_offset)
    assert [ref.name for ref in ours.tensors] == [one.name for one in theirs.tensors]
    for ref, one in zip(ours.tensors, theirs.tensors, strict=True):
        assert ref.dtype == one.tensor_type.name
        assert ref.shape == tuple(int(size) for size in reversed(one.shape))
        assert (ref.start, ref.n_bytes) == (one.data_offset, one.n_bytes)
        assert (ref.n_elements, ref.file) == (one.n_elements, path)


def every_kind():
    return [
        ("add_uint8", "k.u8", 255),
        ("add_int8", "k.i8", -128),
        ("add_uint16", "k.u16", 65535),
        ("add_int16", "k.i16", -32768),
        ("add_uint32", "k.u32", 2**32 - 1),
        ("add_int32", "k.i32", -(2**31)),
        ("add_float32", "k.f32", 0.1),
        ("add_uint64", "k.u64", 2**64 - 1),
        ("add_int64", "k.i64", -(2**63)),
        ("add_float64", "k.f64", 1e300),
        ("add_bool", "k.yes", True),
        ("add_bool", "k.no", False),
        ("add_string", "k.text", "zwölf ✓"),
        ("add_array", "k.list.i", [1, -2, 3]),
        ("add_array", "k.list.f", [0.5, float("inf")]),
        ("add_array", "k.list.s", ["", "ä", "x" * 70_000]),
        ("add_array", "k.list.b", [True, False]),
    ]


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_it_agrees_with_the_gguf_package_on_every_key_and_tensor(tmp_path, alignment):
    keys = every_kind() + llama_keys()
    if alignment is not None:
        keys.append(("add_custom_alignment", alignment))
    weights = llama_weights() | {"experts": np.ones((2, 3, 64), np.float32)}
    types = {"blk.0.attn_q.weight": "Q8_0", "blk.1.ffn_up.weight": "Q4_0", "experts": "BF16"}
    path = by_package(tmp_path / "model.gguf", weights, keys, types=types)
    assert_agrees_with_the_package(path)
    assert read_gguf(path).alignment == (alignment or 32)


@pytest.mark.parametrize("version", [2, 3])
def test_it_agrees_on_a_file_made_by_hand(tmp_path, version):
    made = small()
    made.version = version
    path = made.at(tmp_path / "x.gguf")
    assert_agrees_with_the_package(path)
    assert read_gguf(path).version == version
    assert read_gguf(path).metadata["flag"] == Value("bool", True)


def test_a_vocabulary_may_hold_bytes_that_are_no_text(tmp_path):
    raw = b"\xf0\x9f"
    payload = array("string", 2, string(raw) + string("ok"))
    path = ByHand([key("tokens", "array", payload)]).at(tmp_path / "x.gguf")
    token = read_gguf(path).metadata["tokens"].content[0]
    assert token.encode("utf-8", "surrogateescape") == raw


def test_a_vocabulary_of_256_thousand_is_read_in_few_calls_for_each_token(tmp_path):
    n = 256_000
    tokens = b"".join(string(f"token{i}") for i in range(n))
    numbers = struct.pack(f"<{n}f", *range(n))
    keys = [
        key("tokens", "array", array("string", n, tokens)),
        key("merges", "array", array("string", n, tokens)),
        key("scores", "array", array("f32", n, numbers)),
    ]
    path = ByHand(keys).at(tmp_path / "x.gguf")
    assert read_gguf(path).metadata["merges"].content[-1] == f"token{n - 1}"
    assert calls_of(read_gguf, path) < 12 * n  # five for each string


def test_the_size_of_a_file_costs_nothing(tmp_path):
    path = tmp_path / "x.gguf"
    size = 1 << 38
    made = ByHand(tensors=[tensor("w", (1 << 20, (size >> 20) // 4 - 1), 0, 0)])
    path.write_bytes(made.content)
    with path.open("r+b") as file:
        file.truncate(size)
    assert read_gguf(path).tensors[0].n_bytes == size - (4 << 20)
    assert calls_of(read_gguf, path) < 1000


def with_key(*entries):
    made = small()
    made.keys += entries
    return made


def with_tensor(*entries):
    made = small()
    made.tensors = list(entries)
    return made


def aligned(number):
    return with_key(key("general.alignment", "u32", struct.pack("<I", number)))


def lying(**changes):
    made = small()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


HUGE = struct.pack("<Q", 2**63)
DAMAGED = {
    "no magic": (lying(magic=b"GGML"), "does not begin with GGUF"),
    "2^63 tensors": (lying(n_tensors=2**63), "claims 9223372036854775808 tensors"),
    "2^63 keys": (lying(n_keys=2**63), "claims 9223372036854775808 keys"),
    "tensors in no bytes": (lying(n_tensors=1000), "truncated: 1000 tensors in"),
    "a tensor too many": (lying(n_tensors=3), "tensor"),
    "a key too many": (lying(n_keys=7), ""),
    "2^63 bytes of text": (with_key(key("x", "string", HUGE)), "key 'x' claims"),
    "text beyond the file": (
        with_key(key("x", "string", struct.pack("<Q", 10**6))),
        "truncated: key 'x'",
    ),
    "2^63 items": (with_key(key("x", "array", array("u8", 2**63, b""))), "key 'x' claims"),
    "items beyond the file": (
        with_key(key("x", "array", array("u64", 1000, b""))),
        "truncated: key 'x' claims 1000 items",
    ),
    "texts beyond the file": (
        with_key(key("x", "array", array("string", 2, string("a") + struct.pack("<Q", 10**6)))),
        "truncated: key 'x'",
    ),
    "2^63 bytes in a list": (
        with_key(key("x", "array", array("string", 1, HUGE))),
        "truncated: key 'x'",
    ),
    "too many items": (
        with_key(key("x", "array", array("u8", MAX_ITEMS + 1, b""))),
        "the limit for all lists",
    ),
    "an unknown kind": (with_key(key("x", 13, b"")), "key 'x' has the unknown kind of value 13"),
    "an unknown kind in a list": (with_key(key("x", "array", array(99, 1, b""))), "kind of value"),
    "a truth of 7": (with_key(key("x", "bool", b"\7")), "neither 0 nor 1"),
    "truths of 7": (with_key(key("x", "array", array("bool", 2, b"\1\7"))), "neither 0 nor 1"),
    "text that is no UTF-8": (with_key(key("x", "string", string(b"ab\xff"))), "not UTF-8 at byte"),
    "a key that is no UTF-8": (with_key(key(b"\xff", "u8", b"\1")), "not UTF-8 at byte"),
    "a key twice": (with_key(key("flag", "bool", b"\1")), "key 'flag' twice"),
    "a key without a name": (with_key(key("", "bool", b"\1")), "has no name"),
    "a key of 65536 bytes": (with_key(key("x" * 65536, "bool", b"\1")), "claims 65536 bytes"),
    "alignment 0": (aligned(0), "general.alignment' is 0"),
    "alignment 3": (aligned(3), "general.alignment' is 3"),
    "alignment 4": (aligned(4), "general.alignment' is 4"),
    "alignment 24": (aligned(24), "general.alignment' is 24"),
    "alignment 2^31": (aligned(2**31), "general.alignment"),
    "alignment 2^40": (
        with_key(key("general.alignment", "u64", struct.pack("<Q", 2**40))),
        "general.alignment' is 1099511627776",
    ),
    "alignment as text": (
        with_key(key("general.alignment", "string", string("32"))),
        "general.alignment",
    ),
    "a tensor twice": (
        with_tensor(tensor("a", (8,), 0, 0), tensor("a", (8,), 0, 32)),
        "tensor 'a' twice",
    ),
    "tensors that overlap": (
        with_tensor(tensor("a", (8,), 0, 32), tensor("b", (16,), 0, 0)),
        "'b' and 'a' overlap",
    ),
    "five dimensions": (with_tensor(tensor("a", (1,) * 5, 0, 0)), "claims 5 dimensions"),
    "2^32 - 1 dimensions": (
        with_tensor(string("a") + struct.pack("<I", 2**32 - 1)),
        "tensor",
    ),
    "a dimension of 0": (with_tensor(tensor("a", (8, 0), 0, 0)), "impossible shape [0, 8]"),
    "a product of 2^64": (with_tensor(tensor("a", (2**32, 2**32), 0, 0)), "impossible shape"),
    "a dimension of 2^63": (with_tensor(tensor("a", (2**63,), 0, 0)), "impossible shape"),
    "a broken block": (with_tensor(tensor("a", (33, 2), 8, 0)), "not blocks of 32"),
    "a crooked offset": (with_tensor(tensor("a", (4,), 0, 4)), "'a' has the offset 4"),
    "an offset of 2^63": (with_tensor(tensor("a", (4,), 0, 2**63)), "truncated: tensor 'a'"),
    "a tensor beyond the file": (with_tensor(tensor("a", (64,), 0, 0)), "truncated: tensor 'a'"),
    "a tensor without a name": (with_tensor(tensor("", (4,), 0, 0)), "without a name"),
    "a name with escapes": (with_tensor(tensor("\x1b[2J", (64,), 0, 0)), "\\x1b[2J"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_wrong_is_refused_by_name(tmp_path, case):
    made, expected = DAMAGED[case]
    path = made.at(tmp_path / "bad.gguf")
    with pytest.raises(DamagedError) as caught:
        read_gguf(path)
    assert expected in caught.value.message
    assert "bad.gguf" in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.hint


UNSUPPORTED = {
    "version 1": (lying(version=1), "version 1"),
    "version 4": (lying(version=4), "version 4"),
    "version 0": (lying(version=0), "version 0"),
    "big-endian": (lying(version=3 << 24), "big-endian"),
    "a list of lists": (with_key(key("x", "array", array("array", 1, b""))), "list of lists"),
    "a removed type": (with_tensor(tensor("a", (32,), 4, 0)), "tensor type 4"),
    "a future type": (with_tensor(tensor("a", (32,), 1000, 0)), "tensor type 1000"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_qtool_does_not_know_is_unsupported(tmp_path, case):
    made, expected = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError) as caught:
        read_gguf(made.at(tmp_path / "other.gguf"))
    assert expected in caught.value.message


def test_tensors_need_no_order_and_may_leave_gaps(tmp_path):
    made = with_tensor(tensor("late", (8,), 0, 96), tensor("early", (8,), 0, 0))
    found = read_gguf(made.at(tmp_path / "x.gguf"))
    late, early = found.tensors
    assert (late.name, late.start - early.start) == ("late", 96)


def test_a_file_is_known_by_its_name_or_its_first_bytes(tmp_path):
    small().at(tmp_path / "sha256-0123")
    (tmp_path / "named.GGUF").write_bytes(b"")
    (tmp_path / "text").write_text("GGU")
    assert is_gguf(tmp_path / "sha256-0123")
    assert is_gguf(tmp_path / "named.GGUF")
    assert not is_gguf(tmp_path / "text")
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "absent")


def part(number, count=3, total=3, name=None, kind="u16"):
    keys = [
        key("split.no", kind, struct.pack("<H", number)),
        key("split.count", "u16", struct.pack("<H", count)),
        key("split.tensors.count", "i32", struct.pack("<i", total)),
    ]
    if number == 0:
        keys.insert(0, key("general.architecture", "string", string("llama")))
    entry = tensor(name or f"t{number}", (8,), 0, 0)
    return ByHand(keys, [entry], bytes(32))


def parts(directory, *made):
    for i, one in enumerate(made, start=1):
        one.at(directory / f"m-{i:05d}-of-{len(made):05d}.gguf")
    return directory / f"m-00002-of-{len(made):05d}.gguf"


def test_a_split_file_is_found_from_any_part(tmp_path):
    parts(tmp_path, part(0), part(1), part(2))
    for i in (1, 2, 3):
        found = read_gguf_split(tmp_path / f"m-0000{i}-of-00003.gguf")
        assert [one.tensors[0].name for one in found] == ["t0", "t1", "t2"]
        assert "general.architecture" in found[0].metadata


def test_the_package_splits_as_it_is_read(tmp_path):
    weights = llama_weights()
    by_package(tmp_path / "m.gguf", weights, split_max_tensors=7)
    found = read_gguf_split(tmp_path / "m-00003-of-00003.gguf")
    assert {ref.name for one in found for ref in one.tensors} == weights.keys()


def test_a_model_has_its_name_without_the_part():
    assert model_stem("a-b-00002-of-00012.gguf") == "a-b"
    assert model_stem("a-b.gguf") == "a-b"
    assert model_stem("a-0002-of-0012.gguf") == "a-0002-of-0012"


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ((part(0), part(1), part(2, total=3, name="t1")), "also in"),
        ((part(0), part(1), part(1, name="t2")), "split.no 1, not 2"),
        ((part(0), part(1), part(2, count=4)), "one of 4 parts"),
        ((part(0, total=5), part(1), part(2)), "promises 5 tensors"),
        ((part(0), part(1), small()), "split.count' is missing"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path, made, expected):
    path = parts(tmp_path, *made)
    with pytest.raises(DamagedError) as caught:
        read_gguf_split(path)
    assert expected in caught.value.message


def test_a_missing_part_and_a_lost_name_are_told(tmp_path):
    path = parts(tmp_path, part(0), part(1), part(2))
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(DamagedError, match=r"m-00003-of-00003.gguf is missing, one of 3 parts"):
        read_gguf_split(path)
    path.rename(tmp_path / "other.gguf")
    with pytest.raises(DamagedError, match="not by its name"):
        read_gguf_split(tmp_path / "other.gguf")
