"""What lies hidden beside an output is untrusted, too: it may have come with somebody's archive.

One property: a refusal that names what is wrong, or the right result; whatever lies elsewhere is
neither written, nor removed, nor read without end.
"""

import hashlib
import json
import os
import shutil

import pytest
import torch
from builders.interruptions import Stops, digests, run
from builders.plans import plan_of, random_windows
from builders.tiny_models import tiny_model

from qtool.checkpoint.output import OutputDirectory, OutputFile
from qtool.checkpoint.work_contents import MOST_LEVELS
from qtool.checkpoint.work_directory import WorkDirectory, work_path
from qtool.errors import InterruptionError, QtoolError, UsageError
from qtool.pipeline import journal as journals
from qtool.pipeline.journal import Journal

CPU = torch.device("cpu")
LAYERS, AFTER = 3, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, and what an uninterrupted run makes of it in two formats."""
    base = tmp_path_factory.mktemp("models")
    model = tiny_model("llama", base / "model", layers=LAYERS, dtype=torch.bfloat16)
    found = {}
    for kind in ("gptq", "gguf:Q4_0"):
        plan = plan_of(model, method="gptq", formats=(kind,))
        out = base / kind.partition(":")[0] / "out"
        run(plan, out, device=CPU, windows=windows())
        left = out.parent / "left" / "out"
        with pytest.raises(InterruptionError):
            run(plan, left, Stops(AFTER), device=CPU, windows=windows())
        found[kind] = (plan, digests(out), work_path(left))
    return found


def windows():
    return random_windows(4, 16, seed=1)


@pytest.fixture
def left(models, tmp_path, request):
    """A plan, the bytes it should give, the output, and an interrupted run's directory beside."""
    plan, expected, work = models[getattr(request, "param", "gptq")]
    out = tmp_path / "out"
    shutil.copytree(work, work_path(out))
    return plan, expected, out


def somewhere(tmp_path):
    """A directory with files that nobody may touch."""
    place = tmp_path / "elsewhere"
    (place / "sub").mkdir(parents=True)
    (place / "precious").write_bytes(b"precious" * 100)
    return place


def again(left, **settings):
    plan, _, out = left
    run(plan, out, device=CPU, windows=windows(), **settings)


def entries(work):
    """Everything that an interrupted run leaves."""
    return sorted(p.relative_to(work).as_posix() for p in work.rglob("*"))


