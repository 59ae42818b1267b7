"""Bytes of every format: against published files, qtool's own plans, and plain arithmetic."""

import json
from importlib.resources import files

import pytest
from builders.plans import plan_of
from builders.tiny_models import tiny_model
from builders.work import calls_of

from qtool.checkpoint.gguf_header import read_gguf
from qtool.checkpoint.locate import locate
from qtool.checkpoint.shards import StoredTensor, plan_shards
from qtool.errors import UsageError
from qtool.formats.gguf_file_types import FILE_TYPES
from qtool.formats.gguf_mixes import TensorShape, tensor_types
from qtool.memory.catalogue import find_shape, rows, shape_of_row
from qtool.memory.directory_sizes import safetensors_bytes
from qtool.memory.file_sizes import existing_gguf, format_named, weight_bytes
from qtool.memory.gguf_sizes import facts_of, stored_types
from qtool.memory.shape_of_config import shape_of_config
from qtool.memory.shape_of_files import shape_of_headers, with_tokenizer
from qtool.memory.shape_of_gguf import shape_of_gguf
from qtool.pipeline.card import original_card
from qtool.pipeline.plan import make_plan
from qtool.recipe.schema import Export, Model, Quantize, Recipe, resolved

PUBLISHED = json.loads(files("qtool.memory").joinpath("published.json").read_text(encoding="utf-8"))
EVERY = (
    *("fp32", "fp16", "bf16", "fp8", "fp8-block", "int8", "nf4", "nf4-dq", "gguf:MXFP4"),
    *("gptq:4:128", "gptq:3:64", "gptq:8:-1", "awq:4:64", "compressed-tensors:4:128"),
    *("compressed-tensors:8:-1", "compressed-tensors:4:128:asym"),
    *(f"gguf:{name}" for name in FILE_TYPES),
)


def estimate(entry):
    return weight_bytes(
        shape_of_row(entry["model"]),
        f"gguf:{entry['type']}",
        importance=entry.get("importance"),
        recipe=entry.get("recipe"),
    )


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda e: f"{e['model']}-{e['type']}")
def test_published_files_have_the_estimated_size(entry):
    found = estimate(entry)
    difference = abs(found.file_bytes - entry["bytes"])
    assert difference <= max(0.005 * entry["bytes"], 10_000_000)
    assert found.exact


# Conversions that kept routers in 16 bits, and a file whose publisher gave some tensors more.
ODD = {"Mixtral-8x7B", "Qwen3-Next-80B-A3B"}


@pytest.mark.parametrize(
    "entry",
    [e for e in PUBLISHED if e["model"] not in ODD],
    ids=lambda e: f"{e['model']}-{e['type']}",
)
def test_nothing_but_keys_of_their_headers_sets_published_files_apart(entry):
    assert abs(estimate(entry).file_bytes - entry["bytes"]) <= 300_000


def test_the_sample_covers_most_architectures():
    covered = {shape_of_row(entry["model"]).architecture for entry in PUBLISHED}
    assert len(covered) >= 20


@pytest.mark.parametrize(
    ("fmt", "gigabytes"),
    [("nf4", 6.03), ("nf4-dq", 5.70), ("awq", 5.73), ("fp8", 9.08), ("bf16", 16.06)],
)
def test_llama_3_8b_has_the_sizes_that_people_measured(fmt, gigabytes):
    found = weight_bytes(shape_of_row("Llama-3-8B"), fmt)
    assert found.weights_bytes / 1e9 == pytest.approx(gigabytes, abs=0.006)


@pytest.mark.parametrize(("fmt", "mebibytes"), [("Q4_K_M", 4403.49), ("Q4_0", 4156.00)])
def test_what_lies_on_the_gpu_is_what_llama_cpp_logs(fmt, mebibytes):
    found = weight_bytes(shape_of_row("Llama-3-8B"), fmt)
    assert found.weights_bytes / 2**20 == pytest.approx(mebibytes, abs=0.01)
    assert found.host_bytes / 2**20 == pytest.approx(281.81, abs=0.01)


