"""What qtool keeps for a later run - logits, records of rungs - is checked like any file."""

import hashlib
import json
import os

import pytest
import torch
from builders.refusals import snapshot
from builders.tiny_models import tiny_model
from safetensors.torch import load, save

from qtool.checkpoint.locate import locate
from qtool.errors import QtoolError
from qtool.evaluation.cache_directory import WEIGHTS_FILE, identity
from qtool.evaluation.logits_cache import DIGEST_BYTES, LogitsCache
from qtool.evaluation.scores import row_pieces

WINDOWS, LENGTH, VOCABULARY = 2, 40, 300


def ids():
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=draw)


@pytest.fixture
def cache(tmp_path):
    """A cache with every window, and the file of the first."""
    made = LogitsCache(tmp_path / "cache", {"reference": "x"}, ids(), VOCABULARY)
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(WINDOWS, LENGTH, VOCABULARY, generator=draw)
    for index in range(WINDOWS):
        made.save(index, row_pieces(logits[index : index + 1]))
    assert made.missing() == ([], 0)
    return made, made._path(0)


def sealed(content):
    return hashlib.sha256(content).digest() + content


def with_tensors(path, **changes):
    tensors = {**load(path.read_bytes()[DIGEST_BYTES:]), **changes}
    path.write_bytes(sealed(save({k: v for k, v in tensors.items() if v is not None})))


