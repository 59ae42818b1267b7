"""Names, order and metadata that a model has in GGUF, against figures from llama.cpp b11549."""

import contextlib
import itertools
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qtool.checkpoint.gguf_values import f32, many, text, u32
from qtool.errors import DamagedError, UnsupportedError
from qtool.model.conversion import converted_tensors, row_order, source_order
from qtool.model.family import FAMILIES, family_of
from qtool.model.gguf_metadata import conversion_warnings, model_metadata, size_label
from qtool.model.gguf_rope import read_rope

HIDDEN, HEADS, GROUPS, SIZE, INNER, VOCABULARY, CONTEXT = 64, 4, 2, 16, 96, 50, 512

SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SPECIAL = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": SIZE},
    "gemma2": {"head_dim": SIZE, "query_pre_attn_scalar": SIZE, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": SIZE, "query_pre_attn_scalar": SIZE, "sliding_window": 32},
}
COMMON = {
    "block_count": u32(2),
    "context_length": u32(CONTEXT),
    "embedding_length": u32(HIDDEN),
    "feed_forward_length": u32(INNER),
    "attention.head_count": u32(HEADS),
    "attention.head_count_kv": u32(GROUPS),
    "attention.layer_norm_rms_epsilon": f32(1e-5),
    "attention.key_length": u32(SIZE),
    "attention.value_length": u32(SIZE),
    "vocab_size": u32(VOCABULARY),
    "rope.freq_base": f32(10000.0),
    "rope.dimension_count": u32(SIZE),
}
ADDED = {
    "gemma2": {
        "attn_logit_softcapping": f32(50.0),
        "final_logit_softcapping": f32(30.0),
        "attention.sliding_window": u32(4096),
    },
    "gemma3_text": {"rope.freq_base_swa": f32(10000.0), "attention.sliding_window": u32(32)},
    "phi3": {
        "attention.sliding_window": u32(0),
        "rope.scaling.original_context_length": u32(4096),
    },
    "granite": {
        "attention.scale": f32(1.0),
        "embedding_scale": f32(1.0),
        "residual_scale": f32(1.0),
        "logit_scale": f32(1.0),
    },
}

