"""Weights that are not finite end with a name; any finite ones give finite, correct output."""

import pytest
import torch
from builders.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from qtool.cli.app import run

LINEAR = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.post_attention_layernorm.weight"
PLACES = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", LINEAR, NORM]
PAIRS = [
    (method, kind)
    for method in ("rtn", "gptq", "awq", "awq+gptq")
    for kind in ("gptq", "awq", "compressed-tensors", "gguf:Q4_0", "gguf:Q8_0")
    if kind != "awq" or method in {"rtn", "awq"}
]
# What transformers computes does not depend on a channel that a norm switches off, so these are
# compared as weights only where no method moves scales between layers.
EXTREMES = {
    "zeros": lambda w: w[LINEAR].zero_(),
    "a row of zeros": lambda w: w[LINEAR][3].zero_(),
    "subnormal": lambda w: w[LINEAR].mul_(1e-39),
    "tiny": lambda w: w[LINEAR].mul_(1e-30),
    "dead inputs": lambda w: w[NORM].zero_(),
    "half the inputs dead": lambda w: w[NORM][::2].zero_(),
    "one large weight": lambda w: w[LINEAR][3, 5].fill_(100.0),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("sound") / "model", dtype=torch.float32)


def changed(sound, place, change):
    place.mkdir()
    for file in sound.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    weights = load_file(sound / "model.safetensors")
    change(weights)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return weights


def quantized(place, method, kind):
    integers = () if kind.startswith("gguf") else ("-g", "32")
    asymmetric = ("--asym",) if kind == "awq" else ()
    arguments = ["quantize", place / "model", "-m", method, "-f", kind, "-o", place / "out"]
    arguments += ["-n", "2", "-l", "32", "--eval", "none", "-q", *integers, *asymmetric]
    return run([str(argument) for argument in arguments])


def read_back(place):
    """The result as float32, by qtool's own export."""
    source = next(iter((place / "out").glob("*.gguf")), place / "out")
    arguments = ["export", source, "-f", "safetensors:F32", "-o", place / "back", "-q"]
    assert run([str(argument) for argument in arguments]) == 0
    return load_file(place / "back" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), PAIRS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_weights_give_finite_and_close_output(sound, tmp_path, name, method, kind):
    original = changed(sound, tmp_path / "model", EXTREMES[name])
    assert quantized(tmp_path, method, kind) == 0
    found = read_back(tmp_path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    if "awq" in method:  # scales moved into the layer before: the weights alone do not compare
        return
    before, after = original[LINEAR].double(), found[LINEAR].double()
    assert (after - before).norm() <= 0.35 * before.norm() + 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", PLACES)
@pytest.mark.parametrize("kind", ["gptq", "gguf:Q8_0"])
def test_values_that_are_not_finite_are_refused_by_name(
    sound, tmp_path, capsys, value, tensor, kind
):
    changed(sound, tmp_path / "model", lambda w: w[tensor].view(-1)[7].fill_(value))
    assert quantized(tmp_path, "gptq", kind) == 8
    said = capsys.readouterr().err
    assert "error: " in said
    assert "layer" in said or tensor.removesuffix(".weight") in said or "token_embd" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_beyond_half_precision_scales_are_refused_by_name(sound, tmp_path, capsys, method):
    changed(sound, tmp_path / "model", lambda w: w[LINEAR][3, 5].fill_(1e6))
    assert quantized(tmp_path, method, "gptq") == 8
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert f"error: {LINEAR.removesuffix('.weight')}: a weight of" in said
    assert "float16" in said
    assert not (tmp_path / "out").exists()
