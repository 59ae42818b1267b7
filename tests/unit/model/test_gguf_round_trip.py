"""A checkpoint that went to GGUF and came back is the same model, for every family."""

import json

import numpy as np
import pytest
import torch
from builders.gguf_files import checkpoint_weights, stored_values
from builders.tiny_models import VOCABULARY, tiny_model, token_ids
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qtool.checkpoint.gguf_values import f32, flag, many, text, u32
from qtool.checkpoint.locate import locate
from qtool.errors import DamagedError, UnsupportedError
from qtool.model.conversion import checkpoint_tensors, converted_tensors, source_order
from qtool.model.family import family_of
from qtool.model.gguf_config import checkpoint_config, family_of_metadata
from qtool.model.gguf_metadata import model_metadata
from qtool.model.gguf_rope import FACTOR_TENSORS, Rope, llama3_or_longrope, read_rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "short_factor": [1.0, 1.125, 1.25, 2.0],
    "partial_rotary_factor": 0.5,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
# Families with what their tiny models do not have by themselves.
VARIANTS = {
    "llama": {},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-yarn": {"rope_parameters": {**YARN, "attention_factor": 1.0}},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "mistral-no-window": {"sliding_window": None},
    "qwen2": {},
    "qwen2-yarn": {"rope_parameters": YARN, "use_sliding_window": False},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma2-27b": {"layers": 46, "query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "phi3": {},
    "phi3-longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "olmo2": {},
    "olmo2-tied": {"tied": True},
    "granite": {},
    "granite-linear": {"rope_parameters": LINEAR, "tied": False},
}


def to_gguf(directory):
    """Metadata and tensors [name -> float32 array] of a model's GGUF file."""
    checkpoint = locate(str(directory))
    config, family = checkpoint.config, family_of(checkpoint.config)
    weights = checkpoint_weights(directory)
    tensors = converted_tensors(config, family, checkpoint.refs)
    stored = {tensor.name: stored_values(tensor, weights) for tensor in tensors}
    return model_metadata(config, family, name="Tiny"), stored


def rebuilt_config(metadata, stored):
    shapes = {name: values.shape for name, values in stored.items()}
    factors = {name: stored[name].tolist() for name in FACTOR_TENSORS if name in stored}
    return checkpoint_config(metadata, shapes, factors)


def from_gguf(metadata, stored, directory):
    """Write the model that GGUF metadata and tensors describe; return its config."""
    config = rebuilt_config(metadata, stored)
    family = family_of_metadata(metadata)
    restored = {}
    for tensor in checkpoint_tensors(config, family, {n: v.shape for n, v in stored.items()}):
        values = stored[tensor.source] - np.float32(tensor.offset)
        if tensor.permuted_heads:
            values = values[source_order(len(values), tensor.permuted_heads)]
        assert values.shape == tensor.shape
        restored[tensor.name] = torch.from_numpy(np.ascontiguousarray(values))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(restored, directory / "model.safetensors", metadata={"format": "pt"})
    return config


def run(directory, ids):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(ids).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_that_comes_back_is_the_one_that_went(variant, tmp_path):
    settings = dict(VARIANTS[variant])
    layers = settings.pop("layers", 2)
    model_type = variant.split("-")[0]
    first = tiny_model(model_type, tmp_path / "first", layers=layers, **settings)
    metadata, stored = to_gguf(first)
    again = from_gguf(metadata, stored, tmp_path / "again")
    ids = token_ids(2, 48, seed=5)
    model, logits = run(first, ids)
    other, others = run(tmp_path / "again", ids)
    assert model.config.tie_word_embeddings is again["tie_word_embeddings"] or "tied" in variant
    torch.testing.assert_close(others, logits, rtol=0, atol=2e-5 * logits.abs().max().item())
    weights, restored = model.state_dict(), other.state_dict()
    assert weights.keys() == restored.keys()
    for name, values in weights.items():
        # Gemma's norms lose a bit when one is added.
        torch.testing.assert_close(restored[name], values, rtol=0, atol=3e-7)