LLAMA_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
HEAD_NORMS = {
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
POST_NORMS = {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
GEMMA2_BLOCK = {
    **LLAMA_BLOCK,
    **POST_NORMS,
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
}
OLMO2_BLOCK = {**LLAMA_BLOCK, **POST_NORMS, **HEAD_NORMS}
del OLMO2_BLOCK["input_layernorm.weight"]
BLOCKS = {
    "llama": LLAMA_BLOCK,
    "mistral": LLAMA_BLOCK,
    "qwen2": {
        **LLAMA_BLOCK,
        "self_attn.q_proj.bias": "attn_q.bias",
        "self_attn.k_proj.bias": "attn_k.bias",
        "self_attn.v_proj.bias": "attn_v.bias",
    },
    "qwen3": {**LLAMA_BLOCK, **HEAD_NORMS},
    "gemma2": GEMMA2_BLOCK,
    "gemma3_text": {**GEMMA2_BLOCK, **HEAD_NORMS},
    "phi3": {
        "input_layernorm.weight": "attn_norm.weight",
        "self_attn.qkv_proj.weight": "attn_qkv.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "mlp.gate_up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
    },
    "olmo2": OLMO2_BLOCK,
    "granite": LLAMA_BLOCK,
}
ROWS = {"q_proj": HEADS * SIZE, "k_proj": GROUPS * SIZE, "v_proj": GROUPS * SIZE}


@dataclass(frozen=True)
class Ref:
    shape: tuple[int, ...]


def config_of(model_type, **changes):
    return {"model_type": model_type, **SIZES, **SPECIAL.get(model_type, {}), **changes}


def refs_of(model_type, **changes):
    """Shapes of a checkpoint, only those right that conversion has to look at."""
    refs = {"model.embed_tokens.weight": Ref((VOCABULARY, HIDDEN)), "model.norm.weight": Ref((1,))}
    refs["lm_head.weight"] = Ref((VOCABULARY, HIDDEN))
    for block, path in itertools.product(range(2), BLOCKS[model_type]):
        rows = ROWS.get(path.split(".")[-2], HIDDEN)
        flat = path.endswith(("norm.weight", "bias"))
        refs[f"model.layers.{block}.{path}"] = Ref((rows,) if flat else (rows, HIDDEN))
    return {**refs, **changes}


def convert(model_type, changes=None, refs=None, vocabulary=None):
    config = config_of(model_type, **(changes or {}))
    refs = refs_of(model_type) if refs is None else refs
    return converted_tensors(config, family_of(config), refs, vocabulary=vocabulary)


def metadata(model_type, **changes):
    config = config_of(model_type, **changes)
    return model_metadata(config, family_of(config), name="Tiny")


def test_the_order_of_rows_is_the_one_computed_by_hand():
    assert row_order(8, 2) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(6, 1) == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(("rows", "heads"), [(2, 1), (6, 3), (30, 5), (96, 3), (128, 1)])
def test_both_orders_are_inverse_and_the_reshape_of_the_converter(rows, heads):
    source = np.arange(rows)
    stored = source[row_order(rows, heads)]
    assert (stored == source.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)).all()
    assert (stored[source_order(rows, heads)] == source).all()


@pytest.mark.parametrize("model_type", BLOCKS)
def test_every_tensor_has_the_name_that_llama_cpp_reads(model_type):
    found = {tensor.source: tensor.name for tensor in convert(model_type)}
    expected = {
        f"model.layers.{block}.{ours}": f"blk.{block}.{theirs}"
        for block, (ours, theirs) in itertools.product(range(2), BLOCKS[model_type].items())
    }
    expected["model.embed_tokens.weight"] = "token_embd.weight"
    expected["model.norm.weight"] = "output_norm.weight"
    if model_type != "gemma2":
        expected["lm_head.weight"] = "output.weight"
    assert found == expected


def test_tensors_come_from_the_embedding_to_the_head():
    names = [tensor.name for tensor in convert("llama")]
    assert names[:2] == ["token_embd.weight", "blk.0.attn_norm.weight"]
    assert names[-3:] == ["blk.1.ffn_down.weight", "output_norm.weight", "output.weight"]


@pytest.mark.parametrize("model_type", BLOCKS)
def test_only_llama_like_rotations_interleave_rows(model_type):
    found = {
        tensor.name.split(".", 2)[2]: tensor.permuted_heads
        for tensor in convert(model_type)
        if tensor.permuted_heads
    }
    like_llama = model_type in {"llama", "mistral", "granite"}
    assert found == ({"attn_q.weight": HEADS, "attn_k.weight": GROUPS} if like_llama else {})


def test_biases_are_interleaved_with_their_weights():
    paths = ("q_proj", "k_proj", "v_proj", "o_proj")
    biases = {
        f"model.layers.{block}.self_attn.{path}.bias": Ref((ROWS.get(path, HIDDEN),))
        for block, path in itertools.product(range(2), paths)
    }
    found = {t.name: t for t in convert("llama", refs=refs_of("llama", **biases))}
    assert found["blk.1.attn_q.bias"].permuted_heads == HEADS
    assert found["blk.1.attn_k.bias"].permuted_heads == GROUPS
    assert found["blk.1.attn_v.bias"].permuted_heads == 0
    assert all(t.always_float for name, t in found.items() if name.endswith("bias"))


@pytest.mark.parametrize("model_type", BLOCKS)
def test_norms_stay_float_and_only_gemma_adds_one(model_type):
    for tensor in convert(model_type):
        assert tensor.always_float is (len(tensor.shape) == 1)
        is_norm = tensor.name.endswith("norm.weight")
        assert tensor.offset == (1.0 if is_norm and "gemma" in model_type else 0.0)


def test_a_tied_head_is_left_out_even_if_the_checkpoint_repeats_it():
    names = [tensor.name for tensor in convert("qwen2", {"tie_word_embeddings": True})]
    assert names[-1] == "output_norm.weight"
    assert "output.weight" not in names


def test_a_tied_olmo_gets_the_copy_of_its_embedding_that_llama_cpp_requires():
    refs = refs_of("olmo2")
    del refs["lm_head.weight"]
    head = convert("olmo2", {"tie_word_embeddings": True}, refs)[-1]
    assert (head.name, head.source) == ("output.weight", "model.embed_tokens.weight")


def test_a_gemma_2_with_its_own_head_is_refused():
    with pytest.raises(UnsupportedError, match="takes the embedding of Gemma 2"):
        convert("gemma2", {"tie_word_embeddings": False})


def test_buffers_of_old_checkpoints_are_left_out():
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": Ref((8,))}
    assert convert("llama", refs=refs_of("llama", **buffers)) == convert("llama")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("llama", "model.layers.2.self_attn.q_proj.weight"),
        ("qwen3", "model.layers.1.self_attn.o_proj.bias"),
        ("gemma3_text", "vision_tower.embeddings.weight"),
        ("llama", "lm_head.bias"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(model_type, name):
    with pytest.raises(UnsupportedError, match=name):
        convert(model_type, refs=refs_of(model_type, **{name: Ref((HIDDEN,))}))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(name):
    refs = refs_of("llama")
    del refs[name]
    with pytest.raises(DamagedError, match=name):
        convert("llama", refs=refs)


def test_rows_that_are_not_whole_heads_are_refused():
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(DamagedError, match=f"{name}.*not 2 heads"):
        convert("llama", refs=refs_of("llama", **{name: Ref((33, HIDDEN))}))


def test_rows_beyond_the_vocabulary_are_left_out_of_embedding_and_head():
    found = {t.name: t for t in convert("gemma3_text", vocabulary=47)}
    for name in ("token_embd.weight", "output.weight"):
        assert (found[name].rows, found[name].shape) == (47, (47, HIDDEN))
    assert found["blk.0.attn_q.weight"].rows == HEADS * SIZE


def test_a_vocabulary_larger_than_the_embedding_is_refused():
    with pytest.raises(UnsupportedError, match="has 51 tokens"):
        convert("llama", vocabulary=51)
    with pytest.raises(
        DamagedError, match=r"50 rows where config\.json declares a vocabulary of 60"
    ):
        convert("llama", {"vocab_size": 60})


def test_blocks_that_llama_cpp_cannot_count_are_refused_before_they_take_memory():
    with pytest.raises(UnsupportedError, match="at most 512 blocks"):
        convert("llama", {"num_hidden_layers": 10**9})


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_llama_3_scaling_becomes_a_tensor_of_the_divisors_of_transformers(model_type):
    settings = {"head_dim": 128, "rope_parameters": LLAMA3}
    tensor = convert(model_type, settings, refs_of(model_type))[-1]
    assert (tensor.name, tensor.source, tensor.shape) == ("rope_freqs.weight", None, (64,))
    assert tensor.always_float
    config = LlamaConfig(head_dim=128, rope_parameters=dict(LLAMA3))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(tensor.values, plain / scaled.double().numpy(), rtol=2e-6)
    assert (tensor.values[0], tensor.values[-1]) == (1.0, 8.0)
    assert 1 < tensor.values[30] < 8
    assert not [key for key in metadata(model_type, **settings) if "scaling" in key]


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.5, 2.0, 4.0],
    "short_factor": [1.0, 1.25, 1.5],
    "partial_rotary_factor": 0.375,
}


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_phi_3_has_long_and_short_divisors(name):
    settings = {
        "rope_parameters": {**LONGROPE, "rope_type": name},
        "original_max_position_embeddings": 128,
    }
    found = {t.name: t.values for t in convert("phi3", settings) if t.source is None}
    assert found == {
        "rope_factors_long.weight": (1.5, 2.0, 4.0),
        "rope_factors_short.weight": (1.0, 1.25, 1.5),
    }
    keys = metadata("phi3", **settings)
    assert keys["phi3.rope.dimension_count"] == u32(6)
    assert keys["phi3.rope.scaling.original_context_length"] == u32(128)
    # sqrt(1 + ln(512 / 128) / ln(128)), as the converter computes it
    assert keys["phi3.rope.scaling.attn_factor"].content == pytest.approx(1.133893, rel=1e-6)


