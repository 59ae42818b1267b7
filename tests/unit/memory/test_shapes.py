"""Shapes from config.json: the converter's and transformers' tensors, and what blocks keep."""

import json

import gguf
import pytest
import torch
from builders.tiny_models import SPECIAL, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.checkpoint.gguf_header import read_gguf
from qtool.checkpoint.locate import locate
from qtool.errors import DamagedError
from qtool.memory.catalogue import rows, shape_of_row
from qtool.memory.shape import BlockCache
from qtool.memory.shape_architectures import ARCHITECTURES
from qtool.memory.shape_of_config import SPECIAL as OWN_RULES
from qtool.memory.shape_of_config import shape_of_config
from qtool.memory.shape_of_files import shape_of_headers
from qtool.memory.shape_of_gguf import shape_of_gguf
from qtool.model.conversion import converted_tensors
from qtool.model.family import family_of

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
LATENT = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SHARED = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
PAIRS = ["sliding_attention", "full_attention"] * 2

# model type -> (settings, parameters that transformers keeps as buffers or leaves out)
OTHERS = {
    "mixtral": ({"num_local_experts": 4}, 0),
    "qwen2_moe": (SHARED, 0),
    "qwen3_moe": ({"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 32}, 0),
    "gemma": ({"head_dim": 32}, 0),
    "phimoe": ({"num_local_experts": 4}, 0),
    "olmoe": ({"num_experts": 4}, 0),
    "granitemoe": ({"num_local_experts": 4}, 0),
    "glm4": ({"head_dim": 32, "attention_bias": True}, 0),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 32}, 0),
    "cohere": ({"use_qk_norm": True}, 0),
    "cohere2": ({}, 0),
    "starcoder2": ({"use_bias": True}, 0),
    "stablelm": ({"use_qkv_bias": True}, 0),
    "smollm3": ({}, 0),
    "exaone4": ({"head_dim": 32}, 0),
    "seed_oss": ({"head_dim": 32, "attention_bias": True, "attention_out_bias": False}, 0),
    "ernie4_5": ({}, 0),
    "hunyuan_v1_dense": ({"head_dim": 32}, 0),
    "deepseek_v2": ({**LATENT, "q_lora_rank": None, "n_shared_experts": 2}, 0),
    "deepseek_v3": ({**LATENT, "q_lora_rank": 24, "n_shared_experts": 1}, 3 * 4),
    "minimax_m2": ({"num_local_experts": 4, "head_dim": 32}, 4 * 4),
    "llama4_text": (
        {
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "head_dim": 32,
            "num_experts_per_tok": 1,
        },
        0,
    ),
    "qwen3_next": ({**LINEAR, **SHARED}, 0),
    "qwen3_5_text": (LINEAR, 0),
    "qwen3_5_moe_text": ({**LINEAR, **SHARED}, 0),
    "nemotron_h": (
        {
            "layers_block_type": ["mamba", "mlp", "attention", "moe"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 40,
        },
        4,
    ),
    "granitemoehybrid": (
        {
            "layer_types": ["mamba", "attention", "mamba", "mamba"],
            "num_local_experts": 4,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "shared_intermediate_size": 48,
        },
        0,
    ),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, 0),
    # Its checkpoints, and so its GGUF files, have keys and values of two blocks that use none.
    "gemma3n_text": (
        {
            "head_dim": 32,
            "layer_types": PAIRS,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        2 * (2 * 64 * 64 + 32),
    ),
    "gemma4_text": (
        {
            "head_dim": 32,
            "global_head_dim": 48,
            "layer_types": PAIRS,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 16,
            "use_double_wide_mlp": True,
        },
        4,
    ),
}


def config_of(model_type):
    own, _ = OTHERS[model_type]
    return AutoConfig.for_model(model_type, **{**SIZES, **own})


@pytest.mark.parametrize(
    ("model_type", "tied"),
    # llama.cpp has no untied Gemma 2.
    [(name, tied) for name in sorted(SPECIAL) for tied in {name == "gemma2", True}],
)
def test_families_have_exactly_the_tensors_that_the_converter_writes(tmp_path, model_type, tied):
    checkpoint = locate(str(tiny_model(model_type, tmp_path / "m", tied=tied)))
    converted = converted_tensors(checkpoint.config, family_of(checkpoint.config), checkpoint.refs)
    shape = shape_of_headers(checkpoint)
    assert {t.name: t.shape for t in shape.tensors} == {t.name: t.shape for t in converted}
    stored = {t.stored[0] for t in shape.tensors if t.stored}
    assert stored == set(checkpoint.refs)
    assert shape.exact
    assert shape.parameters == sum(ref.n_elements for ref in checkpoint.refs.values())


@pytest.mark.parametrize("model_type", sorted(SPECIAL))
def test_biases_are_those_that_transformers_makes_of_the_configuration(tmp_path, model_type):
    settings = {"attention_bias": True, "mlp_bias": True}
    checkpoint = locate(str(tiny_model(model_type, tmp_path / "m", **settings)))
    found = {t.stored[0] for t in shape_of_headers(checkpoint).tensors if t.stored}
    assert found == set(checkpoint.refs)


@pytest.mark.parametrize("scaling", ["llama3", "longrope"])
def test_divisors_of_positions_are_tensors_but_no_parameters(scaling):
    plain = {**SIZES, "model_type": "llama"}
    scaled = {**plain, "rope_scaling": {"rope_type": scaling}}
    before, after = (shape_of_config(c, name="x") for c in (plain, scaled))
    added = {t.name: t.shape for t in after.tensors if t not in before.tensors}
    names = {
        "llama3": ["rope_freqs"],
        "longrope": ["rope_factors_long", "rope_factors_short"],
    }[scaling]
    assert added == {f"{name}.weight": (8,) for name in names}
    assert after.parameters == before.parameters


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_other_architectures_have_the_parameters_of_transformers(model_type):
    config = config_of(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    shape = shape_of_config(config.to_dict(), name="x")
    assert shape.parameters - OTHERS[model_type][1] == expected
    assert len(shape.cache) == 4
    assert shape.exact


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_names_are_those_that_llama_cpp_reads(row):
    shape = shape_of_row(row.name)
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    patterns = {
        pattern.replace("{bid}.", "")
        for tensor in gguf.MODEL_TENSORS[known[shape.architecture]]
        for pattern in [gguf.TENSOR_NAMES[tensor]]
    }
    # Written by hand in the converter, not by the table of names.
    patterns |= {"rope_freqs", "rope_factors_long", "rope_factors_short"}
    for tensor in shape.tensors:
        stem = tensor.name
        for leaf in (".weight", ".bias", ".scale"):
            stem = stem.removesuffix(leaf)
        if stem.startswith("blk."):
            stem = f"blk.{stem.split('.', 2)[2]}"
        assert stem in patterns, tensor.name


def test_every_catalogued_model_has_the_parameters_that_its_publisher_states():
    wrong = {
        row.name: (shape_of_row(row.name).parameters, row.parameters)
        for row in rows()
        if row.parameters not in (None, shape_of_row(row.name).parameters)
    }
    assert not wrong


def test_active_parameters_count_the_experts_of_one_token():
    shape = shape_of_row("Qwen3-30B-A3B")
    assert shape.parameters == 30_532_122_624
    # 3.3 billion is what its publisher states.
    assert shape.active_parameters == pytest.approx(3.3e9, rel=0.02)


def cache_of(model_type, **own):
    config = {**SIZES, "model_type": model_type, **own}
    return shape_of_config(config, name="x").cache


def test_heads_of_keys_have_the_size_that_config_states():
    assert cache_of("qwen3", head_dim=24) == (BlockCache(keys=48, values=48),) * 4
    assert cache_of("llama") == (BlockCache(keys=32, values=32),) * 4


@pytest.mark.parametrize(
    ("model_type", "period", "width"),
    [("gemma2", 2, 4096), ("gemma3_text", 6, 512), ("gpt_oss", 2, 128), ("cohere2", 4, 99)],
)
def test_windows_follow_the_pattern_of_the_architecture(model_type, period, width):
    blocks = 12
    own = {"sliding_window": width, "num_hidden_layers": blocks, "num_local_experts": 4}
    kept = [block.window for block in cache_of(model_type, **own)]
    assert kept == [None if (i + 1) % period == 0 else width for i in range(blocks)]


def test_windows_follow_a_list_of_blocks():
    own = {"layer_types": PAIRS, "sliding_window": 77}
    assert [block.window for block in cache_of("gemma3_text", **own)] == [77, None, 77, None]


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "phi3"])
def test_windows_that_llama_cpp_does_not_use_are_left_out(model_type):
    kept = cache_of(model_type, sliding_window=16, use_sliding_window=True)
    assert {block.window for block in kept} == {None}


