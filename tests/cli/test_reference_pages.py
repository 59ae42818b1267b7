"""The generated pages of docs/reference are those that the code would write."""

import os
import shutil
import subprocess
import sys

import pytest
from builders.command_line import ROOT


def generate(script, *arguments):
    command = [sys.executable, "-X", "importtime", str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of the documentation, to be spoiled."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path / "docs"


def test_the_reference_pages_are_current():
    assert generate(ROOT / "docs" / "generate.py", "--check").returncode == 0, "run make docs"


def test_generating_imports_neither_torch_nor_transformers(elsewhere):
    completed = generate(elsewhere / "generate.py")
    assert completed.returncode == 0
    modules = {line.rpartition("|")[2].strip() for line in completed.stderr.splitlines()}
    assert "qtool.cli.app" in modules
    assert not {"torch", "transformers"} & modules


def test_a_page_that_is_not_current_is_named(elsewhere):
    page = elsewhere / "reference" / "recipe.md"
    page.write_text(page.read_text() + "edited by hand\n")
    (elsewhere / "reference" / "families.md").unlink()
    completed = generate(elsewhere / "generate.py", "--check")
    assert completed.returncode == 1
    assert "recipe.md" in completed.stderr
    assert "families.md" in completed.stderr
    assert "cli.md is not" not in completed.stderr


def test_the_reference_names_every_command_and_key():
    reference = ROOT / "docs" / "reference"
    commands = (reference / "cli.md").read_text()
    assert all(f"## qtool {name}" in commands for name in ("inspect", "quantize", "export", "eval"))
    assert "`--error-propagation NUMBER`" in commands
    assert "\x1b" not in commands
    assert (
        "`quantize.damp_percent` | number > 0 and < 1 | `0.05`"
        in (reference / "recipe.md").read_text()
    )
