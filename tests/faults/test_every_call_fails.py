"""The 1st, 2nd, ... n-th call to the file system fails, or is the last before the process dies.

Whatever it was: the exit code and message are right, nothing half-written has the result's name,
what was there is untouched, and the same command without the fault gives the bytes of a run that
nothing disturbed, with nothing left beside them.
"""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from builders.command_line import Outcome
from builders.faults import Faults, in_fork, listing, sampled
from builders.interruptions import digests
from builders.tiny_models import tiny_model

from qtool.cli.app import run
from qtool.cli.requests_to_end import heed_requests

SMALL = ("-n", "3", "-l", "24")
PLAIN = ("-g", "32", "--eval", "none")
INTEGERS = ("-m", "rtn", "-f", "compressed-tensors", *PLAIN)
TO_GGUF = ("-m", "rtn", "--eval", "none", "-f")
BEFORE = {  # what makes the older result of a command that replaces one
    "replaced directory": ("quantize", "model", *INTEGERS, "-b", "4", "-o", "out"),
    "replaced file": ("quantize", "wide", *TO_GGUF, "gguf:Q4_0", "-o", "x.gguf"),
    "replaced parts": (
        *("export", "wide", "-f", "gguf:F16", "--split-max-size", "500KB"),
        *("--modelfile", "-o", "x.gguf"),
    ),
}
COMMANDS = {
    "rtn": ("quantize", "model", *INTEGERS, "-b", "8", "-o", "out"),
    "gptq": ("quantize", "model", "-m", "gptq", *PLAIN, *SMALL, "-o", "out"),
    "awq to gguf": (
        *("quantize", "wide", "-m", "awq", "-f", "gguf:Q4_0"),
        *(*SMALL, "--eval", "none", "-o", "x.gguf"),
    ),
    "two plans": (
        *("quantize", "wide", "-m", "gptq", "-f", "gptq", "-f", "gguf:Q4_0"),
        *(*PLAIN, *SMALL, "-o", "out"),
    ),
    "replaced directory": ("quantize", "model", *INTEGERS, "-b", "8", "--overwrite", "-o", "out"),
    "replaced file": (
        *("quantize", "wide", *TO_GGUF, "gguf:Q8_0"),
        *("--overwrite", "-o", "x.gguf"),
    ),
    "replaced parts": (
        *("export", "wide", "-f", "gguf:Q8_0", "--split-max-size", "1MB"),
        *("--overwrite", "-o", "x.gguf"),
    ),
    "export to gguf": ("export", "wide", "-f", "gguf:Q8_0", "-o", "x.gguf"),
    "export to safetensors": ("export", "model", "-f", "safetensors:F32", "-o", "out"),
    "calibrate": ("calibrate", "model", *SMALL, "-o", "stats.gguf"),
    "report": ("eval", "model", "--ctx", "24", "-n", "2", "--report", "report"),
    "cache": (
        *("eval", "model", "--ref", "model", "--ctx", "24", "-n", "2"),
        *("--logits-cache", "cache"),
    ),
}
QUICK = {"export to safetensors"}  # the rest are slow
# Every so many calls one is tried, beside the first and last of each kind for each file; of those,
# only every so many where a command takes long, unless QTOOL_FAULTS=all: `make faults`.
STEP = 40
ALL = os.environ.get("QTOOL_FAULTS") == "all"
FEW = {"export to safetensors": 1, "rtn": 4, "replaced parts": 8}
FEWEST = 24
BLOCKS = 2  # of the models


def commands(names=COMMANDS):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, one with rows that ggml's blocks divide."""
    directory = tmp_path_factory.mktemp("models")
    tiny_model("llama", directory / "model", hidden=64, intermediate=128, dtype=torch.bfloat16)
    tiny_model("llama", directory / "wide", hidden=256, intermediate=512, dtype=torch.bfloat16)
    return directory