def test_latent_attention_keeps_one_latent_and_no_values():
    assert set(cache_of("deepseek_v3", **LATENT, q_lora_rank=24)) == {BlockCache(keys=40)}
    assert shape_of_row("DeepSeek-V3").cache == (BlockCache(keys=576),) * 61


@pytest.mark.parametrize(
    ("hidden", "value_heads", "blocks", "mebibytes"),
    [(4096, 32, 32, 50.25), (5120, 48, 64, 149.6)],  # as llama.cpp logs for Qwen3.5 9B and 27B
)
def test_states_of_linear_attention_are_what_llama_cpp_logs(hidden, value_heads, blocks, mebibytes):
    own = {
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "head_dim": 256,
        "linear_num_value_heads": value_heads,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    }
    kept = cache_of("qwen3_5_text", **own)
    assert sum(block.state for block in kept) * 4 / 2**20 == pytest.approx(mebibytes, abs=0.04)
    assert sum(block.keys > 0 for block in kept) == blocks // 4


def test_blocks_that_reuse_a_cache_say_so():
    kept = shape_of_config(config_of("gemma4_text").to_dict(), name="x").cache
    assert [block.shared for block in kept] == [False, False, True, True]
    assert [block.keys for block in kept[:2]] == [2 * 32, 2 * 48]


