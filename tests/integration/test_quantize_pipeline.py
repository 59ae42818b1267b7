"""The whole line on tiny models of every family: the result runs, is near, and is repeatable."""

import hashlib
import json

import pytest
import torch
from builders.plans import plan_of, random_windows
from builders.tiny_models import tiny_model, token_ids
from safetensors.torch import load_file, save_file

from qtool.checkpoint.locate import locate
from qtool.checkpoint.reader import TensorReader
from qtool.errors import NumericalError, UsageError
from qtool.evaluation.runners import StreamedModel
from qtool.formats.reading import DenseSource
from qtool.methods.protocol import METHODS
from qtool.model import streaming
from qtool.model.family import FAMILIES
from qtool.pipeline.calibrate import statistics_for
from qtool.pipeline.calibration_run import CalibrationSettings, calibrate_to
from qtool.pipeline.progress import Silent
from qtool.pipeline.quantize import Calibration, RunSettings, run_plan

DEVICE = torch.device("cpu")  # or what --device says
LENGTH = 33
CALIBRATED = [name for name in METHODS if name != "rtn"]


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    monkeypatch.setattr(f"{__name__}.DEVICE", device)


def quantize(directory, destinations, *, windows=None, statistics=None, held_bytes=None, **recipe):
    """Run a plan; `destinations` is one path or, for several formats, a list."""
    paths = destinations if isinstance(destinations, list) else [destinations]
    plan = plan_of(directory, **recipe)
    if plan.calibrated and windows is None and statistics is None:
        windows = random_windows(12, LENGTH, seed=1)
    settings = RunSettings(DEVICE, held_bytes=held_bytes)
    calibration = Calibration(windows=windows, statistics=statistics)
    return run_plan(plan, paths, settings, Silent(), calibration)


def logits(directory, spill, ids=None):
    ids = random_windows(12, LENGTH, seed=1).ids if ids is None else ids
    model = StreamedModel(locate(str(directory)), ids, DEVICE, torch.float32, spill)
    return torch.stack(list(model.logits())).cpu()


