"""The Makefile of docs/how-to/ci.md does what the page says, on a tiny model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "ci"
PAGE = ROOT / "docs" / "how-to" / "ci.md"
RECIPE = """
version: 1
model: {id: ./model}
calibration: {datasets: [{name: builtin}], sequence_length: 32, windows: 4}
quantize: {method: gptq, bits: 4, group_size: 64, symmetric: true}
export: [{format: gptq}]
seed: 42
"""
SMALL = {
    "QTOOL": f"{sys.executable} -m qtool",
    "MODEL": "./model",
    "FORMAT": "gptq:4:64",
    "CONTEXT": "64",
    "EVAL": "--ctx 32 --windows 4",
    "GATES": "'kld<=9' 'template==same'",
    "PUBLISH": "cp -rt published",
}
# qtool, killed when the first block has been noted.
KILLED = """
import os, signal
from qtool import __main__
from qtool.pipeline.journal import Journal
note = Journal.note
def noted(self, block):
    note(self, block)
    os.kill(os.getpid(), signal.SIGKILL)
Journal.note = noted
__main__.main()
"""
needs_make = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("make") and shutil.which("jq")), reason="no make or no jq here"
    ),
]


def make(folder, *targets, **settings):
    """Run make in a folder; returns the completed process."""
    values = [f"{name}={value}" for name, value in {**SMALL, **settings}.items()]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        ["make", *targets, *values], cwd=folder, env=environment, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def built(folder):
    """The one directory that holds the results of this recipe."""
    (found,) = [path for path in (folder / "build").iterdir() if path.name != "logits"]
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A repository with the Makefile, a recipe and a model, after a complete run."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(EXAMPLE / "Makefile", folder)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "published").mkdir()
    tiny_model("llama", folder / "model", hidden=128, intermediate=256, dtype=torch.bfloat16)
    done = make(folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture
def copy(project, tmp_path):
    """The same, to be changed."""
    shutil.copytree(project, tmp_path / "project")
    return tmp_path / "project"


class TestTheMakefile:
    pytestmark = needs_make

    def test_estimates_converts_evaluates_gates_and_publishes(self, project):
        steps = ("estimate", "plan", "quantize", "eval")
        found = {name: json.loads((built(project) / f"{name}.json").read_text()) for name in steps}
        assert all(found[name]["ok"] for name in steps)
        assert [gate["pass"] for gate in found["eval"]["gates"]] == [True, True]
        assert found["plan"]["artifacts"][0]["path"] == found["quantize"]["artifacts"][0]["path"]
        published = {path.name for path in (project / "published" / "model").iterdir()}
        assert published >= {"model.safetensors", "qtool-recipe.yaml", "README.md", "report"}
        assert (project / "published" / "model" / "report" / "index.html").exists()

    def test_run_again_does_nothing(self, project):
        again = make(project)
        assert again.returncode == 0
        assert "Nothing to be done" in again.stdout

    def test_after_a_lost_runner_only_the_lost_step_is_done_again(self, copy):
        weights = built(copy) / "model" / "model.safetensors"
        before = weights.stat().st_mtime_ns
        (built(copy) / "eval.json").rename(built(copy) / "eval.json.partial")
        (built(copy) / "published").unlink()
        # As after a checkout: everything of the repository is newer than every result.
        for name in ("Makefile", "recipe.yaml"):
            (copy / name).touch()
        again = make(copy, "evaluate")
        assert again.returncode == 0, again.stderr
        assert (built(copy) / "eval.json").exists()
        assert weights.stat().st_mtime_ns == before

    def test_a_killed_conversion_goes_on(self, copy):
        shutil.rmtree(copy / "build")
        (copy / "killed.py").write_text(KILLED)
        assert make(copy, "convert", QTOOL=f"{sys.executable} killed.py").returncode != 0
        assert (built(copy) / ".model.qtool" / "journal.jsonl").exists()
        assert not (built(copy) / "model").exists()
        # As a cache does: everything below `build`, hidden or not.
        (copy / "build").rename(copy / "kept")
        shutil.copytree(copy / "kept", copy / "build")
        again = make(copy, "convert")
        assert again.returncode == 0, again.stderr
        assert "continuing: 1 of 2 blocks are finished" in again.stderr
        assert not (built(copy) / ".model.qtool").exists()

    def test_a_failed_gate_stops_before_publishing_and_says_why(self, copy):
        (built(copy) / "eval.json").unlink()
        (built(copy) / "published").unlink()
        shutil.rmtree(copy / "published" / "model")
        failed = make(copy, GATES="'kld<=0.000001'")
        assert failed.returncode != 0
        value = json.loads((built(copy) / "eval.failed.json").read_text())
        assert (value["exit_code"], value["error"]["code"]) == (3, "gate")
        assert list((copy / "published").iterdir()) == []
        assert "kld<=0.000001" in make(copy, "-s", "why").stdout
        assert (built(copy) / "report" / "index.html").exists()

    def test_a_damaged_result_is_not_published(self, copy):
        (built(copy) / "published").unlink()
        shutil.rmtree(copy / "published" / "model")
        with (built(copy) / "model" / "model.safetensors").open("ab") as file:
            file.write(b"x")
        assert make(copy).returncode != 0
        assert list((copy / "published").iterdir()) == []

    def test_a_model_that_does_not_fit_is_never_converted(self, copy):
        shutil.rmtree(copy / "build")
        failed = make(copy, GPU="1MB")
        assert failed.returncode != 0
        value = json.loads((built(copy) / "estimate.failed.json").read_text())
        assert value["exit_code"] == 4
        assert not (built(copy) / "plan.json").exists()

    def test_another_recipe_or_model_is_another_result(self, copy):
        key = make(copy, "-s", "key").stdout
        assert re.fullmatch(r"[0-9a-f]{16}\n", key)
        assert make(copy, "-s", "key", REVISION="v2").stdout != key
        (copy / "recipe.yaml").write_text(RECIPE.replace("seed: 42", "seed: 43"))
        assert make(copy, "-s", "key").stdout != key


def test_the_workflow_runs_steps_that_the_makefile_has():
    workflow = yaml.safe_load((EXAMPLE / "quantize.yml").read_text())
    steps = workflow["jobs"]["quantize"]["steps"]
    called = {name for step in steps for name in re.findall(r"make (?:-s )?(\w+)",
              step.get("run", ""))}  # fmt: skip
    makefile = (EXAMPLE / "Makefile").read_text()
    assert called == {"key", "estimate", "plan", "convert", "evaluate", "why", "publish"}
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in called)


def test_only_the_step_that_publishes_has_the_token():
    workflow = yaml.safe_load((EXAMPLE / "quantize.yml").read_text())
    steps = workflow["jobs"]["quantize"]["steps"]
    assert [step["name"] for step in steps if "secrets" in json.dumps(step)] == ["Publish"]
    assert "secrets" not in json.dumps({**workflow, "jobs": {}})


def test_the_recipe_of_the_example_is_one():
    from qtool.recipe.load import load_recipe

    assert load_recipe(EXAMPLE / "recipe.yaml").export[0].format == "gguf:Q4_K_M"


def test_the_page_names_the_files_and_every_exit_code():
    text = PAGE.read_text()
    for name in ("Makefile", "quantize.yml", "recipe.yaml"):
        assert f"../examples/ci/{name}" in text
        assert (EXAMPLE / name).exists()
    codes = set(re.findall(r"^\| (\d+) \|", text, re.M))
    assert codes == {"0", "1", "2", "3", "4", "5", "6", "7", "8", "130"}
