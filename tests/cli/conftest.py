"""The command line as its users meet it, on a tiny model in a directory called ./model."""

import os
import shutil

import pytest
import torch
from builders.command_line import FORMATS, SMALL, Outcome, in_process_of_its_own
from builders.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from qtool.cli.app import run


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("QTOOL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A directory with ./model, and below ./spoiled some that cannot be quantized."""
    directory = tmp_path_factory.mktemp("originals")
    model = directory / "model"
    # 128 divides every row, as the recipes want; bfloat16, as most models are stored.
    tiny_model("llama", model, hidden=128, intermediate=256, dtype=torch.bfloat16)
    nan = directory / "spoiled" / "nan"
    shutil.copytree(model, nan)
    weights = load_file(nan / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def here(originals, tmp_path, monkeypatch):
    """An own working directory with ./model in it."""
    shutil.copytree(originals / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def qtool(capsys):
    """Run a command line in this process."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def packed(originals, tmp_path_factory):
    """Format -> a finished output directory; not to be changed."""
    directory = tmp_path_factory.mktemp("packed")
    for name in FORMATS:
        arguments = ("quantize", originals / "model", "-f", name, *SMALL, "--eval", "none", "-q")
        assert run([str(a) for a in (*arguments, "-o", directory / name)]) == 0
    return {name: directory / name for name in FORMATS}


@pytest.fixture
def shell():
    """Run a command line in a process of its own."""
    return in_process_of_its_own
