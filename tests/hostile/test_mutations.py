"""Mutated headers, configurations, recipes and statistics: a clean refusal, or a sound result.

Never another exception, never a file that was not there, and what is accepted is consistent.
"""

import json
import shutil
import struct

import pytest
import torch
from builders.hostile_texts import entry, legacy
from builders.refusals import snapshot
from builders.tiny_models import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.calibration.statistics_source import open_statistics
from qtool.checkpoint.header import DTYPE_BYTES
from qtool.checkpoint.locate import locate
from qtool.cli.recipe_flags import build_recipe
from qtool.errors import QtoolError
from qtool.memory.shape_of_files import shape_of_headers
from qtool.pipeline.admission import admit, check_conversion, check_recipe
from qtool.pipeline.inspection import inspect_model
from qtool.recipe.load import load_recipe

FAMILIES = ("llama", "gemma2", "phi3", "qwen3")
QUICK = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    place = tmp_path_factory.mktemp("sound")
    for family in FAMILIES:
        tiny_model(family, place / family, dtype=torch.bfloat16)
    return place


@pytest.fixture(scope="module")
def spoiled(sound, tmp_path_factory):
    """Family -> a copy of it, whose files are put back after each example."""
    place = tmp_path_factory.mktemp("spoiled")
    for family in FAMILIES:
        shutil.copytree(sound / family, place / family)
    return place


def outcome(call, *arguments, **others):
    """What a call returned; a refusal is None, and anything else escapes."""
    try:
        return call(*arguments, **others)
    except QtoolError as error:
        refusal = error
    assert refusal.message
    assert refusal.exit_code in {2, 5, 6}
    return None


def examined(directory):
    """Do with a directory what every command does before it reads a weight."""
    before = snapshot(directory)
    checkpoint = outcome(locate, str(directory))
    if checkpoint is not None:
        outcome(inspect_model, checkpoint, list_tensors=True)
        outcome(shape_of_headers, checkpoint)
        if outcome(admit, checkpoint, tokenizer=False) is not None:
            assert_consistent(checkpoint)
            outcome(check_conversion, checkpoint, pre=None)
            recipe = build_recipe(str(directory), None, {"method": "rtn", "group_size": 32}, [])
            outcome(check_recipe, checkpoint, recipe)
    assert snapshot(directory) == before
    return checkpoint


def assert_consistent(checkpoint):
    """An admitted model has the matrices of its configuration, inside its files."""
    config = checkpoint.config
    embedding = checkpoint.refs["model.embed_tokens.weight"]
    assert embedding.shape == (config["vocab_size"], config["hidden_size"])
    downs = [name for name in checkpoint.refs if name.endswith("mlp.down_proj.weight")]
    assert len(downs) == config["num_hidden_layers"]
    for ref in checkpoint.refs.values():
        assert ref.n_bytes == ref.n_elements * DTYPE_BYTES[ref.dtype]
        assert 0 < ref.start <= ref.stop <= ref.file.stat().st_size


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 400),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["silu", "llama", "full_attention", "yarn", "float16", "gptq"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@QUICK
@given(st.data())
def test_changed_configurations(sound, spoiled, data):
    family = data.draw(st.sampled_from(FAMILIES))
    config = json.loads((sound / family / "config.json").read_text())
    inner = ["rope_type", "rope_theta", "factor", "short_factor", "long_factor"]
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2)):
        config[key] = data.draw(values)
    if isinstance(config.get("rope_parameters"), dict) and data.draw(st.booleans()):
        config["rope_parameters"][data.draw(st.sampled_from(inner))] = data.draw(values)
    extra = ["rope_scaling", "quantization_config", "sliding_window", "auto_map", "text_config"]
    if data.draw(st.booleans()):
        config[data.draw(st.sampled_from(extra))] = data.draw(values)
    place = spoiled / family / "config.json"
    place.write_text(json.dumps(config))
    try:
        examined(place.parent)
    finally:
        shutil.copy(sound / family / "config.json", place)


@QUICK
@given(st.data())
def test_changed_tensor_tables(sound, spoiled, data):
    raw = (sound / "llama" / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    table, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in table if name != "__metadata__"]
    for name in data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        part = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "gone"]))
        if part == "name":
            table[data.draw(st.one_of(st.sampled_from(names), st.text(max_size=9)))] = table[name]
        elif part == "gone":
            table.pop(name, None)
        elif name in table:
            table[name][part] = data.draw(
                st.one_of(
                    values,
                    st.sampled_from(sorted(DTYPE_BYTES)),
                    st.lists(st.integers(0, 2**64), max_size=4),
                )
            )
    text = json.dumps(table).encode()
    place = spoiled / "llama" / "model.safetensors"
    claimed = data.draw(st.one_of(st.just(len(text)), st.integers(0, 2**64 - 1)))
    place.write_bytes(
        struct.pack("<Q", claimed) + text + body[: data.draw(st.sampled_from([None, 0, 999]))]
    )
    try:
        examined(place.parent)
    finally:
        shutil.copy(sound / "llama" / "model.safetensors", place)


@QUICK
@given(st.data())
def test_changed_bytes_of_any_small_file(sound, spoiled, data):
    name = data.draw(
        st.sampled_from(
            ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
        )
    )
    raw = bytearray((sound / "llama" / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw)))
        raw[position : position + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    place = spoiled / "llama" / name
    place.write_bytes(raw)
    try:
        examined(place.parent)
    finally:
        shutil.copy(sound / "llama" / name, place)


PLAIN = """version: 1
model: {id: ./model}
calibration: {datasets: [{name: builtin, windows: 8}], sequence_length: 64}
quantize: {method: gptq, bits: 4, group_size: 32}
rules:
  - {match: "re:.*down_proj$", bits: 8, why: "test"}
export: [{format: gptq}, {format: "gguf:Q4_K_M", modelfile: true}]
eval: {metrics: [ppl], data: builtin, context: 64}
seed: 7
"""
TOKENS = ["*a", "&a ", "!!python/name:os.system ", "? ", "- ", "[", "]", "{", "}", ": ", "\n"]
TOKENS += ["'", '"', "|\n", ">\n", "<<: *a", "---\n", "%YAML 1.1\n", "!!binary ", ".nan", "1e999"]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_changed_recipes(tmp_path_factory, data):
    raw = bytearray(PLAIN.encode())
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(0, len(raw)))
        piece = data.draw(st.one_of(st.binary(max_size=6), st.sampled_from(TOKENS).map(str.encode)))
        raw[position : position + data.draw(st.integers(0, 12))] = piece
    place = tmp_path_factory.getbasetemp() / "changed.yaml"
    place.write_bytes(raw)
    recipe = outcome(load_recipe, place)
    if recipe is not None:
        assert recipe.version == 1
        assert outcome(build_recipe, None, place, {}, []) is None or recipe.model.id


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_statistics_of_the_old_form(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "changed.dat"
    legacy([entry(), entry("blk.1.attn_q.weight")])(place)
    raw = bytearray(place.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw)))
        extreme = data.draw(st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 1 << 20]))
        raw[position : position + 4] = struct.pack("<i", extreme)
    place.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    found = outcome(open_statistics, place)
    if found is not None:
        assert all(len(one.sums) > 0 for one in found.entries.values())
