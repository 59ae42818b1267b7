"""Headers are read as the safetensors library reads them, or refused."""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qtool.checkpoint.header import DTYPE_BYTES, checkpoint_refs, read_header
from qtool.checkpoint.reader import TORCH_DTYPES
from qtool.errors import QtoolError

TENSORS = {
    "a.weight": torch.arange(33 * 100, dtype=torch.float32).reshape(33, 100).bfloat16(),
    "b.scale": torch.tensor(2.5),
    "c.nothing": torch.empty(0, 7, dtype=torch.int32),
    "d.bias": torch.ones(5, dtype=torch.float16),
    "e.flag": torch.tensor([True, False, True]),
}


def raw_file(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_a_header_is_what_the_library_reports(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    refs = {ref.name: ref for ref in read_header(path)}
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        assert set(refs) == set(file.keys())
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor, ref = file.get_tensor(name), refs[name]
            assert ref.shape == tuple(tensor.shape)
            assert TORCH_DTYPES[ref.dtype] == tensor.dtype
            assert ref.n_bytes == tensor.numel() * tensor.element_size()
            stored = content[ref.start : ref.stop]
            assert stored == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_refs_come_in_the_order_of_their_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    starts = [ref.start for ref in read_header(path)]
    assert starts == sorted(starts)


def test_sizes_of_dtypes_are_those_of_torch():
    assert set(DTYPE_BYTES) == set(TORCH_DTYPES)
    for name, dtype in TORCH_DTYPES.items():
        assert DTYPE_BYTES[name] == dtype.itemsize


def test_shards_are_read_through_their_index(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(4), "c": torch.ones(5)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refs = checkpoint_refs(tmp_path)
    assert {name: (ref.file.name, ref.shape) for name, ref in refs.items()} == {
        "a": ("one.safetensors", (3,)),
        "b": ("two.safetensors", (4,)),
        "c": ("two.safetensors", (5,)),
    }


def test_links_into_the_cache_of_the_hub_are_followed(tmp_path):
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(3)}, blobs / "123")
    (snapshot / "one.safetensors").symlink_to("../../blobs/123")
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map":{"a":"one.safetensors"}}')
    assert list(checkpoint_refs(snapshot)) == ["a"]


def library_reading(path):
    """The oracle: name -> (dtype, shape) as the library sees it, None where it refuses."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError):
        return None


def agree_or_refuse(path):
    """Read a doubtful header: a clean refusal, or exactly what the library reads."""
    refusal = None
    try:
        refs = read_header(path)
    except QtoolError as error:
        refusal = error
    if refusal:
        assert refusal.exit_code in {5, 6}
        assert refusal.hint
        assert path.name in refusal.message
        assert refusal.message.isprintable()
        return
    assert {ref.name: (ref.dtype, ref.shape) for ref in refs} == library_reading(path)
    size = path.stat().st_size
    for ref in refs:
        assert ref.stop - ref.start == math.prod(ref.shape) * DTYPE_BYTES[ref.dtype]
        assert 8 <= ref.start <= ref.stop <= size


VALID = raw_file(
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    },
    bytes(32),
)
LENIENT = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@LENIENT
@given(edits=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4))
def test_changed_bytes_are_refused_or_read_as_the_library_does(tmp_path, edits):
    content = bytearray(VALID)
    for position, value in edits:
        content[position] = value
    path = tmp_path / "changed.safetensors"
    path.write_bytes(content)
    agree_or_refuse(path)


@LENIENT
@given(keep=st.integers(0, len(VALID)), extra=st.binary(max_size=16))
def test_cut_or_lengthened_files_are_refused_or_read_as_the_library_does(tmp_path, keep, extra):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(VALID[:keep] + extra)
    agree_or_refuse(path)


NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, 1.5, -0.0, 1e400]),
    st.booleans(),
    st.none(),
)
JUNK = st.one_of(NUMBERS, st.text(max_size=4), st.lists(NUMBERS, max_size=3))
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "F99", "", "C64"]) | JUNK,
            "shape": st.lists(NUMBERS, max_size=4) | JUNK,
            "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JUNK,
        },
        optional={"extra": JUNK},
    ),
    JUNK,
)


@LENIENT
@given(
    header=st.dictionaries(
        st.text(max_size=3) | st.sampled_from(["a", "__metadata__", "\ud800", "\x1b[2J"]),
        ENTRIES | st.dictionaries(st.text(max_size=2), st.text(max_size=2) | NUMBERS, max_size=2),
        max_size=4,
    ),
    body=st.integers(0, 40),
)
def test_invented_headers_are_refused_or_read_as_the_library_does(tmp_path, header, body):
    path = tmp_path / "invented.safetensors"
    path.write_bytes(raw_file(header, bytes(body)))
    agree_or_refuse(path)


@st.composite
def tilings(draw):
    """Nearly valid headers: true sizes laid out in some order, sometimes with one step wrong."""
    header, position = {}, 0
    for number in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(["U8", "F16", "F32", "I64"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        position += draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
        header[f"t{number}"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    return raw_file(header, bytes(max(0, position)))


@LENIENT
@given(content=tilings())
def test_holes_and_overlaps_are_refused_as_the_library_does(tmp_path, content):
    path = tmp_path / "tiled.safetensors"
    path.write_bytes(content)
    agree_or_refuse(path)
    accepted = library_reading(path) is not None
    if accepted:  # and nothing that it reads is refused
        read_header(path)


@pytest.mark.parametrize("opening", [b"[" * 200_000, b'{"a":' * 200_000, b'{"a":' + b"9" * 10_000])
def test_deep_and_endless_json_is_refused(tmp_path, opening):
    path = tmp_path / "deep.safetensors"
    path.write_bytes(raw_file(opening))
    agree_or_refuse(path)