def test_yarn_tells_only_the_magnitude_that_llama_cpp_does_not_compute_itself():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    keys = metadata("qwen2", rope_parameters=yarn)
    assert keys["qwen2.rope.scaling.type"] == text("yarn")
    assert keys["qwen2.rope.scaling.factor"] == f32(4.0)
    assert keys["qwen2.rope.scaling.original_context_length"] == u32(128)
    assert "qwen2.rope.scaling.attn_factor" not in keys
    keys = metadata("qwen2", rope_parameters={**yarn, "attention_factor": 1.0})
    assert keys["qwen2.rope.scaling.attn_factor"].content == pytest.approx(1 / 1.1386294, rel=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_metadata_are_those_of_the_converter(model_type):
    found = metadata(model_type)
    architecture = FAMILIES[model_type].gguf_architecture
    expected = {
        "general.architecture": text(architecture),
        "general.type": text("model"),
        "general.name": text("Tiny"),
    }
    added = {**COMMON, **ADDED.get(model_type, {})}
    expected |= {f"{architecture}.{key}": value for key, value in added.items()}
    assert found == expected


def test_multipliers_of_granite_are_told():
    keys = metadata("granite", attention_multiplier=0.25, logits_scaling=8, embedding_multiplier=12)
    assert keys["granite.attention.scale"] == f32(0.25)
    assert keys["granite.logit_scale"] == f32(8.0)
    assert keys["granite.embedding_scale"] == f32(12.0)


def test_blocks_with_a_window_are_listed_only_where_llama_cpp_would_guess_others():
    key = "gemma3.attention.sliding_window_pattern"
    kinds = ["sliding_attention", "full_attention"]
    assert metadata("gemma3_text", layer_types=kinds)[key] == many("bool", [True, False])
    assert key not in metadata("gemma3_text", layer_types=["sliding_attention"] * 2)
    assert key not in metadata("gemma3_text", num_hidden_layers=6, sliding_window_pattern=6)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (
            {"rope_parameters": LLAMA3, "rope_theta": None},
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
    ],
)
def test_both_ways_to_write_positions_mean_the_same(new, old):
    assert metadata("llama", **new) == metadata("llama", **old, rope_theta=5e5)


