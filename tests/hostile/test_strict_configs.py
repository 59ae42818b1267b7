"""Settings that transformers or an engine would stumble over later are refused by config.json."""

import json
import shutil

import pytest
import torch
from builders.hostile_configs import CONFIG, edit
from builders.refusals import snapshot
from builders.tiny_models import tiny_model
from safetensors.torch import load_file

LINES = {
    "quantize": ("quantize", "model", "-m", "rtn", "-g", "32", "-f", "gptq", "-o", "out"),
    "export": ("export", "model", "-f", "gguf:Q8_0", "-o", "out.gguf"),
    "eval": ("eval", "model", "-l", "32", "-n", "2"),
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
# Family, what is set, and what the message has to name beside the file.
CASES = {
    "a flag of null": ("llama", {"use_cache": None}, "use_cache"),
    "a bias of null": ("llama", {"attention_bias": None}, "attention_bias"),
    "ties of null": ("olmo2", {"tie_word_embeddings": None}, "tie_word_embeddings"),
    "an epsilon without fraction": ("qwen3", {"rms_norm_eps": 0}, "rms_norm_eps"),
    "a size with a fraction of zero": ("llama", {"hidden_size": 64.0}, "hidden_size"),
    "a scalar with a fraction": ("gemma2", {"query_pre_attn_scalar": 24.0}, "query_pre_attn"),
    "a cap without fraction": ("gemma2", {"final_logit_softcapping": 5}, "final_logit"),
    "a flag that is a number": (
        "gemma3_text",
        {"use_bidirectional_attention": 2},
        "use_bidirectional_attention",
    ),
    "a pad token in a list": ("qwen2", {"pad_token_id": []}, "pad_token_id"),
    "an activation of null": ("llama", {"hidden_act": None}, "hidden_act"),
    "a dropout of text": ("phi3", {"resid_pdrop": "0.5"}, "resid_pdrop"),
    "a range of null": ("phi3", {"initializer_range": None}, "initializer_range"),
    "a context of null": (
        "phi3",
        {"original_max_position_embeddings": None},
        "original_max_position_embeddings",
    ),
    "a base of null": ("llama", {"rope_parameters.rope_theta": None}, "rope_theta"),
    "llama3 without its frequencies": ("llama", {"rope_parameters": LLAMA3}, "freq_factor"),
    "an original context of text": (
        "llama",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": "64"}},
        "original_max_position_embeddings",
    ),
    "a multiplier of nothing": ("granite", {"embedding_multiplier": 0.0}, "embedding_multiplier"),
    "a window of nothing": ("mistral", {"sliding_window": 0}, "sliding_window"),
    "classes of another family": ("llama", {"architectures": ["Qwen2ForCausalLM"]}, "architect"),
    "a class without a head": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures",
    ),
    "an unknown type": ("llama", {"model_type": "\x1b[31mevil"}, "evil"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Family -> a directory without fault."""
    place = tmp_path_factory.mktemp("sound")
    for family in {family for family, _, _ in CASES.values()}:
        tiny_model(family, place / family, dtype=torch.bfloat16)
    return place


@pytest.mark.parametrize("command", LINES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_file_and_key_before_torch(server, sound, tmp_path, name, command):
    family, changes, word = CASES[name]
    shutil.copytree(sound / family, tmp_path / "model")
    edit(tmp_path / "model", changes)
    before = snapshot(tmp_path)
    ended = server.run(*LINES[command], cwd=tmp_path)
    assert ended.code in {5, 6}, ended.err
    assert f"model/{CONFIG}" in ended.message
    assert word in ended.message
    assert not ended.heavy
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", LINES)
def test_an_own_head_that_is_not_there_is_missed(server, sound, tmp_path, command):
    """Transformers would draw one at random, and llama.cpp takes the embedding."""
    shutil.copytree(sound / "gemma2", tmp_path / "model")
    edit(tmp_path / "model", {"tie_word_embeddings": False})
    ended = server.run(*LINES[command], cwd=tmp_path)
    assert ended.code == 6, ended.err
    assert "lm_head.weight" in ended.message
    assert not ended.heavy


@pytest.mark.parametrize(
    "kernels", ["flash_attention_2", "evil/kernels", "kernels-community/flash-attn"]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_model_asks_for_are_neither_fetched_nor_missed(
    warm_server, sound, tmp_path, kernels, key
):
    shutil.copytree(sound / "llama", tmp_path / "model")
    edit(tmp_path / "model", {key: kernels})
    given = ("-m", "gptq", "-g", "32", "-n", "2", "-l", "32", "--eval", "none", "--json")
    ended = warm_server.run("quantize", "model", *given, "-o", "out", cwd=tmp_path, seconds=300)
    assert ended.code == 0, ended.err
    edit(tmp_path / "model", {key: None})
    ended = warm_server.run("quantize", "model", *given, "-o", "plain", cwd=tmp_path, seconds=300)
    assert ended.code == 0, ended.err
    ours, plain = (load_file(tmp_path / at / "model.safetensors") for at in ("out", "plain"))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_a_tokenizer_that_leaves_pieces_to_chance_is_refused(server, sound, tmp_path):
    shutil.copytree(sound / "llama", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    found = json.loads(path.read_text())
    found["model"]["dropout"] = 0.1
    path.write_text(json.dumps(found))
    ended = server.run(*LINES["eval"], cwd=tmp_path)
    assert ended.code == 6, ended.err
    assert "tokenizer.json" in ended.message
    assert "dropout" in ended.message
    assert not ended.heavy


def test_a_tokenizer_of_another_kind_that_fails_on_text_is_no_bug(warm_server, sound, tmp_path):
    shutil.copytree(sound / "llama", tmp_path / "model")
    edit(tmp_path / "model", {"tokenizer_class": "BertTokenizer"}, "tokenizer_config.json")
    ended = warm_server.run(*LINES["eval"], cwd=tmp_path)
    assert ended.code == 6, ended.err
    assert "the tokenizer of" in ended.message


@pytest.mark.parametrize("command", ["quantize", "export"])
@pytest.mark.parametrize("place", [".", ""])
def test_the_directory_that_it_runs_in_is_not_replaced(
    warm_server, sound, tmp_path, command, place
):
    """The shell that called would stand in a directory that is no more."""
    (tmp_path / "here").mkdir()
    model = str(sound / "llama")
    given = (command, model, *LINES[command][2:-1], place)
    ended = warm_server.run(*given, cwd=tmp_path / "here")
    assert ended.code == 2, ended.err
    assert "runs in" in ended.message
    assert not list((tmp_path / "here").iterdir())