@pytest.mark.parametrize("fmt", EVERY)
@pytest.mark.parametrize(
    "name", ["Llama-3.2-1B", "DeepSeek-V2-Lite", "gpt-oss-20b", "Qwen3-Next-80B-A3B"]
)
def test_the_terms_add_up(name, fmt):
    shape = shape_of_row(name)
    found = weight_bytes(shape, fmt)
    assert found.name == fmt
    assert sum(part.n_bytes for part in found.parts) == found.file_bytes
    assert 0 < found.weights_bytes <= found.file_bytes
    assert len(found.block_bytes) == shape.blocks
    assert sum(found.block_bytes) <= found.weights_bytes
    assert all(part.arithmetic for part in found.parts)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize(
    "name", ["Llama-3.3-70B", "Mixtral-8x7B", "Falcon-7B", "Qwen3-Next-80B-A3B", "GLM-4.5-Air"]
)
def test_types_are_those_of_the_table_of_mixes(name, importance):
    shape = shape_of_row(name)
    tensors = [TensorShape(t.name, t.shape) for t in shape.tensors]
    for file_type in FILE_TYPES:
        chosen = tensor_types(file_type, tensors, facts_of(shape), importance=importance)
        stored = stored_types(shape, file_type, importance=importance, recipe=2026)
        assert {x.tensor.name: x.type for x in stored} == {n: c.type for n, c in chosen.items()}


def test_fewer_bits_are_fewer_bytes():
    shape = shape_of_row("Llama-3.1-8B")
    names = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ1_S")
    sizes = [weight_bytes(shape, name).file_bytes for name in names]
    assert sizes == sorted(sizes, reverse=True)


def test_importance_moves_types_where_the_mix_says_so():
    shape = shape_of_row("Llama-3.1-8B")
    without, with_one = (
        weight_bytes(shape, "Q4_0", importance=known).file_bytes for known in (False, True)
    )
    assert with_one > without


def test_years_before_2026_have_their_own_rule_for_fused_attention():
    shape = shape_of_row("Phi-4")
    then, now = (weight_bytes(shape, "Q5_K_M", recipe=year) for year in (2024, 2026))
    assert then.file_bytes > now.file_bytes
    assert weight_bytes(shape, "Q5_K_M").file_bytes == then.file_bytes  # as it is published


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Q4_K_M", "gguf:Q4_K_M"),
        ("gguf:q4_k_m", "gguf:Q4_K_M"),
        ("q4_k", "gguf:Q4_K_M"),
        ("F16", "fp16"),
        ("gguf:F16", "gguf:F16"),
        ("gptq", "gptq:4:128"),
        ("awq:4:64", "awq:4:64"),
        ("int4", "gptq:4:128"),
        ("bitsandbytes", "nf4"),
        ("MXFP4", "gguf:MXFP4"),
    ],
)
def test_formats_have_several_names(text, name):
    assert format_named(text) == name


@pytest.mark.parametrize(
    "text", ["", "q9", "gguf:", "gptq:5", "gptq:4:0", "awq:8", "gptq:4:128:asym", "gguf:Q4_K_X"]
)
def test_an_unknown_format_is_refused(text):
    with pytest.raises(UsageError) as refused:
        format_named(text)
    assert refused.value.hint


def test_a_year_without_gguf_is_refused():
    with pytest.raises(UsageError, match="2019"):
        weight_bytes(shape_of_row("Llama-3-8B"), "Q8_0", recipe=2019)


