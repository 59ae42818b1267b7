"""Where a setting comes from: flag over variable over recipe over default."""

import pytest
import yaml
from builders.command_line import ROOT

RTN = ("quantize", "./model", "-m", "rtn", "--eval", "none", "--overwrite", "-o", "out")


@pytest.fixture
def resolved(here, qtool):
    """Run with these flags and return the resolved recipe beside the result."""

    def call(*flags):
        outcome = qtool(*RTN, *flags)
        assert outcome.code == 0, outcome.err
        return yaml.safe_load((here / "out" / "qtool-recipe.yaml").read_text())

    return call


@pytest.fixture
def recipe(here):
    path = here / "recipe.yaml"
    path.write_text("version: 1\nseed: 7\nquantize: {bits: 8, group_size: 64}\n")
    return path


def test_a_flag_beats_a_variable_beats_a_recipe_beats_the_default(resolved, recipe, monkeypatch):
    assert resolved()["seed"] == 42
    assert resolved("--recipe", recipe)["seed"] == 7
    monkeypatch.setenv("QTOOL_SEED", "8")
    assert resolved("--recipe", recipe)["seed"] == 8
    assert resolved("--recipe", recipe, "--seed", "9")["seed"] == 9


def test_a_flag_beats_the_recipe_key_by_key(resolved, recipe):
    found = resolved("--recipe", recipe, "--bits", "4")["quantize"]
    assert (found["bits"], found["group_size"]) == (4, 64)


def test_set_reaches_every_key_and_comes_last(resolved, recipe):
    found = resolved("--recipe", recipe, "-b", "4", "--set", "quantize.bits=3")
    assert found["quantize"]["bits"] == 3


def test_the_recipe_can_come_from_a_variable(resolved, recipe, monkeypatch):
    monkeypatch.setenv("QTOOL_RECIPE", str(recipe))
    assert resolved()["quantize"]["bits"] == 8


def test_the_device_can_come_from_a_variable(here, qtool, monkeypatch):
    monkeypatch.setenv("QTOOL_DEVICE", "tpu")
    assert qtool(*RTN).code == 2
    assert qtool(*RTN, "--device", "cpu").code == 0


def test_flags_may_be_written_with_underscores(resolved):
    found = resolved("--group_size", "64", "--damp_percent=0.02", "--no_act_order")["quantize"]
    assert (found["group_size"], found["damp_percent"]) == (64, 0.02)
    assert found["act_order"] is False


def test_values_keep_their_underscores(resolved):
    found = resolved("--override", "down_proj=bits:8", "--override=mlp.down_proj=bits:3")
    assert [rule["match"] for rule in found["rules"]] == ["down_proj", "mlp.down_proj"]


def test_rules_of_flags_come_before_those_of_the_recipe(here, resolved, recipe):
    recipe.write_text("version: 1\nrules: [{match: down_proj, bits: 8}]\n")
    found = resolved("--recipe", recipe, "--ignore", "layers.0.*")["rules"]
    assert [rule["match"] for rule in found] == ["layers.0.*", "down_proj"]


def test_the_model_may_come_from_the_recipe(here, qtool):
    (here / "recipe.yaml").write_text("version: 1\nmodel: {id: ./model}\nquantize: {bits: 8}\n")
    outcome = qtool("quantize", "--recipe", "recipe.yaml", "--dry-run", "--json")
    assert outcome.value["model"]["id"] == "./model"


def test_a_recipe_says_what_is_measured_and_the_flag_overrules_it(here, qtool):
    (here / "text.txt").write_text("to be or not to be, that is the question " * 20)
    (here / "recipe.yaml").write_text(
        "version: 1\nquantize: {method: rtn}\neval: {data: text.txt, context: 16, windows: 3}\n"
    )
    arguments = ("quantize", "./model", "--recipe", "recipe.yaml", "-o", "out", "--overwrite")
    measured = qtool(*arguments, "--json").value["metrics"]
    assert measured["kld"]["tokens"] == 3 * 16
    assert "48 tokens of text.txt" in (here / "out" / "README.md").read_text()
    assert qtool(*arguments, "--eval", "none", "--json").value["metrics"] == {}


# A ladder is several plans: test_ladder.py.
PRESETS = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.stem != "ladder")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_recipe_that_comes_with_qtool_can_be_planned(here, qtool, preset):
    value = qtool("quantize", "./model", "--recipe", preset, "--dry-run", "--json").value
    asked = yaml.safe_load(preset.read_text())
    assert value["quantization"]["method"] == asked["quantize"]["method"]
    bits = asked["quantize"].get("bits")
    grid = "Q4_K_M" if bits is None else f"int{bits}-"  # of the first format
    assert value["quantization"]["grid"].startswith(grid)
    assert [a["format"] for a in value["artifacts"]] == [e["format"] for e in asked["export"]]