def test_an_unknown_architecture_is_never_called_exact():
    known = shape_of_config({**SIZES, "model_type": "llama"}, name="x")
    other = shape_of_config({**SIZES, "model_type": "future"}, name="x")
    assert not other.exact
    assert other.architecture == "future"
    assert other.parameters == known.parameters


def test_a_setting_that_nobody_described_takes_the_label_away():
    plain = {**SIZES, "model_type": "stablelm"}
    assert shape_of_config(plain, name="x").exact
    assert not shape_of_config({**plain, "qk_layernorm": True}, name="x").exact


def test_the_language_model_inside_a_larger_one_counts():
    text = {"model_type": "gemma3_text", **SIZES}
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 9}}
    inside, alone = (shape_of_config(c, name="x") for c in (outer, text))
    assert inside.tensors == alone.tensors


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [None, 0, -1, 1 << 40, "many", [], 1.5, True])
def test_a_number_that_no_model_has_is_refused_by_its_key(key, value):
    config = {**SIZES, "model_type": "llama", key: value}
    with pytest.raises(DamagedError, match=key):
        shape_of_config(config, name="x")


def test_a_config_without_a_model_type_is_refused():
    with pytest.raises(DamagedError, match="model_type"):
        shape_of_config(dict(SIZES), name="x")


WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 40), 1 << 40),
    st.integers(0, 300),
    st.floats(allow_nan=True),
    st.text(max_size=4),
    st.lists(st.integers(-3, 3), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
KEYS = sorted(
    {
        *SIZES,
        *LATENT,
        *LINEAR,
        *SHARED,
        *(key for own, _ in OTHERS.values() for key in own),
        *("head_dim", "sliding_window", "rope_scaling", "tie_word_embeddings", "text_config"),
        *("sliding_window_pattern", "hybrid_override_pattern", "per_layer_config"),
        *("num_nextn_predict_layers", "attention_bias", "partial_rotary_factor"),
    }
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted({*ARCHITECTURES, *OWN_RULES, "unknown"})),
    st.dictionaries(st.sampled_from(KEYS), WILD, max_size=4),
)
def test_a_hostile_config_gives_a_shape_or_a_refusal(model_type, wild):
    base = OTHERS.get(model_type, ({}, 0))[0]
    config = {**SIZES, **base, "model_type": model_type, **wild}
    try:
        shape = shape_of_config(config, name="x")
    except DamagedError:
        return
    assert shape.parameters > 0
    assert all(side > 0 for tensor in shape.tensors for side in tensor.shape)


def test_headers_that_contradict_the_config_are_refused(tmp_path):
    directory = tiny_model("llama", tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    config["intermediate_size"] = 96
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedError, match="mlp"):
        shape_of_headers(locate(str(directory)))


@pytest.fixture
def gemma_file(tmp_path):
    """A GGUF file with a window in its second block, written with the gguf package."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_sliding_window(64)
    writer.add_array("gemma2.attention.sliding_window_pattern", [False, True])
    zeros = torch.zeros
    writer.add_tensor("token_embd.weight", zeros(320, 64).numpy())
    for block in range(2):
        writer.add_tensor(f"blk.{block}.attn_k.weight", zeros(32, 64).numpy())
        writer.add_tensor(f"blk.{block}.attn_v.weight", zeros(32, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_tells_its_shape(gemma_file):
    shape, stored = shape_of_gguf((read_gguf(gemma_file),))
    assert (shape.name, shape.architecture, shape.blocks, shape.tied) == ("Tiny", "gemma2", 2, True)
    assert shape.vocabulary == 320
    assert shape.cache == (BlockCache(32, 32), BlockCache(32, 32, window=64))
    assert {x.type for x in stored} == {"F32"}
    assert sum(x.n_bytes for x in stored) == 4 * shape.parameters
