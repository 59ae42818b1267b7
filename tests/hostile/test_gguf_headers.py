"""No GGUF file makes qtool fail otherwise than with a refusal, hang, or fill the memory."""

import struct
import time
import tracemalloc

import pytest
from builders.gguf_containers import NUMBERS, ByHand, array, key, small, string, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.checkpoint.gguf_header import read_gguf
from qtool.checkpoint.locate import locate
from qtool.cli.inspect_model import render_inspection, run_inspect
from qtool.errors import DamagedError, QtoolError, UnsupportedError
from qtool.ggml_types import GGML_TYPES
from qtool.json_text import json_text

SECONDS = 2
MOST_BYTES = 4 << 20  # of memory, for files of some hundred bytes
EXTREMES = [0, 1, 7, 31, 2**7, 2**15, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53]
EXTREMES += [2**62, 2**63 - 1, 2**63, 2**64 - 33, 2**64 - 32, 2**64 - 1]
WHOLE = small().content


def assert_consistent(found):
    """What was read can be used without another look at it."""
    position = found.data_start
    assert found.data_start % found.alignment == 0
    for ref in sorted(found.tensors, key=lambda one: one.start):
        assert position <= ref.start <= ref.stop <= found.file_bytes
        assert (ref.start - found.data_start) % found.alignment == 0
        assert ref.n_bytes == GGML_TYPES[ref.dtype].n_bytes(ref.shape)
        assert ref.n_elements > 0
        position = ref.stop
    assert len({ref.name for ref in found.tensors}) == len(found.tensors)
    for value in found.metadata.values():
        assert isinstance(value.content, tuple) == value.array


def outcome_of(call, *arguments, **settings):
    """What a call returned, or its refusal; every other exception is a failure."""
    try:
        return call(*arguments, **settings)
    except QtoolError as error:
        return error


def assert_clean(error, path):
    assert isinstance(error, DamagedError | UnsupportedError)
    assert error.message.isprintable()
    assert str(path) in error.message


def shown(path):
    result = run_inspect(str(path), tensors=True)
    json_text(result)
    render_inspection(result)


def endured(path):
    """Read and inspect a file within the limits; return what was read, or the refusal."""
    tracemalloc.start()
    before = time.process_time()
    found = outcome_of(read_gguf, path)
    seen = outcome_of(shown, path)
    taken = time.process_time() - before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < SECONDS
    assert peak < MOST_BYTES
    if isinstance(found, QtoolError):
        assert_clean(found, path)
    else:
        assert_consistent(found)
    if isinstance(seen, QtoolError):
        assert_clean(seen, path.parent)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "x.gguf"
    path.write_bytes(WHOLE)
    run_inspect(str(path))  # what is loaded once is not counted
    return path


def test_the_file_that_is_mutated_is_valid(place):
    place.write_bytes(WHOLE)
    assert len(endured(place).tensors) == 2


def test_a_header_cut_at_any_byte_is_damaged(place):
    for n in range(len(WHOLE)):
        place.write_bytes(WHOLE[:n])
        with pytest.raises(DamagedError):
            read_gguf(place)


@pytest.mark.parametrize("width", [4, 8])
def test_every_field_with_every_extreme_is_read_or_refused(place, width):
    header = len(WHOLE) - len(small().data)
    for position in range(0, header - width, 3 if width == 4 else 5):
        for number in EXTREMES:
            raw = (number % 2 ** (8 * width)).to_bytes(width, "little")
            place.write_bytes(WHOLE[:position] + raw + WHOLE[position + width :])
            found = outcome_of(read_gguf, place)
            if isinstance(found, QtoolError):
                assert_clean(found, place)
            else:
                assert_consistent(found)


positions = st.integers(0, len(WHOLE) - 1)
edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), positions, st.binary(min_size=1, max_size=9)),
        st.tuples(
            st.just("set"),
            positions,
            st.sampled_from(EXTREMES).map(lambda number: struct.pack("<Q", number)),
        ),
        st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("delete"), positions, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("cut"), positions, st.just(b"")),
        st.tuples(st.just("repeat"), positions, st.just(b"")),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(edits)