def test_both_ways_to_write_the_positions_of_gemma_3_mean_the_same():
    local = {"rope_type": "default", "rope_theta": 20000.0}
    glob = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    new = {"rope_parameters": {"full_attention": glob, "sliding_attention": local}}
    old = {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_theta": 1e6,
        "rope_local_base_freq": 20000.0,
    }
    found = metadata("gemma3_text", **new)
    assert found == metadata("gemma3_text", **old)
    assert found["gemma3.rope.freq_base"] == f32(1e6)
    assert found["gemma3.rope.freq_base_swa"] == f32(20000.0)
    assert found["gemma3.rope.scaling.factor"] == f32(8.0)


REFUSED = [
    ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "no 'ntk' scaling"),
    ("qwen2", {"rope_parameters": LLAMA3}, "no 'llama3' scaling of positions for Qwen2"),
    ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}, "scaling"),
    ("gemma3_text", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "no 'yarn' scaling"),
    ("llama", {"partial_rotary_factor": 0.5}, "rotates whole heads of Llama, not 8 of 16"),
    ("olmo2", {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast 32"),
    ("olmo2", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "whole corr"),
    ("llama", {"hidden_act": "gelu"}, "'hidden_act' = silu, not gelu"),
    ("gemma2", {"hidden_activation": "gelu"}, "gelu_pytorch_tanh"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma2", {"attn_logit_softcapping": None}, "without 'attn_logit_softcapping'"),
    ("gemma2", {"sliding_window": None}, "only with a sliding window"),
    ("gemma2", {"query_pre_attn_scalar": 24}, r"1 / sqrt\(16\).*1 / sqrt\(24\)"),
    ("gemma3_text", {"query_pre_attn_scalar": None}, r"1 / sqrt\(256\)"),
    ("qwen2", {"head_dim": 32}, "4 x 32 is not 64"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(model_type, changes, message):
    with pytest.raises(UnsupportedError, match=message):
        metadata(model_type, **changes)


def test_queries_of_the_27b_models_are_scaled_by_another_size():
    wide = {"hidden_size": 96, "query_pre_attn_scalar": 24}
    for model_type, blocks in (("gemma2", 46), ("gemma3_text", 62)):
        metadata(model_type, num_hidden_layers=blocks, **wide)
        with pytest.raises(UnsupportedError, match="scales the queries"):
            metadata(model_type, num_hidden_layers=blocks - 1, **wide)


HAVE_DEFAULTS = {"num_key_value_heads", "rope_theta", "tie_word_embeddings"}


@pytest.mark.parametrize("key", sorted(set(SIZES) - HAVE_DEFAULTS))
def test_a_missing_size_is_named(key):
    config = config_of("llama")
    del config[key]
    with pytest.raises(DamagedError, match=rf"config\.json has no '{key}'"):
        model_metadata(config, family_of(config), name="Tiny")


HOSTILE = [True, "64", -1, 0, 2**40, float("inf"), float("nan"), 0.5, [64], {}, 10**400]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "head_dim", "vocab_size"])
def test_impossible_sizes_are_refused(key, value):
    with pytest.raises((DamagedError, UnsupportedError)):
        metadata("qwen2", **{key: value})


@pytest.mark.parametrize("value", HOSTILE[:3] + HOSTILE[5:], ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("key", ["rope_theta", "rope_parameters", "sliding_window", "layer_types"])
def test_impossible_settings_are_refused_or_mean_nothing(key, value):
    config = config_of("gemma3_text", **{key: value})
    with contextlib.suppress(DamagedError, UnsupportedError):  # and nothing else
        model_metadata(config, family_of(config), name="Tiny")
        converted_tensors(config, family_of(config), refs_of("gemma3_text"))
        conversion_warnings(config, family_of(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 0},
        {"factor": None},
        {"low_freq_factor": 4.0},
        {"high_freq_factor": "4"},
        {"original_max_position_embeddings": -8},
    ],
)
def test_impossible_scalings_are_refused(changes):
    with pytest.raises(DamagedError):
        metadata("llama", rope_parameters={**LLAMA3, **changes})


@pytest.mark.parametrize("factors", [None, [], [1.0, 2.0], [1.0, 0.0, 2.0], ["1", 2, 3], 3])
def test_divisors_of_the_wrong_number_or_kind_are_refused(factors):
    with pytest.raises(DamagedError):
        metadata("phi3", rope_parameters={**LONGROPE, "long_factor": factors})


SLIDING = {"use_sliding_window": True, "sliding_window": 32}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral", {"sliding_window": 32}, "no sliding window for Mistral: beyond 32 tokens"),
        ("qwen2", {**SLIDING, "max_window_layers": 1}, "no sliding window for Qwen2"),
        ("qwen3", {**SLIDING, "layer_types": ["sliding_attention"] * 2}, "beyond 32 tokens"),
        ("phi3", {"sliding_window": 511}, "beyond 511 tokens"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "beyond 512 tokens"),
        ("phi3", {"rope_parameters": LONGROPE}, "a context of at most 4096"),
    ],
)
def test_what_differs_in_long_texts_only_is_told(model_type, changes, message):
    config = config_of(model_type, **changes)
    (warning,) = conversion_warnings(config, family_of(config))
    assert message in warning


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((model_type, {}) for model_type in FAMILIES),
        ("mistral", {"sliding_window": CONTEXT}),
        ("qwen2", {"sliding_window": 32}),
        ("qwen2", {**SLIDING, "max_window_layers": 2}),
        ("gemma2", {"sliding_window": 32}),
    ],
)
def test_nothing_is_told_where_nothing_differs(model_type, changes):
    config = config_of(model_type, **changes)
    assert conversion_warnings(config, family_of(config)) == ()


