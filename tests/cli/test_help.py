"""--help imports little, and what it shows as examples works."""

import shlex
import shutil

import pytest
import torch
from builders.command_line import SMALL
from builders.tiny_models import tiny_model
from builders.work import imported_by

from qtool.cli.app import run

COMMANDS = ("inspect", "estimate-memory", "quantize", "calibrate", "export", "eval")


def examples(command, capsys):
    """The lines below `Examples:` in a command's --help."""
    assert run([command, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines[lines.index("Examples:") + 1 :] if line]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself(qtool, command, flag):
    outcome = qtool(command, flag)
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.startswith(f"Usage: qtool {command} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_in_examples_on_lines_of_their_own(capsys, command):
    found = examples(command, capsys)
    assert found
    assert all(line.startswith(f"qtool {command} ") for line in found)


def test_without_arguments_there_is_help(qtool):
    assert qtool() == qtool("--help")
    assert all(command in qtool().out for command in COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_run(here, qtool, capsys, command):
    # One of them calibrates on as much as is the default: a quarter of a million tokens.
    shutil.rmtree(here / "model")
    sizes = {"hidden": 128, "intermediate": 128, "layers": 1}
    tiny_model("llama", here / "model", dtype=torch.bfloat16, **sizes)
    for line in examples(command, capsys):
        result = here / "model-awq-w4g128"
        shutil.rmtree(result, ignore_errors=True)
        if command != "quantize" and result.name in line:
            flags = (*SMALL, "--eval", "none", "-o", result)
            assert qtool("quantize", "./model", "--method", "awq", *flags).code == 0
        if command == "export" and "stats.gguf" in line:
            assert qtool("calibrate", "./model", "-o", "stats.gguf", *SMALL).code == 0
        outcome = qtool(*shlex.split(line)[1:])
        assert outcome.code == 0, outcome.err
        assert outcome.out


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("quantize", "--help"), ("inspect", "./model"), ("inspect", "./nowhere")],
    ids=" ".join,
)
def test_help_and_inspect_import_nothing_heavy(here, arguments):
    assert imported_by(*arguments)[2] == []


def test_help_imports_few_modules(here):
    assert imported_by("--help")[1] < 300  # 227; pydantic or networking would be too many
