"""Names are data: on a terminal, in YAML, Markdown, HTML, checksums and shell commands alike."""

import json
import re
import shlex
import shutil
import subprocess
import types
from itertools import pairwise

import pytest
import torch
import yaml
from builders.llama_gguf import llama_gguf
from builders.refusals import snapshot
from builders.tiny_models import tiny_model

from qtool.evaluation.report import write_report
from qtool.pipeline.artifact import write_sums
from qtool.pipeline.card import original_card

# A terminal's escapes (CSI, OSC 8 and 52, C1), bidi and zero width, markup of rich, Markdown, HTML
# and YAML, and what would end a comment, a line, a string or a command.
EVIL = (
    "a\x1b[2J\x1b]8;;http:x\x07\x1b]52;c;AA\x07\x9b\u202e\u200b[bold][red]`|*_<script>alert(1)<x>'\""
    "; touch MARKER;$(touch MARKER)\nbase_model: evil\n---\nlicense: evil"
)
# A colon ends the name of a data set, and there is no line end in one.
TEXT = f"{EVIL.replace(':', '')}.txt".replace("\n", " ")
SMALL = ("-l", "32", "-n", "2")


@pytest.fixture(scope="module")
def here(tmp_path_factory, warm_server):
    """A directory with a model of that name, and what qtool makes of it."""
    place = tmp_path_factory.mktemp("here")
    tiny_model("llama", place / EVIL, dtype=torch.bfloat16, layers=1)
    llama_gguf(place / EVIL, place / f"{EVIL}.gguf", "F16")
    words = [" ".join(f"w{i}" for i in range(400))] * 4
    (place / TEXT).write_text("\n\n".join(words))
    done = warm_server.run(
        "quantize", EVIL, "-m", "gptq", "-g", "32", "-d", TEXT, *SMALL,
        "-o", f"{EVIL}-out", cwd=place, seconds=200,
    )  # fmt: skip
    assert done.code == 0, done.err
    return types.SimpleNamespace(place=place, out=place / f"{EVIL}-out", done=done)


def harmless(text):
    """Nothing but what a terminal shows, and the ends of lines."""
    assert all(c.isprintable() or c == "\n" for c in text), ascii(text)


COMMANDS = {
    "inspect": ("inspect", EVIL),
    "inspect gguf": ("inspect", f"{EVIL}.gguf", "--tensors"),
    "inspect two": ("inspect", EVIL, "--diff", EVIL),
    "estimate-memory": ("estimate-memory", EVIL),
    "quantize, planned": ("quantize", EVIL, "-m", "rtn", "-g", "32", "-o", "o", "--dry-run"),
    "eval": ("eval", EVIL, f"{EVIL}-out", "--ref", EVIL, "--data", TEXT, *SMALL),
    "export": ("export", EVIL, "-f", "gguf:Q8_0", "-o", "x.gguf", "--dry-run"),
    "absent": ("inspect", f"{EVIL}-absent"),
}


@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_lets_a_terminal_obey_a_name(warm_server, here, name, json_too):
    arguments = (*COMMANDS[name], *(["--json"] if json_too else []))
    ended = warm_server.run(*arguments, cwd=here.place, seconds=200)
    assert ended.code == (0 if name != "absent" else ended.code), ended.err
    assert ended.code in {0, 2, 6}
    assert "Traceback" not in ended.err
    harmless(ended.out)
    harmless(ended.err)
    assert "[bold][red]" in ended.out + ended.err  # shown as it is, not as markup
    if json_too and not ended.code:
        json.loads(ended.out)


def test_quantize_says_what_it_did_without_obeying_a_name(here):
    harmless(here.done.out)
    harmless(here.done.err)


def test_the_card_is_one_block_of_metadata_and_plain_text(here):
    text = (here.out / "README.md").read_text()
    harmless(text)
    _, front, body = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert set(found) == {"base_model", "base_model_relation", "library_name", "tags"}
    assert found["base_model"].startswith("a\\x1b[2J")
    assert "<script" not in re.sub(r"`[^`]*`", "", body.replace("\\`", ""))
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in tables)


def test_a_name_ends_neither_the_comment_of_a_recipe_nor_its_command(here, tmp_path):
    text = (here.out / "qtool-recipe.yaml").read_text()
    harmless(text)
    assert "license" not in yaml.safe_load(text)
    (command,) = [line[1:] for line in text.splitlines() if "qtool quantize" in line]
    words = shlex.split(command)
    assert words[:2] == ["qtool", "quantize"]
    assert words[3:] == ["--recipe", "qtool-recipe.yaml"]
    subprocess.run(["sh", "-c", f"true {command}"], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


def test_checksums_of_any_file_name_are_those_of_coreutils(tmp_path):
    for name in ("plain", "two\nlines", "back\\slash", "c\rr", "deadbeef  x"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path, {})
    subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path, check=True,
                   capture_output=True)  # fmt: skip
    assert len((tmp_path / "SHA256SUMS").read_bytes().split(b"\n")) == 6
    found = (tmp_path / "SHA256SUMS").read_text()
    shutil.copy(tmp_path / "SHA256SUMS", tmp_path / "ours")
    names = ["./plain", "./two\nlines", "./back\\slash", "./c\rr", "./deadbeef  x"]
    theirs = subprocess.run(["sha256sum", *names], cwd=tmp_path, check=True, capture_output=True)
    assert sorted(found.split("\n")) == sorted(theirs.stdout.decode().replace("./", "").split("\n"))