def test_a_model_card_names_license_and_base_models():
    config = config_of("llama")
    card = {
        "license": "apache-2.0",
        "base_model": ["org/Base-1B", "not a repository"],
        "language": "en",
        "tags": ["chat", 3],
        "license_link": {"not": "text"},
    }
    found = model_metadata(
        config, family_of(config), name="Tiny", parameters=134_515_008, card=card
    )
    general = {key: value for key, value in found.items() if key.startswith("general.")}
    assert general == {
        "general.architecture": text("llama"),
        "general.type": text("model"),
        "general.name": text("Tiny"),
        "general.size_label": text("135M"),
        "general.license": text("apache-2.0"),
        "general.base_model.count": u32(1),
        "general.base_model.0.name": text("Base-1B"),
        "general.base_model.0.organization": text("org"),
        "general.base_model.0.repo_url": text("https://huggingface.co/org/Base-1B"),
        "general.tags": many("string", ["chat"]),
        "general.languages": many("string", ["en"]),
    }


@pytest.mark.parametrize(
    ("weights", "label"),
    [
        (124_000, "124K"),
        (999_999, "1000K"),
        (134_515_008, "135M"),
        (1_540_000_000, "1.5B"),
        (9_960_000_000, "10B"),
        (8_030_261_248, "8.0B"),
        (1_100_000_000_000, "1.1T"),
    ],
)
def test_sizes_are_labelled_as_file_names_have_them(weights, label):
    assert size_label(weights) == label


def test_positions_are_read_once_for_all_uses():
    config = config_of("gemma3_text")
    rope = read_rope(config, family_of(config))
    assert (rope.theta, rope.local_theta, rope.dimensions) == (10000.0, 10000.0, SIZE)
    del config["rope_theta"]
    assert read_rope(config, family_of(config)).theta == 1e6


def test_conversion_needs_neither_torch_nor_gguf_to_be_imported():
    code = (
        "import sys, qtool.model.conversion, qtool.model.gguf_metadata, qtool.model.gguf_config;"
        "sys.exit(bool({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