def replaced_by(kind, path, place):
    """Put a link, a pipe or a second name where something was."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "a link to a file":
        path.symlink_to(place / "precious")
    elif kind == "a link to a directory":
        path.symlink_to(place)
    elif kind == "a link to nothing":
        path.symlink_to(place / "new")
    elif kind == "a link to zeros":
        path.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        os.link(place / "precious", path)


KINDS = [
    "a link to a file", "a link to a directory", "a link to nothing", "a link to zeros", "a pipe",
    "a second name",
]  # fmt: skip


@pytest.mark.parametrize("left", ["gptq", "gguf:Q4_0"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_links_and_pipes_anywhere_in_it_are_refused(left, tmp_path, kind):
    _, _, out = left
    work = work_path(out)
    sound = tmp_path / "sound"
    shutil.copytree(work, sound)
    place = somewhere(tmp_path)
    before = digests(place)
    names = entries(work)
    assert {"lock", "journal.jsonl", "result", "states"} <= set(names)
    for name in names:
        shutil.rmtree(work)
        shutil.copytree(sound, work)
        replaced_by(kind, work / name, place)
        if name == "lock" and kind == "a second name":
            continue  # locked, never written
        with pytest.raises(UsageError) as caught:
            again(left)
        assert name in caught.value.message
        assert digests(place) == before
        assert not (place / "new").exists()
        assert not out.exists()


@pytest.mark.parametrize("name", ["README.md", "config.json", "SHA256SUMS", "sub", "x.partial"])
def test_links_in_place_of_what_is_copied_beside_the_weights_are_refused(left, tmp_path, name):
    place = somewhere(tmp_path)
    before = digests(place)
    (work_path(left[2]) / "result" / name).symlink_to(place / "precious")
    with pytest.raises(UsageError, match=name):
        again(left)
    again(left, resume=False)
    assert digests(place) == before
    assert digests(left[2]) == left[1]


def test_files_that_do_not_belong_to_the_result_do_not_get_into_it(left):
    _, expected, out = left
    result = work_path(out) / "result"
    (result / "modeling.py").write_text("import os")
    (result / "sub").mkdir()
    (result / "sub" / "pytorch_model.bin").write_bytes(b"pickle")
    again(left)
    assert digests(out) == expected


def test_a_tree_without_end_is_refused(left):
    place = work_path(left[2]) / "states"
    for _ in range(MOST_LEVELS + 1):
        place /= "d"
        place.mkdir()
    for resume in (True, False):
        with pytest.raises(UsageError, match="deep"):
            again(left, resume=resume)


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_something_else_in_place_of_the_whole_is_refused(tmp_path, kind):
    work = work_path(tmp_path / "out")
    os.mkfifo(work) if kind == "pipe" else work.write_bytes(b"")
    with pytest.raises(UsageError, match="not a directory"), OutputDirectory(tmp_path / "out"):
        pass


MARKERS = {
    "deep": b'{"first":' + b"[" * 100_000,
    "large": b'{"first":"' + b"x" * (17 << 20) + b'"}',
    "no object": b"[]",
    "names are a list": b'{"first":"/","inodes":["a"]}',
    "a null byte": b'{"first":"a\\u0000b","inodes":{"out":1}}',
    "a null byte in a name": b'{"first":"SELF","inodes":{"o\\u0000ut":1}}',
    "half a surrogate pair": b'{"first":"\\ud800","inodes":{"out":1}}',
    "absurd inode": b'{"first":"SELF","inodes":{"out":1e400}}',
    "an inode of 5000 digits": b'{"first":"SELF","inodes":{"out":' + b"9" * 5000 + b"}}",
    "not UTF-8": b'{"first":"\xff","inodes":{}}',
}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", MARKERS)
def test_a_marker_that_makes_no_sense_is_none(tmp_path, name, resume):
    out = tmp_path / "out"
    work = work_path(out)
    work.mkdir()
    (work / "committing").write_bytes(MARKERS[name].replace(b"SELF", str(work).encode()))
    assert WorkDirectory(out).pending() == {}
    with OutputDirectory(out, resume=resume):
        assert not (work / "committing").exists()
    assert not work.exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_something_else_in_place_of_the_marker_is_refused(tmp_path, kind):
    work = work_path(tmp_path / "out")
    work.mkdir()
    marker = work / "committing"
    if kind == "pipe":
        os.mkfifo(marker)
    elif kind == "link":
        marker.symlink_to("/dev/zero")
    else:
        marker.mkdir()
    assert WorkDirectory(tmp_path / "out").pending() == {}
    with pytest.raises(QtoolError, match=r"\.out\.qtool"), OutputDirectory(tmp_path / "out"):
        pass


@pytest.mark.parametrize("kind", [OutputDirectory, OutputFile])
@pytest.mark.parametrize("resume", [True, False])
def test_a_marker_moves_nothing_that_is_not_its_outputs(tmp_path, kind, resume):
    """Even where it knows who is who."""
    out = tmp_path / ("out.gguf" if kind is OutputFile else "out")
    place = somewhere(tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other")
    before = digests(place)
    work = work_path(out)
    work.mkdir()
    inodes = {path.name: path.stat().st_ino for path in (place, other)}
    for names in (inodes, {"..": tmp_path.stat().st_ino}, {".": tmp_path.stat().st_ino}):
        marker = {"first": str(work), "inodes": names}
        work.mkdir(exist_ok=True)
        (work / "committing").write_text(json.dumps(marker))
        with kind(out, resume=resume):
            pass
        assert digests(place) == before
        assert other.read_bytes() == b"other"


# --- the journal --------------------------------------------------------------------------------


def line(entry):
    body = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return b"%s %s\n" % (hashlib.sha256(body).hexdigest().encode(), body)


def read(content):
    """The entries of a journal."""
    return [json.loads(text.partition(b" ")[2]) for text in content.splitlines()]


def changed_block(path, value):
    """A function that changes one value of a block's entry."""

    def change(block):
        place = block
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


