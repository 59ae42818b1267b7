"""Packed models whose parts contradict each other, or their configuration, are never unpacked."""

import shutil

import pytest
import torch
from builders.hostile_configs import edit
from builders.refusals import snapshot
from builders.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from qtool.cli.app import run

LINEAR = "model.layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"
FORMATS = {"gptq": "--sym", "awq": "--asym", "compressed-tensors": "--asym"}
EXPORTS = {
    "floats": ("-f", "safetensors", "-o", "out"),
    "a GGUF": ("-f", "gguf:Q8_0", "-o", "out.gguf", "--allow-requantize"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Format -> a packed directory without fault."""
    place = tmp_path_factory.mktemp("sound")
    source = tiny_model("llama", place / "float", dtype=torch.bfloat16)
    for name, zeros in FORMATS.items():
        arguments = ["quantize", source, "-m", "rtn", "-g", "32", "-f", name, "-o", place / name]
        arguments += [zeros, "--eval", "none", "-q"]
        assert run([str(argument) for argument in arguments]) == 0
    return place


def tensors(change):
    def spoil(directory):
        found = load_file(directory / WEIGHTS)
        change(found)
        save_file({k: v.contiguous() for k, v in found.items()}, directory / WEIGHTS)

    return spoil


def without(*parts):
    return tensors(lambda found: [found.pop(f"{LINEAR}.{part}") for part in parts])


def parts(**changes):
    """Other values of the linear's parts: name -> function of the tensor."""

    def change(found):
        for part, make in changes.items():
            found[f"{LINEAR}.{part}"] = make(found[f"{LINEAR}.{part}"])

    return tensors(change)


def declared(**changes):
    def spoil(directory):
        edit(directory, {f"quantization_config.{k}": v for k, v in changes.items()})

    return spoil


def group(**changes):
    """Other values in the one config group of compressed-tensors."""

    def spoil(directory):
        prefix = "quantization_config.config_groups.group_0."
        edit(directory, {prefix + key.replace("__", "."): v for key, v in changes.items()})

    return spoil


def both(*spoilers):
    return lambda directory: [spoil(directory) for spoil in spoilers]


def no_order(directory):
    found = load_file(directory / WEIGHTS)
    kept = {name: tensor for name, tensor in found.items() if not name.endswith("g_idx")}
    save_file(kept, directory / WEIGHTS)


# Name -> format, how it is spoiled, what the refusal names beside the directory.
CASES = {
    "no codes": ("gptq", without("qweight"), (WEIGHTS, LINEAR)),
    "no zero points": ("gptq", without("qzeros"), (WEIGHTS, f"{LINEAR}.qzeros")),
    "no scales": ("awq", without("scales"), (WEIGHTS, f"{LINEAR}.scales")),
    "no shape": ("compressed-tensors", without("weight_shape"), (WEIGHTS, f"{LINEAR}.weight_sh")),
    "packed and dense": (
        "gptq",
        tensors(lambda found: found.update({f"{LINEAR}.weight": torch.zeros(64, 64)})),
        (WEIGHTS, LINEAR, "both"),
    ),
    "half the rows": (
        "gptq",
        parts(qweight=lambda x: x[:, :32], qzeros=lambda x: x[:, :4], scales=lambda x: x[:, :32]),
        (WEIGHTS, LINEAR, "[32, 64]"),
    ),
    "half the columns": (
        "gptq",
        parts(
            qweight=lambda x: x[:4],
            qzeros=lambda x: x[:1],
            scales=lambda x: x[:1],
            g_idx=lambda x: x[:32],
        ),
        (WEIGHTS, LINEAR, "[64, 32]"),
    ),
    "a column less": (
        "compressed-tensors",
        parts(weight_shape=lambda x: x - torch.tensor([0, 1])),
        (WEIGHTS, LINEAR, "63"),
    ),
    "a scale of NaN": (
        "awq",
        parts(scales=lambda x: x.fill_(float("nan"))),
        (WEIGHTS, LINEAR, "finite"),
    ),
    "flat zero points": ("gptq", parts(qzeros=lambda x: x.flatten()), ("qzeros", "[16]")),
    "activation order lost": ("gptq", both(no_order, declared(desc_act=True)), ("g_idx",)),
    "activation order of nonsense": ("gptq", parts(g_idx=lambda x: -x), (WEIGHTS, "g_idx")),
    "zero points of no use": (
        "compressed-tensors",
        group(weights__symmetric=True),
        (WEIGHTS, "weight_zero_point", "symmetric"),
    ),
    "rules that are text": ("gptq", declared(dynamic="x"), ("config.json", "dynamic")),
    "a rule without end": (
        "gptq",
        declared(dynamic={"+:(a|a|[a-z.0-9_]+)+$!": {"bits": 4}}),
        ("config.json", "pattern", "seconds"),
    ),
    "a target without end": (
        "compressed-tensors",
        group(targets=["re:(a|a|[a-z.0-9_]+)+$!"]),
        ("config.json", "pattern", "seconds"),
    ),
    "targets that are a number": (
        "compressed-tensors",
        group(targets=5),
        ("config.json", "targets"),
    ),
    "sparsity that is a word": (
        "compressed-tensors",
        declared(sparsity_config="x"),
        ("config.json", "sparsity_config"),
    ),
    "a method that is a list": ("gptq", declared(quant_method=["gptq"]), ("config.json", "gptq")),
}


@pytest.mark.parametrize("output", EXPORTS)
@pytest.mark.parametrize("name", CASES)
def test_a_packed_model_that_contradicts_itself_is_not_unpacked(
    sound, tmp_path, capsys, monkeypatch, name, output
):
    kind, spoil, words = CASES[name]
    monkeypatch.setattr("qtool.pipeline.rule_trial.MAX_SECONDS", 0.5)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sound / kind, tmp_path / "model")
    spoil(tmp_path / "model")
    before = snapshot(tmp_path)
    code = run(["export", "model", *EXPORTS[output]])
    said = capsys.readouterr().err
    assert code in {5, 6, 8}, said
    message = next(line for line in said.splitlines() if line.startswith("error: "))
    assert str(tmp_path / "model") in message
    for word in words:
        assert word in message
    assert snapshot(tmp_path) == before


HEADERS = {
    "bits of none": ("gptq", declared(bits=0), "config.json"),
    "bits of a fraction": ("gptq", declared(bits=4.5), "config.json"),
    "another group size": ("gptq", declared(group_size=64), WEIGHTS),
    "no group size": ("awq", declared(group_size=None), "config.json"),
    "another layout": ("gptq", declared(checkpoint_format="\x1b[31mevil"), "config.json"),
    "another version": ("awq", declared(version="gemm_fast"), "config.json"),
    "words of 64 bits": ("awq", parts(qweight=lambda x: x.to(torch.int64)), WEIGHTS),
    "scales on their side": ("gptq", parts(scales=lambda x: x.T), WEIGHTS),
    "no zero points": ("awq", without("qzeros"), WEIGHTS),
    "weights of float": ("compressed-tensors", group(weights__type="float"), "config.json"),
    "another strategy": ("compressed-tensors", group(weights__strategy="channel"), WEIGHTS),
    "a target that is no pattern": ("compressed-tensors", group(targets=["re:["]), "config.json"),
    "a shape of one": ("compressed-tensors", parts(weight_shape=lambda x: x[:1]), WEIGHTS),
}


@pytest.mark.parametrize("command", ["export", "eval"])
@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_held_to_their_configuration_before_torch(
    server, sound, tmp_path, name, command
):
    kind, spoil, file = HEADERS[name]
    shutil.copytree(sound / kind, tmp_path / "model")
    spoil(tmp_path / "model")
    before = snapshot(tmp_path)
    given = EXPORTS["floats"] if command == "export" else ("-l", "32", "-n", "2")
    ended = server.run(command, "model", *given, cwd=tmp_path)
    assert ended.code in {5, 6}, ended.err
    assert f"model/{file}" in ended.message
    assert not ended.heavy
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_eval_refuses_what_is_not_finite_though_no_text_would_meet_it(
    sound, tmp_path, capsys, tensor
):
    shutil.copytree(sound / "float", tmp_path / "model")
    found = load_file(tmp_path / "model" / WEIGHTS)
    found[tensor].view(-1)[-1] = float("inf")  # of a token that the tokenizer never makes
    save_file(found, tmp_path / "model" / WEIGHTS, metadata={"format": "pt"})
    assert run(["eval", str(tmp_path / "model"), "-l", "32", "-n", "2"]) == 8
    said = capsys.readouterr().err
    assert str(tmp_path / "model" / WEIGHTS) in said
    assert tensor in said


@pytest.mark.parametrize("name", FORMATS)
def test_memory_is_not_estimated_of_parts_that_config_json_does_not_describe(
    server, sound, tmp_path, name
):
    shutil.copytree(sound / name, tmp_path / "model")
    assert server.run("estimate-memory", "model", cwd=tmp_path).code == 0
    tensors(lambda found: found.update({"model.layers.7.x": torch.zeros(2)}))(tmp_path / "model")
    ended = server.run("estimate-memory", "model", cwd=tmp_path)
    assert ended.code == 6, ended.err
    assert "tensor 'model.layers.7.x' is none that config.json describes" in ended.message
    assert not ended.heavy
