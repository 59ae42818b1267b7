"""llama.cpp computes from converted models the logits that transformers computes."""

import json

import numpy as np
import pytest
import torch
from builders.gguf_files import write_gguf
from builders.tiny_models import SLIDING_WINDOW, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from qtool.checkpoint.locate import locate
from qtool.model.family import family_of
from qtool.model.gguf_metadata import conversion_warnings

llama_cpp = pytest.importorskip("oracles.llama_cpp", reason="xllamacpp is not installed")

LENGTH = 80  # five sliding windows, and more than the original contexts below
CONTEXT = 256
F32_CACHE = 0
NO_FLASH_ATTENTION = 0
# Relative errors in the Frobenius norm. With a cache of float32 the two programs differ by the
# order of sums; with llama.cpp's usual one in float16, or float16 weights, by that rounding.
EXACT, ROUNDED = 1e-5, 1e-2
TABLE = 1e-3  # ggml looks the GELU up in a table of float16

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "short_factor": [1.0, 1.125, 1.25, 2.0],
    "partial_rotary_factor": 0.5,
}
NO_WINDOW = {"sliding_window": None}
GEMMA3_ROPE = {
    "full_attention": LINEAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
# Windows where llama.cpp has none are switched off, and queries are scaled as it scales them.
FAMILIES = {
    "llama": {},
    "mistral": NO_WINDOW,
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "phi3": NO_WINDOW,
    "olmo2": {},
    "granite": {},
}
SETTINGS = {
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-yarn-magnitude": {"rope_parameters": {**YARN, "attention_factor": 1.5}},
    "llama-yarn-mscale": {"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}},
    "llama-longrope": {
        "rope_parameters": {
            **LONGROPE,
            "partial_rotary_factor": 1.0,
            "long_factor": [1 + index / 4 for index in range(8)],
            "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tied": True},
    "qwen2-yarn": {"use_sliding_window": False, "rope_parameters": YARN},
    "qwen3-linear": {"use_sliding_window": False, "rope_parameters": LINEAR},
    "gemma2-full": {"query_pre_attn_scalar": 32, "sliding_window": 100},
    "gemma3_text-linear": {"query_pre_attn_scalar": 32, "rope_parameters": GEMMA3_ROPE},
    "phi3-long": {**NO_WINDOW, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "phi3-short": {
        **NO_WINDOW,
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": CONTEXT,
        "max_position_embeddings": 4 * CONTEXT,
    },
    "olmo2-yarn": {"rope_parameters": YARN},
    "olmo2-tied": {"tied": True},
    "granite-llama3": {"rope_parameters": LLAMA3, "tied": False},
}


class ExactModel(llama_cpp.Model):
    """llama.cpp with keys and values in float32, which its programs call `--cache-type-k f32`."""

    def __init__(self, path):
        self._context = None
        self._load(path, vocab_only=False)
        parameters = llama_cpp.LIBRARY.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = self.n_ctx = CONTEXT
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.type_k = parameters.type_v = F32_CACHE
        parameters.flash_attn_type = NO_FLASH_ATTENTION
        self._context = llama_cpp.LIBRARY.llama_init_from_model(self._model, parameters)


def model_of(variant, directory):
    return tiny_model(variant.split("-")[0], directory, **{**FAMILIES, **SETTINGS}[variant])


def logits_of_transformers(directory, ids):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0].numpy()


def logits_of_llama_cpp(path, ids, exact=False):
    with ExactModel(path) if exact else llama_cpp.Model(path, CONTEXT) as model:
        return model.logits(ids.tolist())


def relative_error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture
def ids():
    return token_ids(1, LENGTH, seed=3)[0]


@pytest.mark.parametrize("variant", [*FAMILIES, *SETTINGS])
def test_a_float32_file_computes_the_logits_of_transformers(variant, ids, tmp_path):
    directory = model_of(variant, tmp_path / "model")
    path = write_gguf(directory, tmp_path / "model.gguf")
    found = logits_of_llama_cpp(path, ids, exact=True)
    error = relative_error(found, logits_of_transformers(directory, ids))
    assert error < (TABLE if "gemma" in variant else EXACT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_files_run_as_users_run_them(family, dtype, ids, tmp_path):
    directory = model_of(family, tmp_path / "model")
    path = write_gguf(directory, tmp_path / "model.gguf", dtype=dtype)
    found = logits_of_llama_cpp(path, ids)
    assert relative_error(found, logits_of_transformers(directory, ids)) < ROUNDED


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3"])
def test_texts_differ_only_beyond_the_window_that_a_warning_names(family, ids, tmp_path):
    directory = tiny_model(family, tmp_path / "model")
    config = locate(str(directory)).config
    (warning,) = conversion_warnings(config, family_of(config))
    assert f"beyond {SLIDING_WINDOW} tokens" in warning
    found = logits_of_llama_cpp(write_gguf(directory, tmp_path / "model.gguf"), ids, exact=True)
    expected = logits_of_transformers(directory, ids)
    assert relative_error(found[:SLIDING_WINDOW], expected[:SLIDING_WINDOW]) < EXACT
    assert relative_error(found[SLIDING_WINDOW:], expected[SLIDING_WINDOW:]) > 100 * EXACT


def test_llama_cpp_runs_a_vocabulary_cut_to_its_tokens(ids, tmp_path):
    directory = model_of("gemma3_text", tmp_path / "model")
    path = write_gguf(directory, tmp_path / "model.gguf", vocabulary=258)
    found = logits_of_llama_cpp(path, ids, exact=True)
    assert found.shape == (LENGTH, 258)
    assert relative_error(found, logits_of_transformers(directory, ids)[:, :258]) < TABLE


def test_llama_cpp_scales_the_queries_of_46_blocks_by_another_size(ids, tmp_path):
    settings = {"query_pre_attn_scalar": 16, "intermediate": 32, "outliers": False}
    directory = tiny_model("gemma2", tmp_path / "model", layers=46, **settings)
    found = logits_of_llama_cpp(write_gguf(directory, tmp_path / "model.gguf"), ids, exact=True)
    # The table's errors grow from block to block; those of another scale are 30 times larger.
    assert relative_error(found, logits_of_transformers(directory, ids)) < ROUNDED
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "query_pre_attn_scalar": 32}))
    assert relative_error(found, logits_of_transformers(directory, ids)) > 10 * ROUNDED


def test_a_wrong_order_of_rows_shows(ids, tmp_path, monkeypatch):
    directory = model_of("llama", tmp_path / "model")
    monkeypatch.setattr("builders.gguf_files.row_order", lambda rows, heads: list(range(rows)))
    found = logits_of_llama_cpp(write_gguf(directory, tmp_path / "model.gguf"), ids, exact=True)
    assert relative_error(found, logits_of_transformers(directory, ids)) > 0.1
