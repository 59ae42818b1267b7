"""llama.cpp loads what the command line writes, and computes, tokenizes and continues with it."""

import numpy as np
import pytest
import torch
from builders.tiny_models import tiny_model, token_ids
from builders.tokenizers_of_families import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtool.cli.app import run

llama_cpp = pytest.importorskip("oracles.llama_cpp", reason="xllamacpp is not installed")

LENGTH = 48
# Blocks of 256 fit, heads of 64 do too; windows where llama.cpp has none are switched off, and
# queries are scaled as it scales them.
SIZES = {"hidden": 256, "intermediate": 512}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 64},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "head_dim": 64},
    "gemma2": {"query_pre_attn_scalar": 64, "head_dim": 64},
    "gemma3_text": {"query_pre_attn_scalar": 64, "head_dim": 64},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {},
}
# Relative errors in the Frobenius norm. llama.cpp rounds what it multiplies with quantized matrices
# to 8 bits, by blocks of 32 or 256: 0.5 to 0.7 % a matrix for normal inputs, 14 matrices in a row.
FLOAT, QUANTIZED = 1e-2, 4e-2


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """A directory with ./model of a family."""
    directory = tmp_path_factory.mktemp(request.param)
    settings = {**SIZES, **FAMILIES[request.param]}
    tiny_model(request.param, directory / "model", dtype=torch.bfloat16, outliers=False, **settings)
    return directory / "model"


def write(command, model, kind, path, *flags):
    arguments = (command, model, "-f", f"gguf:{kind}", "-o", path, "-q", *flags)
    assert run([str(argument) for argument in arguments]) == 0
    return path


def logits_of_transformers(directory, ids):
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(ids[None]).logits[0].numpy()


def relative_error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_a_float16_file_runs_tokenizes_and_generates(model, tmp_path):
    path = write("export", model, "F16", tmp_path / "model.gguf")
    ids = token_ids(1, LENGTH, seed=5)[0]
    tokenizer = AutoTokenizer.from_pretrained(model)
    with llama_cpp.Model(path, 256) as loaded:
        expected = logits_of_transformers(model, ids)
        assert relative_error(loaded.logits(ids.tolist()), expected) < FLOAT
        for text in TEXTS:
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert loaded.tokenize(text, add_special=False, parse_special=True) == wanted
        prompt = loaded.tokenize("Once upon a time")
        assert len(continuation(loaded, prompt, 8)) == 8


def continuation(loaded, prompt, count):
    """Tokens that llama.cpp finds likeliest, one after the other; all are text or special."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(loaded.logits(ids)[-1].argmax()))
        assert isinstance(loaded.detokenize(ids[-1:]), str)
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_a_calibrated_file_computes_what_its_own_weights_do(model, kind, tmp_path):
    flags = ("-m", "gptq", "-n", "4", "-l", "32", "--eval", "none")
    path = write("quantize", model, kind, tmp_path / "model.gguf", *flags)
    back = tmp_path / "floats"
    assert run(["export", str(path), "-f", "safetensors:F32", "-o", str(back), "-q"]) == 0
    plain = write("export", path, "F32", tmp_path / "plain.gguf")
    ids = token_ids(1, LENGTH, seed=5)[0]
    expected = logits_of_transformers(back, ids)
    for file, tolerance in ((path, QUANTIZED), (plain, FLOAT)):
        with llama_cpp.Model(file, 256) as loaded:
            assert relative_error(loaded.logits(ids.tolist()), expected) < tolerance


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_llama_cpp_loads_a_model_in_several_files(model, tmp_path):
    whole = write("export", model, "Q8_0", tmp_path / "whole.gguf")
    write("export", model, "Q8_0", tmp_path / "split.gguf", "--split-max-size", "300KB")
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 3
    ids = token_ids(1, LENGTH, seed=5)[0].tolist()
    with llama_cpp.Model(whole, 256) as one, llama_cpp.Model(parts[0], 256) as several:
        assert np.array_equal(one.logits(ids), several.logits(ids))