@pytest.fixture
def qtool(models, monkeypatch, capsys):
    """Run a command with its models from `models`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(arguments):
        capsys.readouterr()
        code = run([str(models / a) if a in {"model", "wide"} else a for a in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


def results(directory):
    """Name -> SHA-256 of what a user sees, but for files that hold times."""
    return {
        name: digest
        for name, digest in digests(directory).items()
        if not any(part.startswith(".") for part in Path(name).parts)
        and not name.startswith("report/")
        and name != "cache/weights.json"
    }


def tried(place, every=1):
    """Numbers of the calls that go wrong, one after the other."""
    few = 1 if ALL else FEW.get(place.name, FEWEST)
    return sampled(place.calls, STEP)[:: every * few]


class Place:
    """A working directory that is made as it was before each try."""

    def __init__(self, qtool, name, base, monkeypatch):
        self.name, self.qtool, self.arguments = name, qtool, COMMANDS[name]
        self.before, self.path = base / "before", base / "work"
        self.before.mkdir()
        self._chdir = monkeypatch.chdir
        self._chdir(self.before)
        if name in BEFORE:
            assert qtool(BEFORE[name]).code == 0
        self.old = results(self.before)
        self.fresh()
        with Faults(self.path) as faults:
            outcome = qtool(self.arguments)
        assert outcome.code == 0, outcome.err
        self.calls = faults.calls
        self.expected, self.expected_listing = results(self.path), listing(self.path)

    def fresh(self):
        self._chdir(self.before)
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.before, self.path)
        self._chdir(self.path)

    def holds_all_or_nothing(self, at, *, killed=False):
        now = results(self.path)
        if killed and self.arguments.count("-f") > 1:
            # Two directories cannot get their names in one instant: each is whole or not there.
            tops = {name.rsplit("/", 1)[0] for name in now}
            assert now == {k: v for k, v in self.expected.items() if k.rsplit("/", 1)[0] in tops}, (
                at
            )
        elif killed and self.arguments[-1].endswith(".gguf"):
            # Files of one model cannot get their names in one instant: each is the old one or the
            # new one, and the new model comes when all that belongs to it is there.
            for name, digest in now.items():
                assert digest in {self.old.get(name), self.expected.get(name)}, (at, name)
            main = self.arguments[-1]
            if now.get(main) not in {None, self.old.get(main)}:
                assert now == self.expected, at
        elif "--logits-cache" in self.arguments:  # each window is whole by itself
            assert now.items() <= self.expected.items(), at
        else:
            assert now in (self.old, self.expected), at

    def goes_on(self, at):
        """The command again: done, or the result is there already and is not replaced."""
        there = results(self.path) == self.expected
        again = self.qtool(self.arguments)
        assert again.code == 0 or (there and again.code == 2), (at, again)
        assert results(self.path) == self.expected, at
        assert listing(self.path) == self.expected_listing, at
        return again


@pytest.fixture
def place(qtool, tmp_path, monkeypatch):
    return lambda name: Place(qtool, name, tmp_path, monkeypatch)


def check_failing(place, number, code, **settings):
    call = place.calls[number - 1]
    at = (number, call)
    place.fresh()
    with Faults(place.path, number, **settings):
        outcome = place.qtool(place.arguments)
    assert outcome.code in {0, code}, (at, outcome)
    assert "Traceback" not in outcome.err, at
    place.holds_all_or_nothing(at)
    if outcome.code:
        assert "cannot write" in outcome.err, (at, outcome)
        output = place.arguments[-1]
        assert output in outcome.err or Path(call.path).name in outcome.err, (at, outcome)
    else:  # only where it does not matter to the result
        assert results(place.path) == place.expected, at
    place.goes_on(at)


@pytest.mark.parametrize("name", commands())
def test_a_full_disk_at_any_call(place, name):
    here = place(name)
    for number in tried(here):
        check_failing(here, number, 4, error=errno.ENOSPC)


@pytest.mark.parametrize("name", commands(["rtn", "awq to gguf", "two plans", "calibrate"]))
def test_a_disk_that_stays_full(place, name):
    here = place(name)
    for number in tried(here, 3):
        check_failing(here, number, 4, error=errno.ENOSPC, lasting=True)


@pytest.mark.parametrize(
    "name", commands(["rtn", "gptq", "replaced file", "replaced parts", "export to gguf"])
)
def test_a_broken_disk_at_any_call(place, name):
    here = place(name)
    for number in tried(here, 3):
        check_failing(here, number, 6, error=errno.EIO)


def ends(place, number, sent, after, times=1):
    """Run in a copy of this process that gets a signal at a call; return exit code and stderr."""
    place.fresh()
    said = place.before.parent / "said"

    def work():
        heed_requests()
        with Faults(place.path, number, number=sent, after=after, times=times):
            outcome = place.qtool(place.arguments)
        said.write_text(outcome.err)
        return outcome.code

    code = in_fork(work)
    return code, said.read_text() if said.exists() else ""


def noted_blocks(directory):
    """How many blocks an unfinished run below a directory has noted."""
    found = [path for path in directory.rglob("journal.jsonl") if "-done-" not in str(path)]
    return sum(max(path.read_bytes().count(b"\n") - 1, 0) for path in found)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", commands())
def test_killed_at_any_call(place, name, after):
    here = place(name)
    for number in tried(here):
        at = (number, here.calls[number - 1])
        assert ends(here, number, signal.SIGKILL, after)[0] == -signal.SIGKILL, at
        here.holds_all_or_nothing(at, killed=True)
        done = noted_blocks(here.path)
        again = here.goes_on(at)
        if done and again.code == 0:
            plans = max(1, here.arguments.count("-f"))
            begun = "calibrating" if name == "calibrate" else "quantizing"
            assert again.err.count(f"{begun}: block ") == BLOCKS * plans - done, (at, again)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "name", commands(["rtn", "two plans", "replaced parts", "calibrate", "report"])
)
def test_a_signal_at_any_call(place, name, sent):
    here = place(name)
    for number in tried(here, 4):
        at = (number, here.calls[number - 1])
        code, said = ends(here, number, sent, after=True)
        assert code in {0, 130}, (at, said)
        assert "Traceback" not in said, at
        here.holds_all_or_nothing(at)
        here.goes_on(at)


@pytest.mark.parametrize("name", commands(["rtn", "two plans"]))
def test_an_impatient_second_and_third_signal(place, name):
    here = place(name)
    for number in tried(here, 4):
        at = (number, here.calls[number - 1])
        code, said = ends(here, number, signal.SIGINT, after=True, times=3)
        assert code in {0, 130}, (at, said)
        here.holds_all_or_nothing(at)
        here.goes_on(at)
