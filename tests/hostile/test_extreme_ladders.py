"""Weights whose figures overflow, vanish or mean nothing: gates and ladders fail cleanly."""

import json
import math

import pytest
import torch
from builders.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from qtool.evaluation.gates import check_gates, gate_error, gate_json, parse_gates, shown_outcome
from qtool.json_text import json_text

LINEAR, HEAD, NORM = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"
SMALL = (
    "-n", "2", "-l", "16", "--set", "eval.context=16", "--set", "eval.windows=2", "-q", "--json",
)  # fmt: skip
GATES = ("--gate", "kld<=0.002", "--gate", "ppl_ratio<=1.03", "--gate", "top1>=0.9")


def of_all(weights, factor):
    for tensor in weights.values():
        tensor.mul_(factor)


EXTREMES = {
    "zeros": (lambda w: of_all(w, 0.0), {0}),
    "subnormal": (lambda w: of_all(w, 1e-39), {0}),
    "a head of zeros": (lambda w: w[HEAD].zero_(), {0}),
    "logits of 1e37": (lambda w: w[HEAD].mul_(3e37), {3}),
    "a linear of 1e30": (lambda w: w[LINEAR].mul_(1e30), {0, 3}),
    "logits that overflow": (lambda w: (w[HEAD].mul_(1e30), w[NORM].mul_(1e30)), {8}),
}


def strictly(text):
    """JSON as every reader takes it."""

    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("way", [pytest.param("--ladder", marks=pytest.mark.slow), "rtn"])
@pytest.mark.parametrize("name", EXTREMES)
def test_figures_that_mean_nothing_end_neither_in_a_traceback_nor_in_nan(
    warm_server, tmp_path, name, way
):
    change, codes = EXTREMES[name]
    sizes = {"layers": 1, "hidden": 128, "intermediate": 256}
    tiny_model("llama", tmp_path / "model", dtype=torch.float32, **sizes)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    flags = ("--ladder",) if way == "--ladder" else ("-m", "rtn", "-f", "compressed-tensors")
    ended = warm_server.run("quantize", "model", *flags, *SMALL, *GATES, cwd=tmp_path, seconds=200)
    assert ended.code in codes, ended.err
    assert "Traceback" not in ended.err
    value = strictly(ended.out)
    assert value["ok"] is (ended.code == 0)
    left = {p.name for p in tmp_path.iterdir() if p.name != "model"}
    if way == "rtn" and ended.code == 8:
        assert not left


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf, None, "x", [], True])
def test_a_gate_on_what_is_no_number_fails_and_says_so(figure):
    gates = parse_gates(["ppl_ratio<=1.03", "loss<=3%", "ppl>=0"])
    result = {"model": "m", "bytes": 1, "metrics": {"ppl": {"ratio": figure, "value": figure}}}
    outcomes = check_gates(gates, [result])
    numbers = isinstance(figure, bool)
    assert [outcome.passed for outcome in outcomes[:2]] == [numbers, numbers]
    strictly(json_text([gate_json(outcome) for outcome in outcomes]))
    assert all("nan" not in shown_outcome(outcome) for outcome in outcomes)
    assert numbers or "no value" in gate_error(outcomes).message