def divergence(reference, other):
    """Mean KL divergence over tokens."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def dense(directory):
    """Name -> dense weight of everything in a directory, unpacked."""
    checkpoint = locate(str(directory))
    with TensorReader(checkpoint.refs) as reader:
        source = DenseSource(checkpoint, reader)
        packed = {f"{module}.weight" for module in source.grids}
        plain = {
            name
            for name in checkpoint.refs
            if name.rpartition(".")[0] not in source.grids or name.endswith(".bias")
        }
        return {name: source.read(name) for name in packed | plain}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_a_complete_model_near_the_original(family, method, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=1, dtype=torch.bfloat16)
    result = quantize(directory, tmp_path / "out", method=method, bits=8)
    assert result.paths == (tmp_path / "out",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "qtool-recipe.yaml",
        "qtool-report.json",
        "README.md",
        "SHA256SUMS",
    } <= written
    assert [layer.name for layer in result.layers] == [x.name for x in result.plan.linears]
    # 8 bits lose next to nothing, so whatever was folded must have been folded right.
    before, after = logits(directory, tmp_path), logits(tmp_path / "out", tmp_path)
    assert torch.isfinite(after).all()
    assert divergence(before, after) < 5e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((directory / "config.json").read_text())
    assert config.pop("quantization_config")
    assert config == original


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_norms_but_not_the_function(family, method, tmp_path):
    """At 8 bits and in float32 hardly anything but the folding can move the logits."""
    directory = tiny_model(family, tmp_path / "model", seed=2, layers=2)
    quantize(directory, tmp_path / "out", method=method, bits=8)
    plain = tiny_rtn(directory, tmp_path / "rtn")
    before, after = logits(directory, tmp_path), logits(tmp_path / "out", tmp_path)
    by_rtn = logits(plain, tmp_path)
    assert (after - before).norm() < 0.05 * before.norm()
    assert (after - before).norm() < 1.5 * (by_rtn - before).norm()
    old, new = dense(directory), dense(tmp_path / "out")
    assert set(old) == set(new)
    moved = {name for name in old if not torch.equal(old[name].float(), new[name].float())}
    pairs = [pair for pair in FAMILIES[family].pairs if pair.kind == "norm"]
    for pair in pairs:
        assert any(f"{pair.previous}.weight" in name for name in moved)
    assert not any(name.startswith(("model.embed", "model.norm", "lm_head")) for name in moved)


def tiny_rtn(directory, out):
    quantize(directory, out, method="rtn", bits=8)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_loses_less_than_rtn(family, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=3, layers=2)
    windows = random_windows(32, LENGTH, seed=4)
    quantize(directory, tmp_path / "rtn", method="rtn", bits=4, clip=False)
    result = quantize(directory, tmp_path / "gptq", method="gptq", bits=4, windows=windows)
    ratios = [layer.against_rtn for layer in result.layers]
    assert sum(ratios) / len(ratios) < 0.7
    assert max(ratios) < 1
    before = logits(directory, tmp_path, windows.ids)
    by_rtn = divergence(before, logits(tmp_path / "rtn", tmp_path, windows.ids))
    by_gptq = divergence(before, logits(tmp_path / "gptq", tmp_path, windows.ids))
    assert by_gptq < 0.9 * by_rtn


@pytest.mark.parametrize("method", METHODS)
def test_the_reported_error_is_that_of_the_written_weights(method, tmp_path):
    """Oracle for the first tap: its inputs, from hooks on the full model, times the weights."""
    from transformers import AutoModelForCausalLM

    directory = tiny_model("llama", tmp_path / "model", seed=5, layers=1)
    windows = random_windows(12, LENGTH, seed=6)
    result = quantize(
        directory, tmp_path / "out", method=method, windows=windows, error_propagation=0.0
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen = []
    projection = model.model.layers[0].self_attn.q_proj
    projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    old, new = dense(directory), dense(tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    scale = old[norm] / new[norm]  # what AWQ divided the inputs by
    with torch.no_grad():
        for window in windows.ids:
            model(window[None], use_cache=False)
    x = torch.cat(seen).double() if method != "rtn" else torch.eye(64, dtype=torch.float64)
    for name in ("q_proj", "k_proj"):
        full = f"model.layers.0.self_attn.{name}"
        wanted = x @ old[f"{full}.weight"].double().T
        got = (x / scale) @ new[f"{full}.weight"].double().T
        error = ((got - wanted).norm() / wanted.norm()).item()
        reported = next(layer for layer in result.layers if layer.name == full)
        assert reported.relative_error == pytest.approx(error, rel=2e-3)
        assert (reported.against_rtn is None) == (method in {"rtn", "awq"})


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_several_formats_share_one_calibration_and_hold_the_same_weights(
    method, symmetric, tmp_path
):
    directory = tiny_model("llama", tmp_path / "model", seed=7, dtype=torch.float16)
    formats = ("gptq", "awq", "compressed-tensors")
    paths = [tmp_path / name for name in formats]
    result = quantize(directory, paths, method=method, symmetric=symmetric, formats=formats)
    assert result.paths == tuple(paths)
    assert len(result.layers) == len(result.plan.linears)  # each was rounded once
    weights = [dense(path) for path in paths]
    for other in weights[1:]:
        assert set(other) == set(weights[0])
        assert all(torch.equal(other[name], weights[0][name]) for name in other)
    methods = [
        json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"]
        for path in paths
    ]
    assert methods == list(formats)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_same_inputs_give_the_same_bytes(family, method, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=8, dtype=torch.bfloat16)
    sums = []
    for run in range(2):
        out = tmp_path / f"out-{run}"
        result = quantize(directory, out, method=method)
        content = (out / "model.safetensors").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert result.digests[0] == {"model.safetensors": digest}
        sums.append((out / "SHA256SUMS").read_text())
        assert f"{digest}  model.safetensors" in sums[-1]
    assert sums[0] == sums[1]


def test_other_calibration_text_gives_other_bytes(tmp_path):
    directory = tiny_model("llama", tmp_path / "model", seed=8)
    digests = [
        quantize(
            directory, tmp_path / f"{seed}", method="gptq", windows=random_windows(4, 33, seed)
        ).digests
        for seed in range(2)
    ]
    assert digests[0] != digests[1]


@pytest.mark.parametrize("method", METHODS)
def test_shards_hold_what_one_file_would(method, tmp_path):
    directory = tiny_model("qwen2", tmp_path / "model", seed=9, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    quantize(directory, tmp_path / "one", method=method)
    quantize(directory, tmp_path / "many", method=method, max_shard_size="50KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 1
    together = {}
    for shard in shards:
        together.update(load_file(shard))
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert set(together) == set(single)
    assert all(torch.equal(together[name], single[name]) for name in single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_kept_modules_stay_byte_for_byte(method, dtype, tmp_path):
    directory = tiny_model("llama", tmp_path / "model", seed=10, layers=3, dtype=dtype)
    rules = [
        {"match": "lm_head", "keep": True},
        {"match": "model.layers.1.*", "keep": True},
        {"match": "re:.*layers.2.mlp", "keep": True},
    ]
    result = quantize(directory, tmp_path / "out", method=method, rules=rules)
    quantized = {layer.name for layer in result.layers}
    assert len(quantized) == 7 + 4
    assert not any(".layers.1." in name or "layers.2.mlp" in name for name in quantized)
    old = load_file(directory / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in old if ".layers.1." in name or "layers.2.mlp" in name]
    for name in [*kept, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]:
        assert new[name].dtype == old[name].dtype == dtype
        assert torch.equal(new[name], old[name])
    assert torch.isfinite(logits(tmp_path / "out", tmp_path)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tap", ["attn_in", "attn_out", "mlp_in", "mlp_out"])
def test_awq_works_around_a_kept_tap(tap, family, dtype, tmp_path):
    """A scale must not be folded into a linear that is stored as it was."""
    directory = tiny_model(family, tmp_path / "model", seed=11, layers=1, dtype=dtype)
    rules = [
        {"match": f"re:.*layers.0.{linear}$", "keep": True}
        for linear in FAMILIES[family].tap(tap).linears
    ]
    quantize(directory, tmp_path / "out", method="awq", bits=8, rules=rules)
    old = load_file(directory / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    for linear in FAMILIES[family].tap(tap).linears:
        name = f"model.layers.0.{linear}.weight"
        assert new[name].dtype == dtype
        assert torch.equal(new[name], old[name])
    assert divergence(logits(directory, tmp_path), logits(tmp_path / "out", tmp_path)) < 5e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_stops_the_run_and_leaves_nothing(
    method, name, value, tmp_path
):
    directory = tiny_model("llama", tmp_path / "model", layers=2)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[5] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumericalError) as caught:
        quantize(directory, tmp_path / "out", method=method)
    assert caught.value.exit_code == 8
    assert name in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_activations_that_overflow_stop_the_run_and_name_a_linear(tmp_path):
    directory = tiny_model("llama", tmp_path / "model", layers=2)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(NumericalError, match=r"model\.layers\."):
        quantize(directory, tmp_path / "out", method="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [-1, 0, 8, 32])
def test_every_granularity_runs(group_size, method, tmp_path):
    directory = tiny_model("llama", tmp_path / "model", seed=12, layers=1)
    quantize(directory, tmp_path / "out", method=method, group_size=group_size, bits=8)
    before, after = logits(directory, tmp_path), logits(tmp_path / "out", tmp_path)
    assert divergence(before, after) < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_width_runs_in_the_gptq_format(method, bits, tmp_path):
    directory = tiny_model("llama", tmp_path / "model", seed=13, layers=1, hidden=128)
    result = quantize(
        directory, tmp_path / "out", method=method, bits=bits, symmetric=False, formats=("gptq",)
    )
    assert result.plan.bits_per_weight == pytest.approx(bits + (16 + bits) / 32)
    assert torch.isfinite(logits(tmp_path / "out", tmp_path)).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_from_a_file_are_as_good_as_a_calibration(family, tmp_path):
    """AWQ needs no more than diagonals; without a Hessian the scales are a little other."""
    directory = tiny_model(family, tmp_path / "model", seed=14)
    checkpoint = locate(str(directory))
    windows = random_windows(12, LENGTH, seed=1)
    path = tmp_path / "statistics.gguf"
    calibrate_to(path, checkpoint, windows, CalibrationSettings(DEVICE), Silent())
    by_block, _ = statistics_for(path, checkpoint)
    quantize(directory, tmp_path / "file", method="awq", statistics=by_block)
    quantize(directory, tmp_path / "rtn", method="rtn", symmetric=False, clip=True)
    before = logits(directory, tmp_path)
    by_file = divergence(before, logits(tmp_path / "file", tmp_path))
    by_rtn = divergence(before, logits(tmp_path / "rtn", tmp_path))
    assert by_file < 1.1 * by_rtn  # OLMo 2 has few places for a scale
    quantize(directory, tmp_path / "eight", method="awq", bits=8, statistics=by_block)
    assert divergence(before, logits(tmp_path / "eight", tmp_path)) < 5e-3


def test_one_window_and_one_layer_are_enough(tmp_path):
    directory = tiny_model("llama", tmp_path / "model", layers=1)
    windows = random_windows(1, 2)
    for method in CALIBRATED:
        quantize(directory, tmp_path / method, method=method, windows=windows)
        assert torch.isfinite(logits(tmp_path / method, tmp_path)).all()


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_calibrated_method_without_data_is_refused(method, tmp_path):
    directory = tiny_model("llama", tmp_path / "model", layers=1)
    plan = plan_of(directory, method=method)
    with pytest.raises(UsageError, match="needs calibration data"):
        run_plan(plan, [tmp_path / "out"], RunSettings(DEVICE), Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("method", CALIBRATED)
def test_the_memory_budget_does_not_change_a_byte(method, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "INTERMEDIATE_BYTES", {"cpu": 100_000, "cuda": 100_000})
    directory = tiny_model("llama", tmp_path / "model", seed=15)
    digests = [
        quantize(directory, tmp_path / f"{held}", method=method, held_bytes=held).digests
        for held in (0, None)
    ]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_error_propagation_pays(tmp_path):
    """Mean over seeds: aimed at the float model's outputs, later layers repair earlier ones."""
    ratios = []
    for seed in range(3):
        directory = tiny_model("llama", tmp_path / f"model-{seed}", seed=seed, layers=4)
        windows = random_windows(48, LENGTH, seed=seed)
        before = logits(directory, tmp_path, windows.ids)
        kld = {}
        for strength in (0.0, 0.5):
            out = tmp_path / f"out-{seed}-{strength}"
            quantize(
                directory,
                out,
                method="gptq",
                error_propagation=strength,
                windows=windows,
                bits=3,
                formats=("gptq",),
            )
            kld[strength] = divergence(before, logits(out, tmp_path, windows.ids))
        ratios.append(kld[0.5] / kld[0.0])
    assert sum(ratios) / len(ratios) < 1


def test_token_windows_are_not_modified(tmp_path):
    directory = tiny_model("llama", tmp_path / "model", layers=1)
    windows = random_windows(3, LENGTH)
    quantize(directory, tmp_path / "out", method="gptq", windows=windows)
    assert torch.equal(windows.ids, token_ids(3, LENGTH))