def test_changed_bytes_are_read_or_refused(place, edits):
    raw = WHOLE
    for kind, position, piece in edits:
        stop = {"set": position + len(piece), "delete": position + len(piece)}
        if kind == "cut":
            raw = raw[:position]
        elif kind == "repeat":
            raw = raw[:position] + raw[position // 2 :]
        else:
            middle = b"" if kind == "delete" else piece
            raw = raw[:position] + middle + raw[stop.get(kind, position) :]
    place.write_bytes(raw)
    endured(place)


names = st.one_of(
    st.sampled_from(
        [
            "general.architecture",
            "general.alignment",
            "general.type",
            "general.file_type",
            "llama.block_count",
            "llama.embedding_length",
            "llama.attention.head_count",
            "llama.expert_count",
            "llama.expert_used_count",
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.model",
            "tokenizer.ggml.bos_token_id",
            "tokenizer.ggml.scores",
            "tokenizer.chat_template",
            "imatrix.datasets",
            "split.count",
            "split.no",
        ]
    ),
    st.binary(max_size=12),
)
strings = st.one_of(st.sampled_from(["llama", "imatrix", "gpt2", "model"]), st.binary(max_size=20))
numbers = st.one_of(st.sampled_from(EXTREMES), st.integers(0, 40), st.integers(0, 2**64 - 1))
payloads = st.one_of(
    st.tuples(st.just("string"), strings.map(string)),
    st.tuples(st.just("u32"), numbers.map(lambda n: struct.pack("<I", n % 2**32))),
    st.tuples(st.sampled_from([*NUMBERS, 13, 2**32 - 1]), st.binary(max_size=16)),
    st.tuples(
        st.just("array"),
        st.builds(
            array,
            st.sampled_from([*NUMBERS, 200]),
            st.one_of(st.integers(0, 4), numbers),
            st.one_of(
                st.lists(strings.map(string), max_size=4).map(b"".join), st.binary(max_size=64)
            ),
        ),
    ),
)
keys = st.lists(st.tuples(names, payloads).map(lambda pair: key(pair[0], *pair[1])), max_size=6)
sizes = st.one_of(st.sampled_from([32, 256, 1, 0, 4]), numbers)
tensors = st.lists(
    st.builds(
        tensor,
        st.one_of(
            st.sampled_from(["token_embd.weight", "output.weight", "blk.0.attn_q.weight", "x"]),
            st.binary(max_size=8),
        ),
        st.lists(sizes, max_size=5),
        st.one_of(st.sampled_from([0, 1, 8, 12, 30]), st.integers(0, 45), st.just(2**31)),
        st.one_of(st.sampled_from([0, 32, 64, 1024]), numbers),
    ),
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(keys, tensors, st.binary(max_size=2048), st.integers(0, 5))
def test_invented_files_are_read_or_refused(place, keys, tensors, data, version):
    place.write_bytes(ByHand(keys, tensors, data, version=version if version == 2 else 3).content)
    endured(place)


def test_an_absurd_claim_in_a_large_file_allocates_nothing(tmp_path):
    """Here the bytes would be there: only the limits stand between the claim and the memory."""
    for name, entry in (
        ("string", key("x", "string", struct.pack("<Q", 2**36))),
        ("items", key("x", "array", array("u8", 2**36, b""))),
        ("strings", key("x", "array", array("string", 2**33, b""))),
        ("one string", key("x", "array", array("string", 1, struct.pack("<Q", 2**36)))),
    ):
        path = tmp_path / f"{name}.gguf"
        ByHand([entry]).at(path)
        with path.open("r+b") as file:
            file.truncate(2**37)
        assert isinstance(endured(path), DamagedError)
    for settings_ in ({"n_tensors": 2**33}, {"n_keys": 2**33}):
        path = tmp_path / "counts.gguf"
        ByHand(**settings_).at(path)
        with path.open("r+b") as file:
            file.truncate(2**37)
        assert isinstance(endured(path), DamagedError)


def test_a_header_of_zeros_without_end_is_given_up(tmp_path):
    """Empty strings, as many as are allowed, take a few bytes each and no more."""
    path = tmp_path / "zeros.gguf"
    ByHand([key("x", "array", array("string", 2**18, b""))]).at(path)
    with path.open("r+b") as file:
        file.truncate(2**37)
    tracemalloc.start()
    before = time.process_time()
    found = read_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(found.metadata["x"].content) == {""}
    assert time.process_time() - before < 2 * SECONDS  # tracing is slow
    assert peak < 16 << 20


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "directory.gguf").mkdir()
    for name in ("directory.gguf", "absent.gguf"):
        with pytest.raises(DamagedError):
            read_gguf(tmp_path / name)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(DamagedError, match="0 bytes are no GGUF file"):
        locate(str(tmp_path / "empty.gguf"), gguf=True)
