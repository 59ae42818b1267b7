"""`qtool quantize --ladder`: the smallest way that passes the gates is found, and kept alone."""

import json
import shutil

import pytest
import torch
import yaml
from builders.command_line import ROOT
from builders.tiny_models import tiny_model

from qtool.pipeline.quantize import completed

SMALL = ("-n", "4", "-l", "32", "--set", "eval.context=32", "--set", "eval.windows=4")
LADDER = ("quantize", "./model", "--ladder", *SMALL)
INT8 = "rtn-w8g128-compressed-tensors"


def rungs(value):
    return {rung["name"]: rung["status"] for rung in value["ladder"]}


def kld(value, name):
    return next(r["metrics"]["kld"]["mean"] for r in value["ladder"] if r["name"].startswith(name))


def left(here):
    return sorted(path.name for path in here.iterdir() if path.name != "model")


@pytest.fixture(scope="module")
def everything(originals, tmp_path_factory):
    """The JSON object of a ladder that no four-bit rung passes."""
    from builders.command_line import in_process_of_its_own

    here = tmp_path_factory.mktemp("everything")
    shutil.copytree(originals / "model", here / "model")
    done = in_process_of_its_own(*LADDER, "--gate", "kld<=0.002", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in here.iterdir() if path.name != "model"] == [f"model-{INT8}"]
    return json.loads(done.stdout)


def test_every_rung_is_tried_from_the_largest_on(everything):
    methods = [rung["method"] for rung in everything["ladder"]]
    assert methods == ["rtn", "rtn", "awq", "gptq", "awq+gptq"]
    assert everything["winner"] == INT8
    assert [rung["status"] for rung in everything["ladder"]] == ["won", *["failed"] * 4]
    assert kld(everything, INT8) < 0.002 < kld(everything, "gptq")


def test_it_stops_at_the_smallest_that_passes(here, qtool, everything):
    limit = (kld(everything, "gptq") + kld(everything, "awq-w4")) / 2
    assert kld(everything, "awq-w4") > limit > kld(everything, "gptq")
    outcome = qtool(*LADDER, "--gate", f"kld<={limit}", "--json")
    assert outcome.code == 0, outcome.err
    value = outcome.value
    assert [*rungs(value).values()] == ["passed", "failed", "failed", "won", "skipped"]
    assert "no smaller" in value["ladder"][4]["why"]
    assert left(here) == ["model-gptq-w4g128"]
    report = json.loads((here / "model-gptq-w4g128" / "qtool-report.json").read_text())
    assert report["gates"][0]["pass"]
    assert value["artifacts"][0]["path"] == str(here / "model-gptq-w4g128")


def test_the_winner_is_the_same_as_made_by_itself(here, qtool):
    assert qtool(*LADDER, "--gate", "kld<=9", "-o", "out").code == 0
    alone = ("-m", "rtn", "-b", "4", "-f", "compressed-tensors", "-o", "alone")
    assert qtool("quantize", "./model", *alone, "--eval", "none").code == 0
    ours, its = (here / name / "model.safetensors" for name in ("out", "alone"))
    assert ours.read_bytes() == its.read_bytes()


def test_none_that_passes_is_exit_code_3_and_other_gates_need_no_work(
    here, qtool, monkeypatch, everything
):
    outcome = qtool(*LADDER, "--gate", "kld<=1e-9", "--gate", "top1>=0", "-o", "out", "--json")
    value = outcome.value
    assert (outcome.code, value["winner"], value["artifacts"]) == (3, None, [])
    # Eight bits lost too much: fewer cannot do better.
    assert [*rungs(value).values()] == ["failed", *["skipped"] * 4]
    assert f"{INT8} comes nearest" in outcome.err
    assert left(here) == [".out-ladder.qtool"]

    done = []

    def counted(plan, *arguments):
        done.append(plan.method.name)
        return completed(plan, *arguments)

    monkeypatch.setattr("qtool.pipeline.ladder.completed", counted)
    between = (kld(everything, INT8) + kld(everything, "gptq")) / 2
    loosened = ("--gate", f"kld<={between}", "--gate", "top1>=0", "-o", "out")
    assert qtool(*LADDER, *loosened).code == 0
    assert "rtn" in done  # four bits, which were skipped before
    assert len(done) == 4  # eight bits are known and kept
    assert left(here) == ["out"]


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_ladder_goes_on_with_what_is_known(here, qtool, monkeypatch, stop):
    done = []

    def interrupted(plan, *arguments):
        done.append(plan.method.name)
        if len(done) == stop + 1:
            raise KeyboardInterrupt
        return completed(plan, *arguments)

    command = (*LADDER, "--gate", "kld<=0.002", "-o", "out")
    with monkeypatch.context() as patched:
        patched.setattr("qtool.pipeline.ladder.completed", interrupted)
        outcome = qtool(*command)
    assert outcome.code == 130
    assert "run the same command to go on" in outcome.err
    with monkeypatch.context() as patched:
        done.clear()
        stop = 99
        patched.setattr("qtool.pipeline.ladder.completed", interrupted)
        assert qtool(*command).code == 0
    assert len(done) == 5 - len([x for x in outcome.err.splitlines() if "rung " in x]) + 1
    assert left(here) == ["out"]


