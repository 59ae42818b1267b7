"""Recipes that a stranger wrote are refused by name in little time, or mean what they say."""

import pytest
import torch
from builders.refusals import snapshot
from builders.tiny_models import tiny_model

from qtool.errors import UsageError
from qtool.pipeline import rule_trial

SECONDS = 30  # in which all of them end; without a bound some took minutes
HEAD = "version: 1\nquantize: {method: rtn, group_size: 32}\neval: {metrics: []}\n"
DIGITS = "1" * 100_000
# What the file holds besides -> what the message says of it.
TEXTS = {
    "a truth value that is none": ("seed: !!bool x", "not what its tag says"),
    "a mapping that is a list": ("metadata: !!map [a]", "not what its tag says"),
    "a set that is a list": ("metadata: {name: !!set [a]}", "not what its tag says"),
    "a number of no digits": ("seed: !!int ''", "not what its tag says"),
    "a fraction of no digits": ("seed: !!float '_'", "not what its tag says"),
    "a number without end": (f"seed: 0x{'f' * 5000}", "a number of 5002 digits"),
    "half a character": (r'metadata: {name: "\ud800"}', "half of a surrogate pair"),
    "half a million values": (f"rules: [{'a,' * 450_000}]", "more than 20000 values"),
    "a gate of digits": (f'gates: ["kld<={DIGITS}x"]', "'gates' must be comparisons"),
    "a gate that limits nothing": ("gates: ['x<=1']", "there is no figure 'x'"),
    "a size of digits": (f"max_shard_size: '{DIGITS}'", "a size such as 5GB"),
    "a glob of brackets": (f"rules: [{{match: '{'[' * 100_000}', keep: true}}]", "at most 4096"),
    "a long expression": (f"rules: [{{match: 're:{'(' * 4000}', keep: true}}]", "regular expr"),
    "a tag without end": (f"seed: {'!' * 100_000}", "constructor for the tag"),
    "a model that is a list": ("model: [1]", "'model' must be a mapping"),
    "a model with other keys": ("model: {idd: x}", "unknown key 'model.idd'"),
    "data of no known kind": ("calibration: {datasets: [{path: x}]}", "is not a dataset"),
    "a type of no GGUF": ("export: [{format: 'gguf:ZZ'}]", "unknown GGUF file type"),
}
OVERRIDES = {
    "a number without end": f"x=bits:{'9' * 5000}",
    "a day that is none": "x=bits:2001-99-99",
    "brackets in brackets": f"x=bits:{'[' * 5000}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("float") / "model", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_recipe_is_refused_by_name(server, tmp_path, model, name):
    text, said = TEXTS[name]
    (tmp_path / "bad.yaml").write_text(f"{HEAD}{text}\n")
    before = snapshot(tmp_path)
    ended = server.run(
        "quantize", model, "--recipe", "bad.yaml", "-o", "out", cwd=tmp_path, seconds=SECONDS
    )
    assert ended.code == 2, ended.err
    assert "bad.yaml" in ended.message
    assert said in ended.message
    assert len(ended.err) < 2000
    assert not ended.heavy
    assert ended.peak_bytes < 100e6
    assert snapshot(tmp_path) == before


def test_globs_of_brackets_are_tried_where_they_can_be_stopped(monkeypatch):
    monkeypatch.setattr(rule_trial, "MAX_SECONDS", 0.5)
    patterns = [f"{number}{'[' * 4000}" for number in range(40)]
    with pytest.raises(UsageError, match=r"rule '\d+\[+\.\.\.' takes more than"):
        rule_trial.check_patterns(patterns, ["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_hostile_override_is_refused(server, tmp_path, model, name):
    ended = server.run("quantize", model, "--override", OVERRIDES[name], cwd=tmp_path)
    assert ended.code == 2, ended.err
    assert ended.message.startswith("--override 'x=bits:")
    assert len(ended.err) < 1000


def test_a_gate_with_spaces_without_end_is_refused(server, tmp_path, model):
    gate = f"kld<=x{' ' * 100_000}y"
    ended = server.run("eval", model, "--gate", gate, cwd=tmp_path, seconds=SECONDS)
    assert ended.code == 2, ended.err
    assert "is not a gate" in ended.message


def test_an_output_that_a_terminal_would_obey_is_spelled_out(server, tmp_path, model):
    (tmp_path / "r.yaml").write_text(f'{HEAD}output: "\\e[31m"\n')
    ended = server.run("quantize", model, "--recipe", "r.yaml", "--dry-run", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.out
    assert "\\x1b[31m" in ended.out
