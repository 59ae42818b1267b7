"""From a model of any family to a GGUF file and back: what is stored is what was computed."""

import hashlib

import pytest
import torch
from builders.plans import plan_of, random_windows
from builders.tiny_models import tiny_model
from safetensors.torch import load_file

from qtool.calibration.moments import Moments
from qtool.checkpoint.gguf_header import read_gguf
from qtool.checkpoint.locate import locate
from qtool.evaluation.runners import StreamedModel
from qtool.methods.protocol import METHODS
from qtool.model.family import FAMILIES
from qtool.pipeline import gguf_rows
from qtool.pipeline.export import plan_export, run_export
from qtool.pipeline.outputs import CalibrationNote
from qtool.pipeline.progress import Silent
from qtool.pipeline.quantize import Calibration, RunSettings, run_plan
from qtool.recipe.schema import Export

CPU = torch.device("cpu")
LENGTH = 33


def model_of(family, directory):
    """A tiny model whose queries llama.cpp scales as its configuration says."""
    scaled = {"query_pre_attn_scalar": 32} if "gemma" in family else {}
    return tiny_model(family, directory, **scaled)


def quantize(directory, path, kind, *, statistics=None, note=None, **recipe):
    plan = plan_of(directory, formats=(f"gguf:{kind}",), **recipe)
    windows = random_windows(12, LENGTH, seed=1) if plan.calibrated else None
    calibration = Calibration(windows=windows, statistics=statistics, note=note)
    return run_plan(plan, [path], RunSettings(CPU), Silent(), calibration)


def export(source, path, name, **settings):
    plan = plan_export(locate(str(source), gguf=True), Export(format=name))
    run_export(plan, path, Silent(), **settings)
    return path


def floats(file, directory):
    """The weights of a GGUF file as transformers would load them."""
    return load_file(export(file, directory, "safetensors:F32") / "model.safetensors")


def logits(directory, spill):
    ids = random_windows(12, LENGTH, seed=1).ids
    model = StreamedModel(locate(str(directory)), ids, CPU, torch.float32, spill)
    return torch.stack(list(model.logits()))