def test_keep_all_keeps_what_was_made(here, qtool):
    value = qtool(*LADDER, "--gate", "kld<=0.002", "-o", "out", "--keep-all", "--json").value
    assert len(value["artifacts"]) == 5
    assert left(here / "out") == sorted(rungs(value))
    assert left(here) == ["out"]


def test_a_dry_run_shows_the_rungs_and_does_nothing(here, qtool):
    outcome = qtool(*LADDER, "--gate", "kld<=0.1", "--dry-run")
    assert outcome.code == 0
    assert all(name in outcome.out for name in ("rtn-w8", "rtn-w4", "awq-w4", "gptq-w4"))
    assert qtool(*LADDER, "--gate", "kld<=0.1", "--dry-run", "--json").value["dry_run"]
    assert left(here) == []


@pytest.mark.slow
def test_gguf_has_a_ladder_of_its_own(tmp_path, monkeypatch, qtool):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", tmp_path / "model", hidden=256, intermediate=512, dtype=torch.bfloat16)
    value = qtool(*LADDER, "-f", "gguf", "--gate", "kld<=9", "-o", "x.gguf", "--modelfile",
                  "--json").value  # fmt: skip
    assert [rung["format"] for rung in value["ladder"]] == [
        "gguf:Q8_0", "gguf:Q6_K", "gguf:Q5_K_M", *["gguf:Q4_K_M"] * 4,
    ]  # fmt: skip
    assert value["winner"] == "rtn-Q4_K_M"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert {"x.gguf", "x.Modelfile"} <= set(names)
    assert not [name for name in names if name.startswith(".")]
    assert "FROM ./x.gguf" in (tmp_path / "x.Modelfile").read_text()


def test_the_recipe_is_what_the_flag_means(here, qtool):
    recipe = yaml.safe_load((ROOT / "recipes" / "ladder.yaml").read_text())
    from qtool.recipe.ladder import INTEGERS

    assert recipe["ladder"] == [rung.model_dump(exclude_none=True) for rung in INTEGERS]
    changed = ("--recipe", ROOT / "recipes" / "ladder.yaml", *SMALL, "--gate", "kld<=9")
    value = qtool("quantize", "./model", *changed, "--json").value
    assert value["winner"].startswith("rtn-w4")


REFUSED = {
    "no gate": ((), 2, "needs a gate", "loss<=3%"),
    "a gate on size alone": (("--gate", "size<=5GB"), 2, "needs a gate"),
    "a method": (("--gate", "kld<=1", "-m", "gptq"), 2, "--method"),
    "bits": (("--gate", "kld<=1", "-b", "4"), 2, "--bits"),
    "a GGUF type": (("--gate", "kld<=1", "-f", "gguf:Q4_K_M"), 2, "gguf:Q4_K_M", "-f gguf"),
    "two formats": (("--gate", "kld<=1", "-f", "gptq", "-f", "awq"), 2, "one format"),
    "no evaluation": (("--gate", "kld<=1", "--eval", "none"), 2, "nothing is to be measured"),
    "statistics": (("--gate", "kld<=1", "--statistics", "x.gguf"), 2, "Hessian"),
    "a format that cannot hold eight bits": (("--gate", "kld<=1", "-f", "awq"), 5, "awq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_ladder_is_refused(here, qtool, case):
    flags, code, *words = REFUSED[case]
    outcome = qtool("quantize", "./model", "--ladder", *flags)
    assert outcome.code == code, outcome.err
    for word in words:
        assert word in outcome.err
    assert left(here) == []


def test_keeping_all_without_a_ladder_is_refused(here, qtool):
    outcome = qtool("quantize", "./model", "--keep-all")
    assert (outcome.code, "--ladder" in outcome.err) == (2, True)


def test_a_taken_output_is_refused_before_any_rung(here, qtool):
    (here / "model-gptq-w4g128").mkdir()
    (here / "model-gptq-w4g128" / "x").write_text("mine")
    outcome = qtool(*LADDER, "--gate", "kld<=1")
    assert (outcome.code, "not empty" in outcome.err) == (2, True)
    assert left(here) == ["model-gptq-w4g128"]
