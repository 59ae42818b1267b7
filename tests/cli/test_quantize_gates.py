"""`qtool quantize --gate`: the result is held to conditions, and kept whatever comes of them."""

import json

import pytest
import yaml
from builders.command_line import SMALL

QUANTIZE = ("quantize", "./model", "-m", "rtn", "-f", "gptq", "-o", "out", *SMALL)


def test_gates_that_hold_are_in_the_result_and_beside_it(here, qtool):
    gates = ("--gate", "kld<=9", "--gate", "size<=5GB", "--gate", "template==same")
    outcome = qtool(*QUANTIZE, *gates, "--json")
    assert outcome.code == 0, outcome.err
    value = outcome.value
    assert [gate["pass"] for gate in value["gates"]] == [True] * 3
    assert {gate["model"] for gate in value["gates"]} == {"out"}
    report = json.loads((here / "out" / "qtool-report.json").read_text())
    assert report["gates"] == value["gates"]
    assert report["metrics"]["kld"]["mean"] == value["gates"][0]["value"]


def test_a_failed_gate_is_exit_code_3_with_the_result_kept(here, qtool):
    outcome = qtool(*QUANTIZE, "--gate", "kld<=1e-9", "--gate", "top1>=0", "--json")
    value = outcome.value
    assert (outcome.code, value["exit_code"], value["ok"]) == (3, 3, False)
    assert value["error"]["code"] == "gate"
    assert [gate["pass"] for gate in value["gates"]] == [False, True]
    assert f"kld of out is {value['gates'][0]['value']:.4g} ± " in outcome.err
    assert (here / "out" / "model.safetensors").exists()


def test_a_gate_has_what_it_needs_measured(here, qtool):
    value = qtool(*QUANTIZE, "--gate", "flips<=100%", "--gate", "kld_p999<=99", "--json").value
    assert "flips" in value["metrics"]
    assert "ppl_llama_cpp" not in value["metrics"]  # which is for files that llama.cpp runs
    assert all(isinstance(gate["value"], float) for gate in value["gates"])


WEIGHT_FILES = {
    "one file": (("-f", "gptq"), "model.safetensors"),
    "parts and their index": (("-f", "gptq", "--max-shard-size", "20kB"), "*safetensors*"),
    "GGUF": (("-f", "gguf:Q4_0"), "*.gguf"),
}


@pytest.mark.parametrize("case", WEIGHT_FILES)
def test_a_size_is_that_of_the_weight_files_and_needs_no_evaluation(here, qtool, case):
    flags, pattern = WEIGHT_FILES[case]
    quantize = ("quantize", "./model", "-m", "rtn", *flags, "-o", "out", "--eval", "none")
    outcome = qtool(*quantize, "--gate", "size<=5GB", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.value["metrics"] == {}
    files = [path.stat().st_size for path in (here / "out").glob(pattern)]
    assert outcome.value["gates"][0]["value"] == sum(files)
    outcome = qtool(*quantize, "--overwrite", "--gate", f"size<={sum(files) - 1}")
    assert (outcome.code, "nothing was written" in outcome.err) == (3, True)
    assert qtool(*quantize, "--overwrite", "--gate", f"size<={sum(files)}").code == 0


def test_gates_of_a_recipe_hold_too_and_stand_in_the_resolved_one(here, qtool):
    recipe = here / "recipe.yaml"
    recipe.write_text("version: 1\ngates: ['kld<=9']\neval: {metrics: [ppl, flips], context: 32}\n")
    outcome = qtool(*QUANTIZE, "--recipe", recipe, "--gate", "top1>=0", "--json")
    assert outcome.code == 0, outcome.err
    assert [gate["expression"] for gate in outcome.value["gates"]] == ["top1>=0", "kld<=9"]
    assert "flips" in outcome.value["metrics"]
    resolved = yaml.safe_load((here / "out" / "qtool-recipe.yaml").read_text())
    assert resolved["gates"] == ["top1>=0", "kld<=9"]


@pytest.mark.slow
def test_every_format_of_a_run_is_held_to_the_gates(here, qtool):
    formats = ("-f", "gptq", "-f", "gguf:Q4_0")
    outcome = qtool("quantize", "./model", "-m", "rtn", *formats, "-o", "out", "--gate", "kld<=9",
                    "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    models = [gate["model"] for gate in outcome.value["gates"]]
    assert models == ["out/gptq", "out/gguf-Q4_0/model-Q4_0.gguf"]