def divergence(reference, other):
    """Mean KL divergence over tokens."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in directory.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_goes_there_and_back_bit_for_bit(family, tmp_path):
    original = model_of(family, tmp_path / "model")
    before = digests(original)
    file = export(original, tmp_path / "x.gguf", "gguf:F32")
    back = floats(file, tmp_path / "back")
    weights = load_file(original / "model.safetensors")
    assert back.keys() == weights.keys()
    for name, values in back.items():
        if "norm" in name and "gemma" in family:  # weight + 1 is rounded
            torch.testing.assert_close(values, weights[name], rtol=0, atol=3e-7)
        else:
            assert torch.equal(values, weights[name]), name
    assert digests(original) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_and_folded_weights_are_put_in_their_places(family, tmp_path):
    """AWQ moves scales into norms and other linears; at 8 bits nothing else changes."""
    original = model_of(family, tmp_path / "model")
    quantize(original, tmp_path / "x.gguf", "Q8_0", method="awq")
    back = floats(tmp_path / "x.gguf", tmp_path / "back")
    weights = load_file(original / "model.safetensors")
    moved = [x for x in back if (back[x] - weights[x]).norm() > 0.02 * weights[x].norm()]
    assert len(moved) > 2  # beyond rounding to 8 bits
    found = logits(tmp_path / "back", tmp_path / "a")
    assert divergence(logits(original, tmp_path / "b"), found) < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_error_feedback_on_blocks_loses_less_than_rounding(family, tmp_path):
    original = model_of(family, tmp_path / "model")
    expected = logits(original, tmp_path / "spill")
    lost = {}
    for method in ("rtn", "gptq"):
        quantize(original, tmp_path / f"{method}.gguf", "Q4_0", method=method)
        back = export(tmp_path / f"{method}.gguf", tmp_path / method, "safetensors:F32")
        lost[method] = divergence(expected, logits(back, tmp_path / f"spill-{method}"))
    assert lost["gptq"] < lost["rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_the_reported_error_is_that_of_the_written_weights(method, tmp_path):
    original = tiny_model("llama", tmp_path / "model", hidden=256, intermediate=256, layers=1)
    result = quantize(original, tmp_path / "x.gguf", "Q3_K_M", method=method, error_propagation=0.0)
    assert {layer.grid for layer in result.layers} >= {"Q3_K"}
    assert all(0 < layer.relative_error < 0.3 for layer in result.layers)
    if method != "rtn":
        return
    back = floats(tmp_path / "x.gguf", tmp_path / "back")
    weights = load_file(original / "model.safetensors")
    for layer in result.layers:
        name = f"{layer.name}.weight"
        error = (back[name] - weights[name]).norm() / weights[name].norm()
        assert layer.relative_error == pytest.approx(float(error), rel=1e-4)


def test_a_block_type_for_each_linear_of_one_tap(tmp_path):
    original = tiny_model("llama", tmp_path / "model", hidden=256, intermediate=256)
    rules = ({"match": "q_proj", "type": "Q8_0"}, {"match": "k_proj", "type": "F16"})
    result = quantize(original, tmp_path / "x.gguf", "Q2_K", method="gptq", rules=rules)
    kinds = {ref.name: ref.dtype for ref in read_gguf(tmp_path / "x.gguf").tensors}
    assert [kinds[f"blk.0.attn_{x}.weight"] for x in "qkv"] == ["Q8_0", "F16", "Q3_K"]
    grids = {layer.name: layer.grid for layer in result.layers}
    assert grids["model.layers.0.self_attn.q_proj"] == "Q8_0"
    assert "model.layers.0.self_attn.k_proj" not in grids
    back = floats(tmp_path / "x.gguf", tmp_path / "back")
    weights = load_file(original / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(back[name], weights[name].half().float())


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq"])
def test_the_same_inputs_give_the_same_bytes(method, tmp_path):
    original = tiny_model("qwen3", tmp_path / "model")
    first, second = (
        quantize(original, tmp_path / f"{i}" / "x.gguf", "Q4_0", method=method) for i in range(2)
    )
    assert first.digests == second.digests


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M", "IQ4_XS", "Q5_1"])
def test_the_rows_looked_at_at_once_do_not_matter(kind, tmp_path, monkeypatch):
    original = tiny_model("llama", tmp_path / "model", hidden=256, intermediate=256, layers=1)
    generator = torch.Generator().manual_seed(4)
    importance = {
        f"blk.0.{name}.weight": torch.rand(256, generator=generator)
        for name in ("attn_q", "ffn_down", "ffn_up")
    }
    weights = load_file(original / "model.safetensors")
    errors, contents = [], set()
    for at_once in (gguf_rows.WEIGHTS_AT_ONCE, 7 * 256):
        monkeypatch.setattr(gguf_rows, "WEIGHTS_AT_ONCE", at_once)
        path = tmp_path / f"{at_once}" / "x.gguf"
        export(original, path, f"gguf:{kind}", importance=importance)
        contents.add(path.read_bytes())
        back = floats(path, tmp_path / f"{at_once}" / "back")
        errors.append(torch.stack([(back[name] - weights[name]).norm() for name in back]))
    # Of scales that are equally good, the order of sums may choose another.
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=1e-6)
    assert len(contents) == 1 or kind not in {"F16", "Q8_0"}


def test_importance_changes_only_what_it_is_known_of(tmp_path):
    original = tiny_model("llama", tmp_path / "model", hidden=256, intermediate=256, layers=1)
    importance = {"blk.0.ffn_up.weight": torch.logspace(-3, 3, 256).view(8, 32).T.flatten()}
    plain = floats(export(original, tmp_path / "a.gguf", "gguf:Q4_K_M"), tmp_path / "a")
    path = export(original, tmp_path / "b.gguf", "gguf:Q4_K_M", importance=importance)
    weighed = floats(path, tmp_path / "b")
    changed = {name for name in plain if not torch.equal(plain[name], weighed[name])}
    name = "model.layers.0.mlp.up_proj.weight"
    assert changed == {name}
    weights = load_file(original / "model.safetensors")[name]

    def lost(found):
        return ((found - weights).square() @ importance["blk.0.ffn_up.weight"]).sum()

    assert lost(weighed[name]) < 0.9 * lost(plain[name])


def test_statistics_from_a_file_take_the_place_of_text(tmp_path):
    original = tiny_model("llama", tmp_path / "model", hidden=256, intermediate=256, layers=1)
    moments = {
        tap: Moments(100, torch.linspace(0.1, 3, 256), torch.linspace(0.1, 9, 256))
        for tap in ("qkv", "o", "gate_up", "down")
    }
    plan = plan_of(original, formats=("gguf:Q4_K_M",), method="rtn")
    taps = {linear.tap for linear in plan.linears}
    note = CalibrationNote("mine.gguf", ("a.txt", "b.txt"), 7, 7)
    chosen = {0: dict(zip(sorted(taps), moments.values(), strict=True))}
    result = quantize(
        original, tmp_path / "x.gguf", "Q4_K_M", method="rtn", statistics=chosen, note=note
    )
    said = read_gguf(tmp_path / "x.gguf").metadata
    assert said["quantize.imatrix.file"].content == "mine.gguf"
    assert said["quantize.imatrix.dataset"].content == "a.txt, b.txt"
    assert said["quantize.imatrix.chunks_count"].content == 7
    assert result.plan.outputs[0].n_bytes == (tmp_path / "x.gguf").stat().st_size


def test_calibration_text_is_named_without_its_place(tmp_path):
    original = tiny_model("llama", tmp_path / "model")
    quantize(original, tmp_path / "x.gguf", "Q4_0", method="gptq")
    said = read_gguf(tmp_path / "x.gguf").metadata
    assert said["quantize.imatrix.dataset"].content == "random"
    assert said["quantize.imatrix.chunks_count"].content == 12
    assert not any(str(tmp_path) in str(value.content) for value in said.values())


def test_parts_hold_what_one_file_does(tmp_path):
    original = model_of("gemma3_text", tmp_path / "model")
    whole = floats(export(original, tmp_path / "x.gguf", "gguf:Q8_0"), tmp_path / "a")
    plan = plan_export(locate(str(original)), Export(format="gguf:Q8_0", split_max_size="40KB"))
    run_export(plan, tmp_path / "y.gguf", Silent())
    parts = sorted(tmp_path.glob("y-*.gguf"))
    assert len(parts) == plan.output.n_files > 2
    parted = floats(parts[-1], tmp_path / "b")
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