def endless(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def huge(path):
    with path.open("r+b") as file:
        file.truncate(1 << 40)


SPOILT = {
    "a pipe": pipe,
    "zeros without end": endless,
    "a terabyte": huge,
    "sealed nonsense": lambda p: p.write_bytes(sealed(b"nonsense")),
    "sealed nothing": lambda p: p.write_bytes(sealed(b"")),
    "a header of absurd length": lambda p: p.write_bytes(sealed(b"\xff" * 64)),
    "a tensor missing": lambda p: with_tensors(p, tail=None),
    "losses that are none": lambda p: with_tensors(p, losses=torch.full((LENGTH,), torch.nan)),
    "losses that are integers": lambda p: with_tensors(p, losses=torch.zeros(LENGTH).long()),
    "tokens beyond the vocabulary": lambda p: with_tensors(
        p, ids=torch.full_like(load(p.read_bytes()[DIGEST_BYTES:])["ids"].int(), VOCABULARY)
    ),
    "tokens that are fractions": lambda p: with_tensors(p, likeliest=torch.zeros(LENGTH)),
    "another length": lambda p: with_tensors(p, tail=torch.zeros(LENGTH - 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_window_is_computed_again(cache, name):
    made, path = cache
    SPOILT[name](path)
    assert made.missing() == ([0], 1)
    draw = torch.Generator().manual_seed(3)
    made.save(0, row_pieces(torch.randn(1, LENGTH, VOCABULARY, generator=draw)))
    assert made.missing() == ([], 0)
    assert path.is_file()
    assert not path.is_symlink()


def test_nothing_is_written_through_a_link(tmp_path, cache):
    made, path = cache
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    path.unlink()
    path.symlink_to(precious)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.symlink_to(precious)
    made.save(0, row_pieces(torch.randn(1, LENGTH, VOCABULARY)))
    assert precious.read_bytes() == b"precious"
    assert made.missing() == ([], 0)


def test_a_link_in_place_of_the_folder_is_refused(tmp_path, cache):
    folder = cache[1].parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(QtoolError, match="is a link"):
        LogitsCache(tmp_path / "cache", {"reference": "x"}, ids(), VOCABULARY)


WEIGHTS = {
    "deep": b'{"a":' + b"[" * 100_000,
    "a list": b"[]",
    "not UTF-8": b"\xff",
    "entries of other shapes": b'{"FILE": [SIZE, TIME, {"a": 1}]}',
    "a hash that is none": b'{"FILE": [SIZE, TIME, "../../x"]}',
    "a pipe": None,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_notes_of_hashes_are_made_again(tmp_path, name):
    directory = tiny_model("llama", tmp_path / "model", layers=1)
    checkpoint = locate(str(directory))
    expected = identity(checkpoint, tmp_path / "sound")
    place = tmp_path / "cache"
    place.mkdir()
    if WEIGHTS[name] is None:
        os.mkfifo(place / WEIGHTS_FILE)
    else:
        file = directory / "model.safetensors"
        state = file.stat()
        content = WEIGHTS[name].replace(b"FILE", str(file).encode())
        content = content.replace(b"SIZE", str(state.st_size).encode())
        content = content.replace(b"TIME", str(state.st_mtime_ns).encode())
        (place / WEIGHTS_FILE).write_bytes(content)
    assert identity(checkpoint, place) == expected


# --- ladders ------------------------------------------------------------------------------------

LADDER = (
    "quantize", "model", "--ladder", "-n", "2", "-l", "16", "--set", "eval.context=16",
    "--set", "eval.windows=2", "-q",
)  # fmt: skip
FAILS = ("--gate", "kld<=-1")  # so that everything that was tried is kept


@pytest.fixture(scope="module")
def kept(tmp_path_factory, warm_server):
    """A directory with a model and what a ladder without a winner leaves."""
    place = tmp_path_factory.mktemp("kept")
    size = {"layers": 1, "hidden": 128, "intermediate": 256}
    tiny_model("llama", place / "model", dtype=torch.bfloat16, **size)
    done = warm_server.run(*LADDER, *FAILS, cwd=place, seconds=200)
    assert done.code == 3, done.err
    return place


def records(place):
    found = sorted((place / ".model-ladder.qtool" / "rungs").glob("*/rung.json"))
    assert found
    return found


def changed(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


RECORDS = {
    "deep": lambda p: p.write_text("[" * 100_000),
    "a list": lambda p: p.write_text("[]"),
    "large": lambda p: p.write_text('{"key":"' + "x" * (17 << 20) + '"}'),
    "no figures": lambda p: changed(p, lambda r: r.update(result={})),
    "figures that are text": lambda p: changed(p, lambda r: r["result"]["metrics"].update(kld="x")),
    "figures of other shapes": lambda p: changed(
        p, lambda r: r["result"]["metrics"].update(top1={"value": [1]})
    ),
    "seconds that are text": lambda p: changed(p, lambda r: r.update(seconds="x")),
    "files that are a number": lambda p: changed(p, lambda r: r.update(files=3)),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_nonsense_is_of_nothing(kept, name):
    from qtool.pipeline.ladder import _record

    path = records(kept)[0]
    sound = path.read_text()
    key = json.loads(sound)["key"]
    assert _record(path, key) is not None
    try:
        RECORDS[name](path)
        assert _record(path, key) is None
    finally:
        path.write_text(sound)


@pytest.mark.parametrize("kind", ["link", "pipe", "out"])
def test_links_and_pipes_in_a_ladder_are_refused(kept, warm_server, tmp_path, kind):
    path = records(kept)[0]
    place = path.parent / "out2" if kind == "out" else path
    sound = path.read_bytes()
    if kind != "out":
        path.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to("/dev/zero" if kind == "link" else tmp_path)
    before = snapshot(tmp_path)
    try:
        done = warm_server.run(*LADDER, *FAILS, cwd=kept, seconds=100)
    finally:
        place.unlink()
        path.write_bytes(sound)
    assert done.code == 2, done.err
    assert place.name in done.message
    assert snapshot(tmp_path) == before


def test_an_output_of_a_rung_that_was_changed_does_not_win(kept, warm_server):
    (out,) = (kept / ".model-ladder.qtool" / "rungs").glob("*/out")
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 0x40
    weights.write_bytes(content)
    (out / "evil.py").write_text("import os")
    done = warm_server.run(*LADDER, "--gate", "kld<=100", cwd=kept, seconds=200)
    assert done.code == 0, done.err
    made = next(path for path in kept.glob("model-*") if path.is_dir())
    assert not (made / "evil.py").exists()
    assert (made / "model.safetensors").read_bytes() != bytes(content)
