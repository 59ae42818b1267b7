"""Every bad input is refused with its exit code, its file, its tensor and a piece of advice."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtool.checkpoint.header import checkpoint_refs
from qtool.checkpoint.locate import locate
from qtool.checkpoint.reader import TensorReader, check_finite
from qtool.errors import DamagedError, NumericalError, QtoolError

ROOT = Path(__file__).parents[2]
CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def model(directory):
    """A sound one-file model, to be spoiled."""
    weights = {"model.embed_tokens.weight": torch.ones(4, 8), "lm_head.weight": torch.ones(4, 8)}
    save_file(weights, directory / SINGLE)
    (directory / "config.json").write_text(json.dumps(CONFIG))


def sharded(directory):
    """A sound two-file model, to be spoiled."""
    save_file({"a": torch.ones(3)}, directory / "one.safetensors")
    save_file({"b": torch.ones(4)}, directory / "two.safetensors")
    set_index(directory, {"a": "one.safetensors", "b": "two.safetensors"})
    (directory / "config.json").write_text(json.dumps(CONFIG))


def set_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def set_header(directory, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + body)


def truncate(directory):
    content = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(content[:-5])


def lengthen(directory):
    with (directory / SINGLE).open("ab") as file:
        file.write(b"more")


def only_pickle(directory):
    (directory / SINGLE).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(directory)))


class Bomb:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory / "PICKLE WAS OPENED"),)


def float_entry(start, stop, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


# name: (how to spoil a one-file model, exit code, words of the message)
ONE_FILE = {
    "truncated in a tensor": (truncate, 6, ["truncated", SINGLE, "tensor '"]),
    "truncated in the header": (
        lambda d: (d / SINGLE).write_bytes((d / SINGLE).read_bytes()[:40]),
        6,
        ["truncated", SINGLE],
    ),
    "empty": (lambda d: (d / SINGLE).write_bytes(b""), 6, ["truncated", SINGLE]),
    "five bytes": (lambda d: (d / SINGLE).write_bytes(b"12345"), 6, ["truncated", SINGLE]),
    "bytes after the end": (lengthen, 6, [SINGLE, "4 bytes after"]),
    "huge header length": (
        lambda d: (d / SINGLE).write_bytes(b"\xff" * 8 + b"{}"),
        6,
        [SINGLE, "18446744073709551615"],
    ),
    "header longer than the file": (
        lambda d: (d / SINGLE).write_bytes((99).to_bytes(8, "little") + b"{}"),
        6,
        [SINGLE, "truncated"],
    ),
    "no header": (lambda d: set_header(d, b""), 6, [SINGLE]),
    "header is not JSON": (lambda d: set_header(d, b"{'a': 1}"), 6, [SINGLE, "JSON"]),
    "header is not UTF-8": (lambda d: set_header(d, b'{"\xff"}'), 6, [SINGLE, "UTF-8", "byte 2"]),
    "header is a list": (lambda d: set_header(d, b"[]"), 6, [SINGLE, "object"]),
    "no tensors": (lambda d: set_header(d, {}), 6, [SINGLE, "no tensors"]),
    "a git-lfs pointer": (
        lambda d: (d / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha"),
        6,
        [SINGLE],
    ),
    "an HTML page": (lambda d: (d / SINGLE).write_text("<!DOCTYPE html><p>404"), 6, [SINGLE]),
    "a tensor twice": (
        lambda d: set_header(d, b'{"a":1,"a":2}'),
        6,
        [SINGLE, "'a' twice"],
    ),
    "unknown dtype": (
        lambda d: set_header(d, {"w": {"dtype": "F7", "shape": [1], "data_offsets": [0, 1]}}),
        6,
        [SINGLE, "'w'", "F7"],
    ),
    "four-bit floats": (
        lambda d: set_header(d, {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"x"),
        5,
        [SINGLE, "'w'", "F4"],
    ),
    "shape that does not fit its bytes": (
        lambda d: set_header(d, {"w": float_entry(0, 12)}, bytes(12)),
        6,
        [SINGLE, "'w'", "8 bytes"],
    ),
    "negative shape": (
        lambda d: set_header(d, {"w": float_entry(0, 8, (-2,))}, bytes(8)),
        6,
        [SINGLE, "'w'", "-2"],
    ),
    "shape that overflows": (
        lambda d: set_header(d, {"w": float_entry(0, 0, (2**32, 2**32, 0))}),
        6,
        [SINGLE, "'w'", "shape"],
    ),
    "offsets backwards": (
        lambda d: set_header(d, {"w": float_entry(8, 0)}, bytes(8)),
        6,
        [SINGLE, "'w'"],
    ),
    "overlap": (
        lambda d: set_header(d, {"v": float_entry(0, 8), "w": float_entry(4, 12)}, bytes(12)),
        6,
        [SINGLE, "'w'", "overlaps"],
    ),
    "hole": (
        lambda d: set_header(d, {"v": float_entry(0, 8), "w": float_entry(12, 20)}, bytes(20)),
        6,
        [SINGLE, "'w'", "4 bytes after"],
    ),
    "entry without offsets": (
        lambda d: set_header(d, {"w": {"dtype": "F32", "shape": [1]}}),
        6,
        [SINGLE, "'w'", "data_offsets"],
    ),
    "metadata of numbers": (
        lambda d: set_header(d, {"__metadata__": {"format": 1}}),
        6,
        [SINGLE, "__metadata__"],
    ),
    "a name with escapes": (
        lambda d: set_header(d, {"\x1b]0;owned\x07\u202e": 1}),
        6,
        [SINGLE, r"'\x1b]0;owned\x07\u202e'"],
    ),
    "weights are a directory": (
        lambda d: ((d / SINGLE).unlink(), (d / SINGLE).mkdir()),
        6,
        [SINGLE, "not a file"],
    ),
    "weights are a pipe": (
        lambda d: ((d / SINGLE).unlink(), os.mkfifo(d / SINGLE)),
        6,
        [SINGLE, "not a file"],
    ),
    "weights are gone": (lambda d: (d / SINGLE).unlink(), 6, [SINGLE, "missing"]),
    "only pickle weights": (only_pickle, 5, ["pytorch_model.bin", "pickle"]),
    "config is gone": (lambda d: (d / "config.json").unlink(), 6, ["config.json", "missing"]),
    "config is empty": (lambda d: (d / "config.json").write_text(""), 6, ["config.json", "JSON"]),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[1]"),
        6,
        ["config.json", "object"],
    ),
    "config is not UTF-8": (
        lambda d: (d / "config.json").write_bytes(b'{"model_type": "\xe4"}'),
        6,
        ["config.json", "UTF-8", "byte 16"],
    ),
    "config is nested deeply": (
        lambda d: (d / "config.json").write_text('{"a":' * 100_000),
        6,
        ["config.json"],
    ),
    "config with a number of ten thousand digits": (
        lambda d: (d / "config.json").write_text('{"hidden_size": ' + "9" * 10_000 + "}"),
        6,
        ["config.json"],
    ),
    "config of 17 MiB": (
        lambda d: (d / "config.json").write_text(" " * (17 << 20)),
        6,
        ["config.json", "bytes"],
    ),
    "config with absurd layers": (
        lambda d: (d / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1e9})),
        6,
        ["config.json", "num_hidden_layers", "1000000000"],
    ),
}

# The same for a model of two files.
TWO_FILES = {
    "shard missing": (
        lambda d: (d / "two.safetensors").unlink(),
        6,
        ["two.safetensors", "missing"],
    ),
    "shard truncated": (
        lambda d: (d / "two.safetensors").write_bytes((d / "two.safetensors").read_bytes()[:-1]),
        6,
        ["two.safetensors", "truncated", "'b'"],
    ),
    "index is gone": (lambda d: (d / INDEX).unlink(), 6, ["one.safetensors", "index"]),
    "index is not JSON": (lambda d: (d / INDEX).write_text("{"), 6, [INDEX, "JSON"]),
    "index without a map": (lambda d: (d / INDEX).write_text("{}"), 6, [INDEX, "weight_map"]),
    "index of numbers": (lambda d: set_index(d, {"a": 1}), 6, [INDEX, "'a'"]),
    "index of nothing": (lambda d: set_index(d, {}), 6, [INDEX, "no tensors"]),
    "tensor twice in the index": (
        lambda d: (d / INDEX).write_text(
            '{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}'
        ),
        6,
        [INDEX, "'a' twice"],
    ),
    "tensor that its shard lacks": (
        lambda d: set_index(
            d, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
        ),
        6,
        ["two.safetensors", "'c'"],
    ),
    "tensor that the index lacks": (
        lambda d: (
            set_index(d, {"a": "one.safetensors"})
            or save_file({"a": torch.ones(3), "z": torch.ones(1)}, d / "one.safetensors")
        ),
        6,
        ["one.safetensors", "'z'"],
    ),
    "tensor in two shards": (
        lambda d: save_file({"a": torch.ones(3), "b": torch.ones(4)}, d / "two.safetensors"),
        6,
        ["two.safetensors", "'a'", "one.safetensors"],
    ),
    "tensors exchanged": (
        lambda d: set_index(d, {"b": "one.safetensors", "a": "two.safetensors"}),
        6,
        ["one.safetensors", "'a'"],
    ),
}
TRAVERSALS = [
    "../outside.safetensors",
    "/etc/passwd",
    "/etc/passwd.safetensors",
    "sub/../../outside.safetensors",
    "..\\outside.safetensors",
    "./one.safetensors",
    "..",
    "",
    "one.bin",
    "one\x00.safetensors",
    "one\x1b[31m.safetensors",
]


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def assert_refused(directory, code, words):
    before = sorted(path.name for path in directory.iterdir())
    start = time.perf_counter()
    with pytest.raises(QtoolError) as caught:
        locate(str(directory))
    assert time.perf_counter() - start < 2
    refusal = caught.value
    assert refusal.exit_code == code
    for word in words:
        assert word in refusal.message
    assert str(directory) in refusal.message
    assert refusal.hint
    assert (refusal.message + refusal.hint).isprintable()
    assert sorted(path.name for path in directory.iterdir()) == before


@pytest.mark.parametrize("case", ONE_FILE)
def test_a_spoiled_file_is_named(tmp_path, case):
    spoil, code, words = ONE_FILE[case]
    model(tmp_path)
    spoil(tmp_path)
    assert_refused(tmp_path, code, words)


@pytest.mark.parametrize("case", TWO_FILES)
def test_a_spoiled_index_or_shard_is_named(tmp_path, case):
    spoil, code, words = TWO_FILES[case]
    sharded(tmp_path)
    spoil(tmp_path)
    assert_refused(tmp_path, code, words)


@pytest.mark.parametrize("name", TRAVERSALS)
def test_an_index_never_leads_out_of_its_directory(tmp_path, name):
    save_file({"b": torch.ones(4)}, tmp_path / "outside.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    sharded(inside)
    set_index(inside, {"a": "one.safetensors", "b": name})
    assert_refused(inside, 6, [INDEX, "plain"])


def test_a_shard_that_links_out_of_the_directory_is_refused(tmp_path):
    save_file({"b": torch.ones(4)}, tmp_path / "outside.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    sharded(inside)
    (inside / "two.safetensors").unlink()
    (inside / "two.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert_refused(inside, 6, ["two.safetensors", "link"])


@pytest.mark.parametrize("filler", [b"[],", b"{},", b"1,"], ids=["lists", "objects", "numbers"])
def test_a_header_of_brackets_is_refused_without_filling_the_memory(tmp_path, filler):
    model(tmp_path)
    content = b'{"a":[' + filler * (90_000_000 // len(filler)) + b"0]}"
    set_header(tmp_path, content)
    code = (
        "from pathlib import Path\n"
        "from qtool.checkpoint.locate import locate\n"
        "from qtool.errors import DamagedError\n"
        f"try: locate({str(tmp_path)!r})\n"
        "except DamagedError: print(Path('/proc/self/status').read_text())\n"
    )
    result = run_python(code)
    peak = next(line for line in result.stdout.splitlines() if line.startswith("VmHWM:"))
    assert int(peak.split()[1]) < 300_000  # KiB


def test_a_file_cut_while_it_is_read_is_an_error_and_not_a_crash(tmp_path):
    model(tmp_path)
    refs = checkpoint_refs(tmp_path)
    with TensorReader(refs) as reader:
        reader.read("lm_head.weight")
        os.truncate(tmp_path / SINGLE, 200)
        with pytest.raises(DamagedError, match="cut short"):
            reader.read("model.embed_tokens.weight")


def test_a_file_gone_since_its_header_was_read_is_named(tmp_path):
    model(tmp_path)
    refs = checkpoint_refs(tmp_path)
    (tmp_path / SINGLE).unlink()
    with TensorReader(refs) as reader, pytest.raises(DamagedError, match=SINGLE):
        reader.read("lm_head.weight")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    weight = torch.ones(4, 8)
    weight[1, 2] = torch.nan
    save_file({"model.embed_tokens.weight": weight}, tmp_path / SINGLE)
    with (
        TensorReader(checkpoint_refs(tmp_path)) as reader,
        pytest.raises(NumericalError, match=r"model\.embed_tokens\.weight.*\[1, 2\]") as caught,
    ):
        check_finite("model.embed_tokens.weight", reader.read("model.embed_tokens.weight"))
    assert caught.value.exit_code == 8
