"""Results go to stdout, all else to stderr; readers may leave, and a run may be told to end."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from builders.command_line import ROOT, SMALL
from builders.tiny_models import tiny_model

from qtool.cli.app import run


def start(*arguments, **settings):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "qtool", *map(str, arguments)]
    started = {"env": environment, "preexec_fn": _heed_ctrl_c, **settings}
    return subprocess.Popen(command, **started)


def _heed_ctrl_c():
    """A shell starts background jobs with Ctrl-C ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_progress_is_on_stderr_one_line_for_each_block_off_a_terminal(here, qtool):
    outcome = qtool("quantize", "./model", "-m", "gptq", *SMALL, "--eval", "none")
    lines = [line for line in outcome.err.splitlines() if line.startswith("quantizing: block")]
    expected = r"quantizing: block {} of 2, error 0\.\d+, \d+\.\d\d x rtn, \d+ s, \d+ s left"
    assert len(lines) == 2
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(expected.format(number), line)
    assert "block 1 of" not in outcome.out
    assert outcome.out.splitlines()[0].split() == ["wrote", "./model-gptq-w4g128"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "./model", "-m", "gptq", *SMALL),
        ("calibrate", "./model", "-o", "stats.gguf", *SMALL),
        ("eval", "./model", "--ctx", "32", "-n", "2"),
        ("inspect", "./model"),
    ],
)
def test_quiet_leaves_the_result_alone(here, qtool, arguments):
    outcome = qtool(*arguments, "-q")
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.splitlines()[-1].startswith("next: qtool ")


def test_without_progress_the_plan_is_still_announced(here, qtool, monkeypatch):
    arguments = ("quantize", "./model", "-m", "rtn", "--eval", "none", "--overwrite")
    assert len(qtool(*arguments, "--no-progress").err.splitlines()) == 1
    monkeypatch.setenv("QTOOL_NO_PROGRESS", "1")
    assert len(qtool(*arguments).err.splitlines()) == 1


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_reader_that_leaves_early_is_no_failure(here, as_json):
    reading, writing = os.pipe()
    os.close(reading)  # as if `head` had left before the first line
    arguments = ("inspect", "./model", "--tensors", *as_json)
    process = start(*arguments, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_a_full_disk_under_stdout_is_said_in_two_lines(here, as_json):
    with Path("/dev/full").open("w") as full:
        process = start("inspect", "./model", *as_json, stdout=full, stderr=subprocess.PIPE)
    lines = process.communicate(timeout=60)[1].decode().splitlines()
    assert process.returncode == 4
    assert [line[:6] for line in lines] == ["error:", "  try:"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_an_interrupted_run_ends_with_130_and_is_gone_on_with(here, number):
    tiny_model("llama", here / "deep", layers=8)
    arguments = ("quantize", "./deep", "-m", "gptq", "-g", "32", "-n", "64", "-l", "128", "--json")
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("block 1 of 8" in line for line in process.stderr)
    assert any(path.name.startswith(".deep-gptq") for path in here.iterdir())
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(out)["error"]["resumable"]
    assert "Traceback" not in err
    assert "error: interrupted" in err
    kept = int(re.search(r"run the same command to go on: (\d+) of 8 blocks", err)[1])
    assert 1 <= kept < 8
    names = sorted(path.name for path in here.iterdir())
    assert names == [".deep-gptq-w4g32.qtool", "deep", "model"]
    again = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert f"continuing: {kept} of 8 blocks are finished" in err
    assert "block 1 of 8" not in err
    assert sorted(path.name for path in here.iterdir()) == ["deep", "deep-gptq-w4g32", "model"]


def on_a_terminal(*arguments):
    """Run with stderr on a terminal; return what it was sent, and the exit code."""
    ours, theirs = pty.openpty()
    process = start(*arguments, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    received = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        received += chunk
    os.close(ours)
    return received.decode(), process.wait(timeout=60)


@pytest.mark.slow
def test_a_terminal_sees_block_linear_error_and_time(originals, here):
    shown, code = on_a_terminal("quantize", "./model", "-m", "gptq", "-n", "64", "-l", "256")
    assert code == 0
    line = r"quantizing.*block 1 of 2 .*0:00:\d\d.* left .*\w+_proj: error 0\.\d{4}, \d\.\d\d x rtn"
    assert re.search(line, shown)
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is back


@pytest.mark.slow
def test_a_failure_gives_the_terminal_its_cursor_back(originals, here):
    shown, code = on_a_terminal("quantize", originals / "spoiled" / "nan", "-m", "gptq", *SMALL)
    assert code == 8
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    assert "up_proj.weight" in shown


def test_a_bug_is_one_line_and_a_traceback_only_with_verbose(here, qtool, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr("qtool.cli.inspect_model.inspect_model", broken)
    outcome = qtool("inspect", "./model")
    assert outcome.code == 1
    assert outcome.err.splitlines()[0] == "error: ZeroDivisionError: nobody thought of this"
    assert "Traceback" not in outcome.err
    assert "Traceback" in qtool("inspect", "./model", "-v").err


def test_running_out_of_memory_does_not_fit(here, qtool, monkeypatch):
    def starved(*_, **__):
        raise MemoryError

    monkeypatch.setattr("qtool.cli.inspect_model.inspect_model", starved)
    assert qtool("inspect", "./model").code == 4


def test_names_from_files_cannot_drive_the_terminal(here, qtool):
    (here / "model").rename(here / "mo\x1b[31mdel")
    outcome = qtool("inspect", "./mo\x1b[31mdel")
    assert outcome.code == 0
    assert "\x1b" not in outcome.out + outcome.err


def test_the_version_is_a_result(qtool):
    assert re.fullmatch(r"qtool \d+\.\d+\.\d+\n", qtool("--version").out)


def test_run_returns_the_exit_code_and_never_exits(here, capsys):
    assert run(["inspect", "./nowhere"]) == 2


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 4), (errno.EIO, 6)])
def test_trouble_of_the_disk_is_no_bug_wherever_it_comes_up(here, qtool, monkeypatch, number, code):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number), "/tmp/somewhere")

    monkeypatch.setattr("qtool.cli.inspect_model.run_inspect", fails)
    outcome = qtool("inspect", "./model", "--json")
    assert outcome.code == code
    assert f"/tmp/somewhere: {os.strerror(number)}" in outcome.err
