"""Full disks, other processes, links, missing memory: trouble from outside while a run goes on."""

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from builders.command_line import Outcome, in_process_of_its_own
from builders.faults import in_fork
from builders.interruptions import digests
from builders.tiny_models import tiny_model

from qtool.calibration.builtin import builtin_pieces
from qtool.checkpoint.output import OutputDirectory
from qtool.cli.app import run
from qtool.pipeline.journal import Journal

FLAGS = ("-g", "32", "--eval", "none", "-n", "3", "-l", "24")
GPTQ = ("quantize", "model", "-m", "gptq", *FLAGS)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original") / "model"
    return tiny_model("llama", directory, hidden=64, intermediate=128, dtype=torch.bfloat16)


@pytest.fixture
def here(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(original, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def qtool(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def after_a_block(monkeypatch):
    """Have something happen when the first block has been noted."""

    def arrange(happens):
        note, left = Journal.note, [happens]

        def noted(self, block):
            note(self, block)
            while left:
                left.pop()()

        monkeypatch.setattr(Journal, "note", noted)

    return arrange


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of some size; it is gone afterwards."""
    made = []

    def mounted(size):
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"only root may mount a file system: {done.stderr.strip()}")
        made.append(place)
        return place

    yield mounted
    for place in made:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_start(here, qtool, disk):
    small = disk("4m")
    outcome = qtool(*GPTQ, "-o", small / "out")
    assert outcome.code == 4
    assert "are needed" in outcome.err
    assert "block 1" not in outcome.err
    assert list(small.iterdir()) == []


def test_a_disk_that_others_fill_meanwhile(here, qtool, disk, after_a_block):
    place = disk("24m")
    assert qtool(*GPTQ, "-o", here / "whole").code == 0

    def fill():
        with (place / "ballast").open("wb", buffering=0) as file:
            while True:
                try:
                    if not file.write(bytes(1 << 12)):
                        break
                except OSError:
                    break

    after_a_block(fill)
    outcome = qtool(*GPTQ, "-o", place / "out", "--json")
    assert outcome.code == 4, outcome
    assert outcome.value["error"]["resumable"]
    assert "1 of 2 blocks are kept" in outcome.err
    assert not (place / "out").exists()
    (place / "ballast").unlink()
    assert qtool(*GPTQ, "-o", place / "out").code == 0
    assert digests(place / "out") == digests(here / "whole")


def test_a_report_on_a_read_only_disk_is_refused_before_the_evaluation(here, qtool, disk):
    place = disk("4m")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    outcome = qtool("eval", "model", "--ctx", "24", "-n", "2", "--report", place / "report")
    assert outcome.code == 2, outcome
    assert "may not be written to" in outcome.err
    assert "running" not in outcome.err


def limited(number, value):
    return lambda: resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


def test_an_address_space_that_is_too_small_for_pytorch_is_refused_at_once(here):
    """It would end the process while it is loaded, with words of its own or none."""
    for size, why in ((64_000_000, "out of memory"), (512_000_000, "address space")):
        limit = limited(resource.RLIMIT_AS, size)
        done = in_process_of_its_own(*GPTQ, "-o", "out", "--json", preexec_fn=limit)
        assert done.returncode == 4, done.stderr
        assert why in json.loads(done.stdout)["error"]["message"]
    assert [path.name for path in here.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_limit_on_the_processor_s_time_leaves_a_run_that_goes_on(here):
    """The system sends SIGXCPU first, which a batch system's job gets shortly before its end."""
    limit = limited(resource.RLIMIT_CPU, 1)  # PyTorch alone takes longer to be loaded
    done = in_process_of_its_own(*GPTQ, "-o", "out", "--json", preexec_fn=limit)
    assert done.returncode == 130, done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "interrupted"
    assert in_process_of_its_own(*GPTQ, "-o", "out").returncode == 0
    assert sorted(path.name for path in here.iterdir()) == ["model", "out"]


def test_memory_that_runs_out_is_said_and_the_run_goes_on_later(here, qtool, after_a_block):
    after_a_block(lambda: torch.empty(1 << 50))
    outcome = qtool(*GPTQ, "-o", "out", "--json")
    assert outcome.code == 4, outcome
    assert outcome.value["error"]["resumable"]
    assert "out of memory" in outcome.err
    assert "continuing: 1 of 2" in qtool(*GPTQ, "-o", "out").err


def test_a_second_run_to_one_output_is_refused_and_the_first_unharmed(here, qtool):
    first = OutputDirectory(here / "out")
    with first as directory:
        (directory / "config.json").write_text("{}")
        outcome = qtool(*GPTQ, "-o", "out")
        assert outcome.code == 2
        assert "another process is writing" in outcome.err
        first.commit()
    assert [path.name for path in (here / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("target", ["nothing", "file", "directory"])
@pytest.mark.parametrize("output", ["out", "x.gguf", "stats.gguf"])
def test_an_output_that_is_a_link_is_refused(here, qtool, output, target):
    (here / "file").write_text("somebody's")
    (here / "directory").mkdir()
    (here / output).symlink_to(target)
    commands = {
        "out": GPTQ,
        "x.gguf": ("export", "model", "-f", "gguf:F16"),
        "stats.gguf": ("calibrate", "model", "-n", "2", "-l", "24"),
    }
    overwrite = ("--overwrite",)
    for more in ((), overwrite):
        outcome = qtool(*commands[output], *more, "-o", output)
        assert outcome.code == 2, outcome
    assert not (here / "nothing").exists()
    assert (here / "file").read_text() == "somebody's"
    assert list((here / "directory").iterdir()) == []


def test_a_parent_that_is_a_link_is_followed(here, qtool):
    (here / "real").mkdir()
    (here / "link").symlink_to("real")
    assert qtool("export", "model", "-f", "safetensors:F32", "-o", "link/out").code == 0
    assert (here / "real" / "out" / "config.json").exists()


def test_an_output_that_becomes_a_link_meanwhile_is_refused(here, qtool, after_a_block):
    (here / "precious").mkdir()
    (here / "precious" / "config.json").write_text("precious")
    after_a_block(lambda: (here / "out").symlink_to("precious"))
    assert qtool(*GPTQ, "--overwrite", "-o", "out").code == 2
    assert [p.name for p in (here / "precious").iterdir()] == ["config.json"]
    assert (here / "precious" / "config.json").read_text() == "precious"


@pytest.mark.parametrize("output", ["model", "model/out", "."])
def test_input_and_output_in_one_another_are_refused(here, qtool, output):
    before = digests(here / "model")
    assert qtool(*GPTQ, "--overwrite", "-o", output).code == 2
    assert digests(here / "model") == before


@pytest.mark.slow
def test_a_stdout_that_takes_no_more_does_not_cost_the_result(here):
    with Path("/dev/full").open("w") as full:
        done = in_process_of_its_own(
            *GPTQ, "-o", "out", "--json", capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert (here / "out" / "model.safetensors").exists()
    assert not (here / ".out.qtool").exists()


# --- determinism --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "awq+gptq"])  # which has all that gptq and awq do
def test_two_processes_give_the_same_bytes(here, method):
    for name in ("one", "two"):
        arguments = ("quantize", "model", "-m", method, *FLAGS, "-o", name)
        done = in_process_of_its_own(*arguments)
        assert done.returncode == 0, done.stderr
    assert digests(here / "one") == digests(here / "two")


@pytest.fixture
def in_threads(qtool, here, monkeypatch):
    """Run a command in a copy of this process that computes in some threads."""
    builtin_pieces("calibration", None)  # read once for all copies

    def call(count, *arguments, stopped=False):
        note = Journal.note

        def noted(self, block):
            note(self, block)
            raise KeyboardInterrupt

        def work():
            torch.set_num_threads(count)
            if stopped:
                monkeypatch.setattr(Journal, "note", noted)
            outcome = qtool(*arguments)
            (here / "said").write_text(json.dumps([outcome.out, outcome.err]))
            return outcome.code

        code = in_fork(work)
        return Outcome(code, *json.loads((here / "said").read_text()))

    return call


@pytest.mark.parametrize(("begun", "resumed"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_the_threads_it_was_begun_with(here, in_threads, begun, resumed):
    assert in_threads(begun, *GPTQ, "-o", "whole").code == 0
    stopped = in_threads(begun, *GPTQ, "-o", "out", "--json", stopped=True)
    assert stopped.code == 130, stopped.err
    assert stopped.value["error"]["resumable"]
    report = json.loads((here / "whole" / "qtool-report.json").read_text())
    assert f"({begun} threads)" in json.dumps(report)
    done = in_threads(resumed, *GPTQ, "-o", "out")
    assert done.code == 0, done.err
    assert "continuing: 1 of 2" in done.err
    assert digests(here / "out") == digests(here / "whole")
    assert f"({begun} threads)" in (here / "out" / "qtool-report.json").read_text()
