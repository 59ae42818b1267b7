"""The commands work together: what one writes the next one reads."""

import pytest
from builders.command_line import FORMATS, SMALL, contents
from builders.tiny_models import tiny_model

EVAL = ("--ctx", "32", "-n", "2")


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_every_method_writes_every_format_and_it_reads_back(here, qtool, method, output_format):
    flags = ("-m", method, "-f", output_format, *SMALL, "--eval", "none", "-o", "out")
    assert qtool("quantize", "./model", *flags).code == 0
    result = qtool("eval", "./out", "--ref", "./model", *EVAL, "--json").value["results"][0]
    assert result["format"] == output_format
    assert 0 < result["metrics"]["kld"]["mean"] < 0.3


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_a_calibrated_method_loses_less_than_rounding_to_nearest(here, qtool, method):
    flags = ("-b", "3", "-f", "gptq", "-n", "32", "-l", "64", "--eval", "quick", "--json")
    plain = qtool("quantize", "./model", "-m", "rtn", *flags, "--asym").value
    better = qtool("quantize", "./model", "-m", method, *flags, "--asym").value
    assert better["metrics"]["kld"]["mean"] < plain["metrics"]["kld"]["mean"]


def test_a_model_does_not_differ_from_itself(here, qtool):
    metrics = qtool("eval", "./model", "--ref", "./model", *EVAL, "--json").value["results"][0]
    assert metrics["format"] == "float"
    assert metrics["metrics"]["kld"]["mean"] == 0
    assert metrics["metrics"]["top1"]["value"] == 1


def test_several_models_make_one_table(here, packed, qtool):
    models = [packed[name] for name in FORMATS]
    outcome = qtool("eval", *models, "./model", "--ref", "./model", *EVAL)
    rows = outcome.out.splitlines()
    assert rows[0].split()[:2] == ["model", "format"]
    assert [row.split()[1] for row in rows[1:5]].count("float") == 1
    assert f"next: qtool inspect {models[0]}" == rows[-1]


def test_statistics_stand_in_for_a_data_set(here, qtool):
    measured = qtool("calibrate", "./model", "-o", "stats.gguf", *SMALL)
    assert measured.code == 0
    assert measured.out.splitlines()[-1] == (
        "next: qtool quantize ./model --method awq --statistics stats.gguf"
    )
    flags = ("--method", "awq", "--eval", "quick", "--json")
    scaled = qtool("quantize", "./model", *flags, "--statistics", "stats.gguf").value
    plain = qtool("quantize", "./model", "-m", "rtn", "--asym", "-f", "awq", *flags[2:]).value
    assert scaled["metrics"]["kld"]["mean"] < plain["metrics"]["kld"]["mean"]
    assert scaled["calibration"]["tokens"] == 0


def test_statistics_of_another_model_are_refused(here, qtool):
    assert qtool("calibrate", "./model", "-o", "stats.gguf", *SMALL).code == 0
    tiny_model("llama", here / "other", hidden=64, intermediate=160)
    outcome = qtool("quantize", "./other", "-g", "32", "--statistics", "stats.gguf")
    assert outcome.code == 2
    assert "another model" in outcome.err


def test_statistics_are_replaced_only_with_overwrite(here, qtool):
    (here / "stats.gguf").write_text("precious")
    refused = qtool("calibrate", "./model", "-o", "stats.gguf", *SMALL)
    assert refused.code == 2
    assert (here / "stats.gguf").read_text() == "precious"
    assert qtool("calibrate", "./model", "-o", "stats.gguf", *SMALL, "--overwrite").code == 0
    assert (here / "stats.gguf").read_bytes()[:4] == b"GGUF"


def test_statistics_that_fail_leave_nothing(originals, here, qtool):
    nan = originals / "spoiled" / "nan"
    outcome = qtool("calibrate", nan, "-o", "deep/stats.gguf", *SMALL)
    assert outcome.code == 8
    assert [path.name for path in here.iterdir()] == ["model"]


def test_the_last_line_is_the_next_command_and_it_runs(here, qtool):
    line = qtool("inspect", "./model").out.splitlines()[-1]
    assert line == "next: qtool quantize ./model --method awq --bits 4"
    line = qtool(*line.split()[2:], *SMALL, "--eval", "none").out.splitlines()[-1]
    assert line == "next: qtool eval ./model-awq-w4g128 --ref ./model"
    line = qtool(*line.split()[2:], *EVAL).out.splitlines()[-1]
    assert line == "next: qtool inspect ./model-awq-w4g128"
    assert qtool(*line.split()[2:]).code == 0


@pytest.mark.parametrize(
    ("hidden", "intermediate", "flag"), [(192, 320, " --group-size 64"), (256, 512, "")]
)
def test_inspect_proposes_a_group_size_that_divides_the_rows(
    here, qtool, hidden, intermediate, flag
):
    tiny_model("llama", here / "other", hidden=hidden, intermediate=intermediate, layers=1)
    line = qtool("inspect", "./other").out.splitlines()[-1]
    assert line == f"next: qtool quantize ./other --method awq --bits 4{flag}"
    assert qtool(*line.split()[2:], "--dry-run").code == 0


def test_inspect_writes_nothing(here, qtool):
    before = contents(here)
    assert qtool("inspect", "./model", "--tensors", "--diff", "./model").code == 0
    assert contents(here) == before