SHAPES = {
    "a negative index": changed_block(["index"], -1),
    "a huge index": changed_block(["index"], 10**30),
    "an index beyond the model": changed_block(["index"], LAYERS),
    "an index that is text": changed_block(["index"], "0"),
    "an index that is true": changed_block(["index"], True),
    "tensors are a number": changed_block(["tensors"], 1),
    "tensors are missing": changed_block(["tensors"], [[]]),
    "a tensor with a path": changed_block(["tensors", 0, 0], "../../x"),
    "tensors that are numbers": changed_block(["tensors", 0], [1, 2]),
    "no digest": changed_block(["digests"], []),
    "digests that are none": changed_block(["digests"], [None]),
    "layers with other keys": changed_block(["layers", 0], {"evil": 1}),
    "layers that are text": changed_block(["layers"], "abc"),
    "warnings of three": changed_block(["warnings"], [["a", "b", "c"]]),
    "seconds without end": changed_block(["seconds"], float("inf")),
    "seconds that are none": changed_block(["seconds"], float("nan")),
    "negative seconds": changed_block(["seconds"], -1e9),
    "a state file elsewhere": changed_block(["hidden", "hidden", "name"], "../../x"),
    "a state file that is absolute": changed_block(["hidden", "hidden", "name"], "/dev/zero"),
    "a state file with a null byte": changed_block(["hidden", "hidden", "name"], "hidden\0.bin"),
    "states that are a list": changed_block(["hidden"], []),
    "states of another stream": changed_block(["hidden"], {}),
    "what changed is elsewhere": changed_block(["changed"], {"name": "../x", "sha256": "0" * 64}),
    "what changed is text": changed_block(["changed"], "x"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_line_of_another_shape_spoils_itself_only(left, name):
    """Its checksum is right: whoever makes it up can compute that."""
    _, expected, out = left
    path = work_path(out) / "journal.jsonl"
    found = read(path.read_bytes())
    SHAPES[name](found[-1]["block"])
    path.write_bytes(b"".join(map(line, found)))
    again(left)
    assert digests(out) == expected


LINES = {
    "no object": b"[1,2]",
    "a run that is a list": b'{"run":[],"block":null}',
    "deep": b'{"run":"x","identity":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    "a bomb": b'{"run":"x","identity":{"a":[' + b"[]," * 3_500_000 + b"[]]}}",
    "an identity that is text": b'{"run":"x","identity":"x"}',
    "threads without end": b'{"run":"x","identity":{"threads":1e999}}',
    "numbers of 5000 digits": b'{"run":"x","identity":{"threads":' + b"9" * 5000 + b"}}",
    "not UTF-8": b'{"run":"\xff"}',
}


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("name", LINES)
def test_a_line_of_nonsense_is_passed_over(left, name, where):
    _, expected, out = left
    path = work_path(out) / "journal.jsonl"
    content, bad = path.read_bytes(), line(LINES[name])
    path.write_bytes(bad + content if where == "before" else content + bad)
    again(left)
    assert digests(out) == expected


def test_a_line_longer_than_any_is_passed_over_in_pieces(left, monkeypatch):
    _, expected, out = left
    path = work_path(out) / "journal.jsonl"
    content = path.read_bytes()
    monkeypatch.setattr(journals, "MAX_LINE_BYTES", 2 * max(map(len, content.splitlines())))
    path.write_bytes(b"x" * (1 << 20) + b"\n" + content)
    again(left)
    assert digests(out) == expected


def test_a_journal_larger_than_any_is_refused_unread(left):
    path = work_path(left[2]) / "journal.jsonl"
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(QtoolError, match=r"journal\.jsonl has"):
        again(left)
    again(left, resume=False)
    assert digests(left[2]) == left[1]


def test_a_state_file_larger_than_its_stream_is_not_read(left):
    """Though the journal's digest be of all its zeros."""
    for path in (work_path(left[2]) / "states").glob("*.bin"):
        with path.open("r+b") as file:
            file.truncate(1 << 43)
    again(left)
    assert digests(left[2]) == left[1]


def test_what_an_earlier_run_was_is_said_without_obeying_it(tmp_path):
    evil = "\x1b]52;c;AAAA\x07\u202e"
    path = tmp_path / "journal.jsonl"
    Journal(path, {"seed": 0, "name": evil, "deep": {"a": evil}, evil: 1})
    block = {
        "index": 0, "tensors": [], "digests": [], "layers": [], "warnings": [], "seconds": 0.0,
        "changed": None, "hidden": {},
    }  # fmt: skip
    (head,) = read(path.read_bytes())
    path.write_bytes(line(head) + line({"run": head["run"], "block": block}))
    with pytest.raises(UsageError, match="name was") as caught:
        Journal(path, {"seed": 0, "name": "x", "deep": {"a": "y"}})
    assert caught.value.message.isprintable()