def test_the_report_holds_every_name_as_text(here, warm_server):
    arguments = (
        *COMMANDS["eval"], "--gate", "kld<=100", "--report", "report",
    )  # fmt: skip
    ended = warm_server.run(*arguments, cwd=here.place, seconds=200)
    assert ended.code == 0, ended.err
    found = {p.name: p for p in (here.place / "report").rglob("*") if p.is_file()}
    assert {"index.html", "REPORT.md", "report.json"} <= set(found)
    for name, path in found.items():
        if path.suffix == ".png":
            continue
        text = path.read_text()
        assert "<script>alert" not in text or name == "report.json", name
        harmless(text)


CARDS = {
    "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in pairwise("abcdefghi")),
    "an object": "license: !!python/object/apply:os.system ['touch MARKER']",
    "a tag": "license: !evil mit",
    "deep": "license: " + "[" * 5000 + "]" * 5000,
    "an alias of itself": "license: &a [*a]",
    "a date": "license: 2026-01-01",
    "a number": "license: 1e400",
    "a mapping": "license: {a: {b: c}}",
    "lists of lists": "language: [[en], [de]]",
    "not YAML": "license: [",
    "a list": "- license",
    "nothing": "",
    "a key twice": "license: a\nlicense: b",
    "half a surrogate pair": 'license: "\\ud800"',
    "large": "x: " + "y" * (1 << 20),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_that_is_no_plain_words_gives_nothing(tmp_path, name):
    (tmp_path / "README.md").write_text(f"---\n{CARDS[name]}\n---\n\ntext\n")
    found = original_card(tmp_path)
    if name == "half a surrogate pair":  # escaped, if it is taken at all
        json.dumps(found).encode("ascii")
        assert all(value.isprintable() for value in found.values())
    else:
        assert found == {}


def test_a_card_is_read_like_any_file_of_a_stranger(tmp_path):
    import os

    assert original_card(tmp_path) == {}
    os.mkfifo(tmp_path / "README.md")
    assert original_card(tmp_path) == {}
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("/dev/zero")
    assert original_card(tmp_path) == {}
    (tmp_path / "README.md").unlink()
    with (tmp_path / "README.md").open("wb") as file:
        file.write(b"---\r\nlicense: mit\r\nlanguage:\r\n- en\r\n- zh\r\n---\r\n\xff\xfe")
        file.truncate(1 << 40)
    assert original_card(tmp_path) == {"license": "mit", "language": ["en", "zh"]}


def test_a_report_is_written_for_any_names(tmp_path):
    metrics = {"ppl": {"value": 3.0, "reference": 2.0, "ratio": 1.5}, "kld": {"mean": 0.1}}
    metrics["tasks"] = {EVIL: {"metric": EVIL, "value": 0.5, "samples": 3}}
    row = {"model": EVIL, "format": EVIL, "bytes": 10, "metrics": metrics, "domains": {EVIL: {}}}
    row["layers"] = [{"name": EVIL, "relative_error": 0.1, "bits_per_weight": 4.0}]
    result = {
        "reference": {"model": EVIL}, "results": [row], "data": {EVIL: EVIL}, "gates": [
            {"expression": f"task:{EVIL}>=1", "model": EVIL, "value": EVIL, "pass": False}
        ], "warnings": [{"code": EVIL, "message": f"{EVIL}\u2028</script>"}],
    }  # fmt: skip
    write_report(result, tmp_path / "r")
    for path in (tmp_path / "r").rglob("*"):
        if path.suffix in {".html", ".md", ".svg"}:
            text = path.read_text()
            harmless(text)
            assert "<script>alert" not in text


@pytest.mark.parametrize("text", ["[bold]x", "[/x]", "[link=http://x]y[/link]", ":smile:"])
def test_brackets_in_a_cell_or_a_title_are_no_markup(capsys, text):
    from rich.table import Table

    from qtool.console import Terminal

    table = Table(text, title=text)
    table.add_row(text)
    Terminal().result({}, table)
    assert capsys.readouterr().out.count(text) == 3


@pytest.mark.parametrize(
    ("place", "said"), [("model/report", "inside the model"), ("f/x", "not a directory")]
)
def test_a_report_that_cannot_be_is_refused_before_the_evaluation(server, tmp_path, place, said):
    tiny_model("llama", tmp_path / "model")
    (tmp_path / "f").write_text("somebody's")
    before = snapshot(tmp_path)
    ended = server.run("eval", "model", "--report", place, cwd=tmp_path)
    assert ended.code == 2, ended.err
    assert said in ended.message
    assert not ended.heavy
    assert snapshot(tmp_path) == before
