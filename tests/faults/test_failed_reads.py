"""A disk that fails while it is read, a process without file handles, a terminal that is full."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from builders.command_line import Outcome
from builders.faults import Faults, in_fork, sampled
from builders.interruptions import digests
from builders.tiny_models import tiny_model

from qtool.checkpoint import work_directory
from qtool.checkpoint.disk_errors import system_error
from qtool.checkpoint.output import OutputDirectory, OutputFile
from qtool.checkpoint.reader import TensorReader
from qtool.checkpoint.untrusted import open_regular
from qtool.cli.app import run
from qtool.errors import CapacityError, DamagedError, UsageError, is_out_of_memory
from qtool.pipeline.journal import Journal

EXPORT = ("export", "model", "-f", "safetensors:F32", "-o", "out")
EVERY = 40  # of the reads, beside the first and last of each file


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", tmp_path / "model", hidden=64, intermediate=128, dtype=torch.bfloat16)
    return tmp_path


@pytest.fixture
def qtool(capsys):
    def call(*arguments):
        capsys.readouterr()
        return Outcome(run([*map(str, arguments)]), *capsys.readouterr())

    return call


def test_a_broken_disk_at_any_read_is_said_with_the_file(here, qtool):
    before = digests(here / "model")
    with Faults(here, reads=True) as faults:
        assert qtool(*EXPORT).code == 0
    whole = digests(here / "out")
    calls = faults.calls
    assert {call.kind for call in calls} == {"read", "list"}
    (here / "out").rename(here / "whole")
    for number in sampled(calls, EVERY):
        at = (number, calls[number - 1])
        with Faults(here, number, error=errno.EIO, reads=True):
            outcome = qtool(*EXPORT)
        if outcome.code == 0:  # in what is removed at the end
            assert digests(here / "out") == whole, at
            (here / "out").rename(here / f"out{number}")
            continue
        assert outcome.code == 6, (at, outcome)
        error = next(line for line in outcome.err.splitlines() if line.startswith("error:"))
        assert "Input/output error" in error, (at, outcome)
        # A directory that is listed on the way may be told of by what lies in it.
        name = Path(calls[number - 1].path).name
        assert name in error or calls[number - 1].kind == "list", (at, outcome)
        assert not (here / "out").exists(), at
    assert digests(here / "model") == before


def test_what_the_kernel_cannot_read_has_its_name_in_the_refusal():
    said = "cannot read /proc/self/mem: Input/output error"  # nothing is mapped at address 0
    with open_regular(Path("/proc/self/mem"))[0] as file, pytest.raises(DamagedError, match=said):
        file.read(8)


@pytest.mark.parametrize("spare", [1, 2, 3, 5])
def test_a_process_that_may_open_no_more_files_does_not_fit(here, qtool, spare):
    said = here / "said"

    def work():
        open_now = len(list(Path("/proc/self/fd").iterdir()))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + spare - 1, hard))
        outcome = qtool(*EXPORT)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        said.write_text(outcome.err)
        return outcome.code

    code = in_fork(work)
    assert code in {0, 4}, said.read_text()
    assert code == 0 or "Too many open files" in said.read_text()
    assert code == 4 or spare > 1
    assert (here / "out").exists() == (code == 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_stderr_that_takes_no_more_costs_neither_result_nor_exit_code(here, monkeypatch):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run([*EXPORT]) == 0
        assert run([*EXPORT]) == 2  # it is there now
    assert (here / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()),
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 1000),
    ],
    ids=["rewritten", "removed", "cut short"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_nothing_is_made_from_a_model_that_changes_meanwhile(
    here, qtool, monkeypatch, name, change
):
    read, left = TensorReader.read, [here / "model" / name]

    def changing(self, tensor):
        found = read(self, tensor)
        if left and tensor.endswith("0.mlp.down_proj.weight"):
            change(left.pop())
        return found

    monkeypatch.setattr(TensorReader, "read", changing)
    outcome = qtool(*EXPORT)
    assert outcome.code == 6, outcome
    assert name in outcome.err
    assert sorted(path.name for path in here.iterdir()) == ["model"]


def test_a_run_whose_model_changes_keeps_its_blocks_and_goes_on(here, qtool, monkeypatch):
    rtn = ("quantize", "model", "-m", "rtn", "-g", "32", "--eval", "none", "-o")
    assert qtool(*rtn, "whole").code == 0
    note, left = Journal.note, [here / "model" / "model.safetensors"]

    def noted(self, block):
        note(self, block)
        while left:
            path = left.pop()
            path.write_bytes(path.read_bytes())

    monkeypatch.setattr(Journal, "note", noted)
    outcome = qtool(*rtn, "out")
    assert outcome.code == 6, outcome
    assert "model.safetensors was changed while qtool worked" in outcome.err
    assert "1 of 2 blocks are kept" in outcome.err
    assert "continuing: 1 of 2" in qtool(*rtn, "out").err
    assert digests(here / "out") == digests(here / "whole")


def test_a_working_directory_that_is_gone_is_said(tmp_path, qtool):
    def work():
        gone = tmp_path / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        outcome = qtool("inspect", tmp_path)
        return 0 if outcome.code == 2 and "working directory" in outcome.err else 1

    assert in_fork(work) == 0


@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_interrupt_loses_no_old_result_where_directories_cannot_be_swapped(
    tmp_path, monkeypatch, times
):
    monkeypatch.setattr(work_directory, "exchange", lambda one, other: False)

    def replaced(at):
        final = tmp_path / f"{times}-{at}"
        final.mkdir()
        (final / "config.json").write_text("old")
        with Faults(tmp_path, at, number=signal.SIGINT, after=True, times=times) as faults:
            place = OutputDirectory(final, overwrite=True)
            try:
                with place as directory:
                    (directory / "config.json").write_text("new")
                    place.commit()
            except KeyboardInterrupt:
                pass
        assert (final / "config.json").read_text() in {"old", "new"}, faults.calls[at - 1 :]
        return len(faults.calls)

    for at in range(replaced(0) + 1):
        if at:
            replaced(at)


def test_a_name_too_long_for_what_lies_beside_the_result_is_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match="File name too long"):
        OutputFile(tmp_path / ("n" * 240 + ".gguf"))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_or_failure_loses_no_old_file_of_a_model(tmp_path):
    names = ("x.gguf", "x.Modelfile", "x.qtool-recipe.yaml")

    def replaced(at, **wrong):
        base = tmp_path / f"{at}-{len(wrong)}"
        base.mkdir()
        for name in names:
            (base / name).write_text("old")
        with Faults(base, at, **wrong) as faults:
            place = OutputFile(base / "x.gguf", overwrite=True)
            with contextlib.suppress(KeyboardInterrupt, OSError, DamagedError), place as directory:
                for name in names:
                    path = directory / (name if name == "x.gguf" else name.removeprefix("x."))
                    path.write_text("new")
                place.commit()
        assert {(base / name).read_text() for name in names} in ({"old"}, {"new"}), faults.calls[
            at - 1 :
        ]
        return len(faults.calls)

    for at in range(1, replaced(0) + 1):
        replaced(at, number=signal.SIGINT, after=True)
        replaced(at, error=errno.EIO)


def test_an_interrupt_while_the_work_directory_goes_is_no_failure_of_the_disk(
    tmp_path, monkeypatch
):
    def interrupted(path, *, ignore_errors):
        assert path.exists()
        assert ignore_errors
        os.close(-1)  # as rmtree does where an interrupt comes behind its own closing

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    place = OutputDirectory(tmp_path / "out")
    with place as directory:
        (directory / "config.json").write_text("{}")
        place.commit()
    assert (tmp_path / "out" / "config.json").exists()


def test_a_work_directory_that_cannot_be_locked_is_not_left(tmp_path):
    with Faults(tmp_path) as faults, OutputDirectory(tmp_path / "out"):
        pass
    lock = next(at for at, call in enumerate(faults.calls, 1) if call.path.endswith("/lock"))
    with Faults(tmp_path, lock, error=errno.ENOSPC), pytest.raises(CapacityError):
        OutputDirectory(tmp_path / "out").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_somebody_removed_is_missed(tmp_path):
    place = OutputFile(tmp_path / "x.gguf")
    with place, pytest.raises(DamagedError, match=r"x\.gguf.*No such file"):
        place.commit()


def test_what_a_library_in_rust_says_of_the_system_is_known():
    refusal = system_error(Exception("Too many open files (os error 24)"))
    assert isinstance(refusal, CapacityError)
    assert "Too many open files" in refusal.message
    assert system_error(Exception("something else")) is None


@pytest.mark.parametrize(
    "error",
    [BlockingIOError(errno.EAGAIN, "no process"), RuntimeError("can't start new thread")],
    ids=["process", "thread"],
)
def test_too_few_processes_or_threads_do_not_fit(error):
    assert isinstance(system_error(error), CapacityError)


def test_what_a_library_says_without_memory_is_known():
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