# config.json may say the same in other words, and GGUF has no name for these.
RENAMED = {"architectures", "model_type", "rope_parameters", "layer_types", "max_window_layers"}
FORGOTTEN = {"dtype", "initializer_range", "use_cache", "transformers_version", "eos_token_id"}
FORGOTTEN |= {"bos_token_id", "pad_token_id", "pretraining_tp", "attention_dropout", "resid_pdrop"}
FORGOTTEN |= {"embd_pdrop", "head_dim", "attention_bias", "mlp_bias"}
FORGOTTEN |= {"_sliding_window_pattern", "use_bidirectional_attention", "attn_logit_softcapping"}


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v not in {"olmo2-tied", "mistral-no-window"}]
)
def test_every_setting_comes_back(variant, tmp_path):
    settings = dict(VARIANTS[variant])
    layers = settings.pop("layers", 2)
    first = tiny_model(variant.split("-")[0], tmp_path / "first", layers=layers, **settings)
    checkpoint = locate(str(first))
    metadata, stored = to_gguf(first)
    config = rebuilt_config(metadata, stored)
    assert config["architectures"] == checkpoint.config["architectures"]
    assert config["model_type"] == checkpoint.config["model_type"]
    expected = {k: v for k, v in checkpoint.config.items() if k not in RENAMED | FORGOTTEN}
    assert {key: config.get(key) for key in expected} == expected
    kinds = checkpoint.config.get("layer_types")
    assert config.get("layer_types", kinds) == kinds
    for bias in ("attention_bias", "mlp_bias"):
        assert config.get(bias, False) == checkpoint.config.get(bias, False)
    family = family_of(checkpoint.config)
    rope, again = read_rope(checkpoint.config, family), read_rope(config, family)
    assert again.kind == rope.kind
    for field in ("theta", "local_theta", "factor", "magnitude", "dimensions", "original"):
        ours, theirs = getattr(again, field), getattr(rope, field)
        assert ours == (theirs if theirs is None else pytest.approx(theirs, rel=1e-6)), field
    assert again.short == pytest.approx(rope.short, rel=1e-6)
    assert again.long == pytest.approx(rope.long, rel=1e-6)


@pytest.mark.parametrize(
    ("theta", "dimensions", "factor", "low", "high", "original"),
    [
        (500000.0, 128, 8.0, 1.0, 4.0, 8192),  # Llama 3.1
        (500000.0, 64, 32.0, 1.0, 4.0, 8192),  # Llama 3.2
        (1e6, 96, 4.0, 1.0, 2.5, 4096),
    ],
)
def test_the_thresholds_of_llama_3_are_found_in_its_divisors(
    theta, dimensions, factor, low, high, original
):
    config = {
        "model_type": "llama",
        "hidden_size": dimensions,
        "num_attention_heads": 1,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    }
    divisors = np.float32(read_rope(config, family_of(config)).short).tolist()
    found = llama3_or_longrope(Rope("default", theta, dimensions, 131072), divisors)
    assert (found.kind, found.factor, found.low, found.high) == ("llama3", factor, low, high)
    assert found.original == original


@pytest.mark.parametrize(
    "divisors", [[1.0, 2.0, 1.5, 8.0], [1.0, 1.0, 1.0, 2.0], [1.0, 1.3, 5.0, 6.0]]
)
def test_divisors_that_llama_3_would_not_have_become_a_longrope_without_long_contexts(divisors):
    found = llama3_or_longrope(Rope("default", 500.0, 8, 256), divisors)
    assert (found.kind, list(found.long), list(found.short)) == ("longrope", divisors, divisors)
    assert found.magnitude == 1.0


def test_divisors_of_one_change_nothing():
    plain = Rope("default", 500.0, 8, 256)
    assert llama3_or_longrope(plain, [1.0] * 4) == plain