# --- against the plans that the engine executes -------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    own = {"llama": {}, "gemma3_text": {"query_pre_attn_scalar": 32}, "phi3": {}, "qwen2": {}}
    return {
        name: tiny_model(name, place / name, hidden=128, intermediate=256, **settings)
        for name, settings in own.items()
    }


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "qwen2"])
@pytest.mark.parametrize(
    ("fmt", "name", "quantize"),
    [
        ("gptq:4:32", "gptq", {"bits": 4, "symmetric": True}),
        ("gptq:3:64", "gptq", {"bits": 3, "group_size": 64, "symmetric": True}),
        ("gptq:8:-1", "gptq", {"bits": 8, "group_size": -1, "symmetric": True}),
        ("awq:4:32", "awq", {"bits": 4}),
        ("compressed-tensors:4:32", "compressed-tensors", {"bits": 4, "symmetric": True}),
        ("compressed-tensors:4:64:asym", "compressed-tensors",
         {"bits": 4, "group_size": 64, "symmetric": False}),
    ],
)  # fmt: skip
def test_directories_have_the_bytes_that_qtool_writes(models, model_type, fmt, name, quantize):
    directory = models[model_type]
    plan = plan_of(directory, formats=(name,), method="rtn", **quantize)
    found = weight_bytes(shape_of_headers(locate(str(directory))), fmt)
    assert found.file_bytes == plan.outputs[0].n_bytes
    assert all(part.exact for part in found.parts)


@pytest.mark.parametrize("most", [2_000, 40_000, 10**9])
def test_headers_and_index_are_those_of_the_writer(most):
    tensors = [(f"model.layers.{i}.weight", "BF16", (i + 1, 33)) for i in range(40)]
    planned = plan_shards([StoredTensor(*tensor) for tensor in tensors], most)
    assert safetensors_bytes(tensors, most) == planned.n_bytes


def gguf_plan(directory, file_type, *, importance):
    recipe = Recipe(
        version=1,
        model=Model(id=str(directory)),
        quantize=Quantize(method="rtn"),
        export=(Export(format=f"gguf:{file_type}"),),
    )
    return make_plan(locate(str(directory)), resolved(recipe), importance=importance)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "qwen2"])
@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q4_0", "Q8_0", "Q2_K", "IQ4_XS"])
@pytest.mark.parametrize("importance", [False, True])
def test_gguf_files_have_the_bytes_that_qtool_writes(models, model_type, file_type, importance):
    directory = models[model_type]
    checkpoint = locate(str(directory))
    plan = gguf_plan(directory, file_type, importance=importance)
    shape = with_tokenizer(shape_of_headers(checkpoint), checkpoint, card=original_card(directory))
    found = weight_bytes(shape, file_type, importance=importance)
    assert found.file_bytes == plan.outputs[0].n_bytes
    assert found.exact
    assert all(part.exact for part in found.parts)


def test_a_gguf_file_that_is_there_has_its_own_bytes(tmp_path):
    import gguf
    import numpy as np

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((40, 32), np.float32))
    writer.add_tensor("output.weight", np.zeros((40, 32), np.float16))
    writer.add_tensor("blk.0.attn_k.weight", np.zeros((33, 31), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    contents = read_gguf(path)
    shape, stored = shape_of_gguf((contents,))
    found = existing_gguf(shape, stored, contents.file_bytes)
    assert found.file_bytes == path.stat().st_size == sum(part.n_bytes for part in found.parts)
    assert found.host_bytes == 40 * 32 * 4
    assert found.weights_bytes == 40 * 32 * 2 + 33 * 31 * 2
    # The same weights in other types, with the keys of this file.
    assert weight_bytes(shape, "gguf:F32").parts[-1].exact


# --- how much work it is -------------------------------------------------------------------------


def test_the_whole_table_of_a_model_is_little_work():
    shape = find_shape("70b").shape
    calls = calls_of(lambda: [weight_bytes(shape, name) for name in EVERY])
    assert calls < 50 * len(EVERY) * len(shape.tensors)  # 40 for each format and tensor


def test_the_largest_model_of_the_catalogue_is_little_work():
    row = max(rows(), key=lambda row: shape_of_row(row.name).parameters)

    def four_formats():
        shape = shape_of_config(row.config, name=row.name)
        return [weight_bytes(shape, name) for name in ("gguf:Q4_K_M", "gguf:Q2_K", "gptq", "bf16")]

    assert calls_of(four_formats) < 300_000  # 186 thousand
