"""What is written, where, and when: names, plans that write nothing, replacements, repetitions."""

import hashlib

import pytest
import yaml
from builders.command_line import SMALL, contents

from qtool.checkpoint.reader import TensorReader

RTN = ("-m", "rtn", "--eval", "none")
GPTQ = ("-m", "gptq", *SMALL, "--eval", "none")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ((), "model-awq-w4g128"),
        (("-m", "gptq"), "model-gptq-w4g128"),
        (("-m", "gptq", "-b", "3", "-g", "64"), "model-gptq-w3g64"),
        (("-m", "awq+gptq"), "model-awq-gptq-w4g128-gptq"),
        (("-b", "8"), "model-rtn-w8g128-compressed-tensors"),
        (("-b", "8", "-g", "-1"), "model-rtn-w8-compressed-tensors"),
        (("-m", "gptq", "-f", "awq"), "model-gptq-w4g128-awq"),
    ],
)
def test_the_default_output_is_named_after_model_and_scheme(here, qtool, flags, name):
    value = qtool("quantize", "./model", *flags, "--dry-run", "--json").value
    assert value["artifacts"][0]["path"] == str(here / name)


def test_several_formats_get_a_directory_each(here, qtool):
    # float16 scales in both: awq and gptq agree on them
    outcome = qtool("quantize", "./model", *RTN, "-f", "gptq", "-f", "awq", "-o", "both", "--json")
    assert [a["path"] for a in outcome.value["artifacts"]] == [
        str(here / "both" / "gptq"),
        str(here / "both" / "awq"),
    ]
    for name in ("gptq", "awq"):
        assert qtool("inspect", here / "both" / name, "--json").value["quantization"]


def test_a_dry_run_reads_no_weights_and_writes_nothing(here, qtool, monkeypatch):
    def refuse(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(TensorReader, "__init__", refuse)
    outcome = qtool("quantize", "./model", "-m", "gptq", "--dry-run")
    assert outcome.code == 0
    assert outcome.err == ""
    assert "int4-sym-g128 for 14 linears" in outcome.out
    assert [path.name for path in here.iterdir()] == ["model"]
    assert qtool("quantize", "./model", *GPTQ).code == 1  # the same without --dry-run reads them


def test_a_plan_names_the_bytes_that_are_then_written(here, qtool):
    planned = qtool("quantize", "./model", *GPTQ, "--dry-run", "--json").value["artifacts"][0]
    written = qtool("quantize", "./model", *GPTQ, "--json").value["artifacts"][0]
    on_disk = sum(
        path.stat().st_size for path in (here / "model-gptq-w4g128").glob("*.safetensors")
    )
    assert planned["bytes"] == written["bytes"] == on_disk


def test_everything_beside_the_weights_is_there(here, qtool):
    (here / "model" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\nHi\n")
    (here / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert qtool("quantize", "./model", *GPTQ, "-o", "out").code == 0
    names = set(contents(here / "out"))
    assert names >= {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("qtool-recipe.yaml", "qtool-report.json", "SHA256SUMS"),
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (here / "out" / name).read_bytes() == (here / "model" / name).read_bytes()
    card = (here / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "model"
    assert metadata["base_model_relation"] == "quantized"
    assert metadata["license"] == "apache-2.0"
    for line in (here / "out" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((here / "out" / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    "flags",
    [
        ("-m", "gptq", *SMALL),
        ("-m", "awq", "-g", "64", *SMALL, "--eval", "none"),
        ("-m", "awq+gptq", "-f", "compressed-tensors", *SMALL, "--eval", "none"),
        ("-b", "8", "--ignore", "layers.0.*"),
        ("-m", "gptq", *SMALL, "-d", "text.txt", "--seed", "3", "--override", "mlp.*=bits:8"),
    ],
    ids=" ".join,
)
def test_the_recipe_beside_a_result_makes_the_same_bytes_again(here, qtool, flags):
    (here / "text.txt").write_text("".join(f"line {i} says {i * i}\n" for i in range(200)))
    assert qtool("quantize", "./model", *flags, "-o", "first").code == 0
    again = qtool("quantize", "./model", "--recipe", "first/qtool-recipe.yaml", "-o", "second")
    assert again.code == 0, again.err
    first, second = contents(here / "first"), contents(here / "second")
    assert first["SHA256SUMS"] == second["SHA256SUMS"]
    assert first["qtool-recipe.yaml"] == second["qtool-recipe.yaml"]
    changed = {name for name in first if first[name] != second[name]}
    assert changed <= {"qtool-report.json"}  # it holds times


def test_a_directory_with_something_in_it_is_left_alone(here, qtool):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        outcome = qtool("quantize", "./model", *RTN, "-o", "out", *flags)
        assert outcome.code == 2
        assert "not empty" in outcome.err or "does not look like a model" in outcome.err
    assert contents(here / "out") == {"thesis.tex": b"years of work"}


def test_the_input_is_never_the_output(here, qtool):
    before = contents(here)
    for output in ("model", "model/inside", "."):
        assert qtool("quantize", "./model", *RTN, "-o", output, "--overwrite").code == 2
    assert contents(here) == before


def test_a_result_is_replaced_only_with_overwrite(here, qtool):
    assert qtool("quantize", "./model", *RTN, "-o", "out").code == 0
    first = contents(here / "out")
    assert qtool("quantize", "./model", *GPTQ, "-o", "out").code == 2
    assert contents(here / "out") == first
    assert qtool("quantize", "./model", *GPTQ, "-o", "out", "--overwrite").code == 0
    assert contents(here / "out") != first
    assert sorted(path.name for path in here.iterdir()) == ["model", "out"]


def test_a_run_that_fails_halfway_keeps_the_result_it_was_to_replace(originals, here, qtool):
    assert qtool("quantize", "./model", *RTN, "-o", "out").code == 0
    before = contents(here / "out")
    nan = originals / "spoiled" / "nan"  # its second block is damaged
    outcome = qtool("quantize", nan, *GPTQ, "-o", "out", "--overwrite")
    assert outcome.code == 8
    assert "block 1 of 2" in outcome.err
    assert contents(here / "out") == before
    assert sorted(path.name for path in here.iterdir()) == ["model", "out"]


def test_a_measurement_that_fails_keeps_the_result_it_was_to_replace(here, qtool, monkeypatch):
    assert qtool("quantize", "./model", *RTN, "-o", "out").code == 0
    before = contents(here / "out")

    def starved(*_, **__):
        raise MemoryError

    again = ("quantize", "./model", "-m", "rtn", "-o", "out", "--overwrite")
    with monkeypatch.context() as patched:
        patched.setattr("qtool.pipeline.measurement.evaluate_fully", starved)
        outcome = qtool(*again)
    assert outcome.code == 4
    assert "2 of 2 blocks are kept" in outcome.err
    assert contents(here / "out") == before
    assert qtool(*again).code == 0  # nothing but the measurement is done again
    assert sorted(path.name for path in here.iterdir()) == ["model", "out"]