@pytest.mark.parametrize("divisors", [[1.0], [1.0, 0.0, 1.0, 1.0], [1.0, float("nan"), 1.0, 2.0]])
def test_divisors_of_other_heads_are_refused(divisors):
    with pytest.raises(DamagedError, match=r"'rope_freqs\.weight' is not 4 positive numbers"):
        llama3_or_longrope(Rope("default", 500.0, 8, 256), divisors)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return to_gguf(tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model"))


def test_a_file_of_another_program_needs_only_the_keys_that_llama_cpp_needs(tiny):
    metadata, stored = tiny
    optional = ("key_length", "value_length", "vocab_size", "freq_base", "dimension_count")
    fewer = {key: value for key, value in metadata.items() if not key.endswith(optional)}
    config = rebuilt_config(fewer, stored)
    assert (config["vocab_size"], config["head_dim"]) == (VOCABULARY, 16)
    assert config["rope_parameters"]["rope_theta"] == 10000.0


def test_special_tokens_are_taken_from_the_tokenizer(tiny):
    metadata, stored = tiny
    tokens = {
        "tokenizer.ggml.bos_token_id": u32(256),
        "tokenizer.ggml.padding_token_id": u32(VOCABULARY),
    }
    config = rebuilt_config({**metadata, **tokens}, stored)
    found = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert found == [256, None, None]


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UnsupportedError, match="'mamba' is not supported"):
        family_of_metadata({"general.architecture": text("mamba")})
    for value in (None, u32(3), many("string", ["llama"])):
        with pytest.raises(DamagedError, match="no architecture"):
            family_of_metadata({} if value is None else {"general.architecture": value})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"expert_count": u32(8)}, UnsupportedError),
        ({"attention.causal": flag(False)}, UnsupportedError),
        ({"attention.value_length": u32(32)}, UnsupportedError),
        ({"rope.scaling.type": text("yarnish")}, UnsupportedError),
        ({"rope.scaling.type": many("string", ["yarn"])}, UnsupportedError),
        ({"rope.scaling.factor": f32(-2)}, DamagedError),
        ({"rope.freq_base": f32(0.5)}, DamagedError),
        ({"rope.scaling.attn_factor": f32(1.5)}, UnsupportedError),
        ({"rope.dimension_count": u32(8)}, DamagedError),
        ({"attention.head_count": many("u32", [4, 4])}, DamagedError),
        ({"attention.head_count": u32(0)}, DamagedError),
        ({"block_count": u32(2**31 - 1)}, DamagedError),
        ({"block_count": text("2")}, DamagedError),
        ({"embedding_length": None}, DamagedError),
        ({"attention.layer_norm_rms_epsilon": f32(float("nan"))}, DamagedError),
    ],
)
def test_metadata_of_another_model_are_refused(tiny, changes, error):
    metadata, stored = tiny
    changed = {**metadata, **{f"llama.{key}": value for key, value in changes.items()}}
    with pytest.raises(error):
        rebuilt_config({k: v for k, v in changed.items() if v is not None}, stored)


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [
        ("blk.0.attn_q_norm.weight", (16,), UnsupportedError),
        ("blk.2.attn_q.weight", (64, 64), UnsupportedError),
        ("blk.1.attn_k.weight", None, DamagedError),
        ("output_norm.weight", None, DamagedError),
        ("blk.1.attn_k.weight", (31, 64), DamagedError),
    ],
)
def test_tensors_of_another_model_are_refused(tiny, name, shape, error):
    metadata, stored = tiny
    shapes = {key: values.shape for key, values in stored.items()} | {name: shape}
    shapes = {key: value for key, value in shapes.items() if value is not None}
    config, family = rebuilt_config(metadata, stored), family_of_metadata(metadata)
    with pytest.raises(error, match=name):
        checkpoint_tensors(config, family, shapes)


def test_biases_of_only_some_linears_are_refused(tiny):
    metadata, stored = tiny
    with pytest.raises(UnsupportedError, match=r"only some of blk\.0\.attn_q"):
        rebuilt_config(metadata, {**stored, "blk.0.attn_q.bias": np.zeros(64, np.float32)})
