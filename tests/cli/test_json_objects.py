"""Every --json object is what its schema in docs/reference says; `value` checks it."""

import pytest
from builders.command_line import SMALL


def test_a_float_model_inspected(here, qtool):
    value = qtool("inspect", "./model", "--json").value
    assert value["parameters"]["total"] == value["model"]["parameters"]
    assert value["quantization"] is None
    assert value["support"]["commands"] == ["inspect", "calibrate", "quantize", "eval"]


def test_a_packed_model_inspected_with_tensors_and_compared(here, packed, qtool):
    value = qtool("inspect", packed["gptq"], "--tensors", "--diff", "./model", "--json").value
    assert value["quantization"]["method"] == "gptq"
    assert len(value["tensors"]["list"]) == value["tensors"]["count"]
    assert value["diff"]["tokenizer"]["same"]


@pytest.mark.parametrize("output_format", ["awq", "compressed-tensors"])
def test_other_formats_inspected(packed, qtool, output_format):
    value = qtool("inspect", packed[output_format], "--json").value
    assert value["quantization"]["method"] == output_format


def test_a_plan(here, qtool):
    value = qtool("quantize", "./model", "--dry-run", "--json").value
    assert value["dry_run"] is True
    assert len(value["tensors"]) == 14
    assert value["artifacts"][0]["path"] == str(here / "model-awq-w4g128")


def test_a_quantized_model_with_what_it_cost(here, qtool):
    value = qtool("quantize", "./model", "-m", "gptq", *SMALL, "--json").value
    assert value["metrics"]["kld"]["mean"] > 0
    assert value["calibration"]["tokens"] == 4 * 32
    assert value["artifacts"][0]["verified"] is True


def test_a_quantized_model_that_was_not_measured(here, qtool):
    value = qtool("quantize", "./model", "-m", "rtn", "--eval", "none", "--json").value
    assert value["metrics"] == {}
    assert value["calibration"] == {"datasets": [], "tokens": 0}


def test_a_warning_is_part_of_the_object(here, qtool):
    (here / "short.txt").write_text("only a few words of text " * 10)
    value = qtool(
        "quantize", "./model", "-m", "gptq", "-d", "short.txt", *SMALL, "-n", "99", "--json"
    ).value
    assert [w["code"] for w in value["warnings"]] == ["few_windows"]


def test_statistics(here, qtool):
    value = qtool("calibrate", "./model", "-o", "stats.gguf", *SMALL, "--json").value
    assert value["artifacts"] == [
        {"format": "imatrix", "path": str(here / "stats.gguf"), "tensors": 15}
    ]


def test_figures_with_and_without_an_original(here, packed, qtool):
    small = ("--ctx", "32", "-n", "2", "--json")
    alone = qtool("eval", "./model", *small).value
    assert set(alone["results"][0]["metrics"]) == {"ppl"}
    compared = qtool("eval", packed["awq"], packed["gptq"], "--ref", "./model", *small).value
    assert [set(r["metrics"]) for r in compared["results"]] == 2 * [{"ppl", "kld", "top1"}]


def test_one_window_has_no_standard_error_and_no_nan(here, qtool):
    value = qtool("eval", "./model", "--ctx", "32", "-n", "1", "--json").value
    assert value["results"][0]["metrics"]["ppl"]["se"] is None


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", "./nowhere"), "usage"),
        (("quantize", "./nowhere"), "usage"),
        (("calibrate", "./nowhere", "-o", "stats.gguf"), "usage"),
        (("eval", "./nowhere"), "usage"),
        (("quantize", "./model", "-f", "gguf:Q9_K"), "usage"),
        (("export", "./nowhere", "-f", "gguf:Q8_0"), "usage"),
        (("quantize", "./model", "-m", "awq", "-f", "awq", "-b", "8"), "unsupported"),
        (("quantize", "--no-such-flag"), "usage"),
        (("eval",), "usage"),
    ],
)
def test_a_failure(here, qtool, arguments, code):
    outcome = qtool(*arguments, "--json")
    assert outcome.value["ok"] is False
    assert outcome.value["exit_code"] == outcome.code
    assert outcome.value["error"]["code"] == code
    assert outcome.value["error"]["message"] in outcome.err
