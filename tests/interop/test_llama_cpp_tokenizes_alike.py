"""llama.cpp gives the ids of the tokenizers library for what we write of every family."""

import json
import re

import pytest

pytest.importorskip("xllamacpp", reason="the llama.cpp wheel is not installed")

from builders.tokenizers_of_families import (
    BYTE_LEVEL,
    MARKED,
    SPACE,
    SPACED,
    TEXTS,
    byte_level_json,
    sentencepiece_model,
    spaced_json,
    write_model_directory,
    write_vocabulary_only,
)
from oracles.llama_cpp import Vocabulary as LlamaVocabulary
from tokenizers import Tokenizer

from qtool.formats.gguf_tokenizer_files import tokenizer_files
from qtool.formats.gguf_vocab import vocabulary

# Families whose expression llama.cpp has only nearly -> how many of the texts show it.
ALWAYS_PREFIXED = {"llama-2", "gemma"}  # or never; in either case whatever the text begins with
INEXACT = {"mistral-nemo": 2, "gpt-oss": 2, "aya": 8}
# Family -> the name whose splits are closest to its own without being the same.
NEAREST = {
    "gpt-2": "smollm",
    "smollm": "gpt-2",
    "llama-3": "qwen2",
    "qwen-2": "llama-bpe",
    "qwen-3.5": "qwen2",
    "mistral-nemo": "gpt-4o",
    "gpt-oss": "tekken",
    "deepseek-coder": "deepseek-llm",
    "deepseek-3": "llama-bpe",
    "falcon": "gpt-2",
    "bloom": "viking",
    "viking": "bloom",
    "seed-coder": "qwen2",
    "ling": "dbrx",
    "jais-2": "dbrx",
    "minicpm-5": "qwen2",
    "aya": "gpt-4o",
}


def converted(directory, size, **options):
    made = vocabulary(directory, size=size, config={}, **options)
    path = directory / "vocabulary.gguf"
    write_vocabulary_only(path, made.metadata, made.size)
    return made, LlamaVocabulary(path)


def differing(tokenizer, llama, texts, *, special=True):
    return [
        text
        for text in texts
        if tokenizer.encode(text, add_special_tokens=special).ids
        != llama.tokenize(text, add_special=special, parse_special=True)
    ]


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def byte_level_family(request, tmp_path_factory):
    family = request.param
    directory = tmp_path_factory.mktemp(family)
    tokenizer = write_model_directory(
        directory, byte_level_json(family), bos_token="<bos>", eos_token="<eos>"
    )
    size = tokenizer.get_vocab_size() + 3  # rows of the embedding without a token
    made, llama = converted(directory, size)
    return family, tokenizer, made, llama


def test_byte_level_families_are_recognised(byte_level_family):
    family, _, made, llama = byte_level_family
    assert made.metadata["tokenizer.ggml.pre"].content == BYTE_LEVEL[family][0]
    assert llama.n_tokens == made.size


def test_byte_level_texts_get_the_same_ids(byte_level_family):
    family, tokenizer, made, llama = byte_level_family
    wrong = differing(tokenizer, llama, TEXTS)
    assert bool(wrong) == (family in INEXACT)
    assert len(wrong) <= INEXACT.get(family, 0)
    assert any("otherwise than the model" in text for text in made.warnings) == bool(wrong)
    assert differing(tokenizer, llama, ["plain text"], special=False) == []


@pytest.mark.parametrize("family", NEAREST)
def test_the_texts_tell_a_family_from_its_nearest(family, tmp_path):
    tokenizer = write_model_directory(tmp_path, byte_level_json(family))
    _, llama = converted(tmp_path, tokenizer.get_vocab_size(), pre=NEAREST[family])
    wrong = differing(tokenizer, llama, (*TEXTS, *MARKED), special=False)
    assert len(wrong) > INEXACT.get(family, 0)


def test_byte_level_texts_with_combining_marks_get_the_same_ids(byte_level_family):
    family, tokenizer, _, llama = byte_level_family
    # Decomposed text is where the two must differ: llama.cpp composes nothing.
    texts = [text for text in MARKED if family[:4] != "qwen" or "e\u0301" not in text]
    wrong = differing(tokenizer, llama, texts)
    assert bool(wrong) == (family in INEXACT and family != "aya")


def test_byte_level_files_come_back(byte_level_family):
    _, tokenizer, made, _ = byte_level_family
    files = tokenizer_files(made.metadata)
    again = Tokenizer.from_str(files["tokenizer.json"])
    wrong = [t for t in (*TEXTS, *MARKED) if again.encode(t).ids != tokenizer.encode(t).ids]
    assert [text for text in wrong if "e\u0301" not in text] == []  # but for the NFC form


@pytest.fixture(scope="module", params=[(f, m) for f in SPACED for m in (True, False)], ids=str)
def spaced_family(request, tmp_path_factory):
    family, with_model = request.param
    directory = tmp_path_factory.mktemp(family)
    tokenizer = write_model_directory(
        directory, spaced_json(family), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if with_model:
        (directory / "tokenizer.model").write_bytes(sentencepiece_model(family))
    made, llama = converted(directory, tokenizer.get_vocab_size() + 2)
    return family, tokenizer, made, llama


def test_sentencepiece_texts_get_the_same_ids(spaced_family):
    family, tokenizer, made, llama = spaced_family
    # The letter that stands for a space, in a text: no two tokenizers agree about it.
    texts = [t for t in (*TEXTS, *MARKED) if family != "gemma" or SPACE not in t]
    wrong = differing(tokenizer, llama, texts)
    if family in ALWAYS_PREFIXED:
        assert wrong == []
        assert made.warnings == ()
        return
    # These put no space before a text that begins with one, and llama.cpp always does.
    assert all(text.startswith(" ") or re.search("> |> ?<|<turn>|<bos>", text) for text in wrong)
    assert any("that begins with one" in warning for warning in made.warnings)


def test_a_chat_is_the_same_where_only_the_beginning_gets_a_space(tmp_path):
    tokenizer = write_model_directory(
        tmp_path, spaced_json("mistral-3"), bos_token="<s>", chat_template="{{ messages }}"
    )
    made, llama = converted(tmp_path, tokenizer.get_vocab_size())
    texts = ["<s>" + text for text in (*TEXTS, *MARKED)]
    assert differing(tokenizer, llama, texts, special=False) == []
    assert any("without chat template" in warning for warning in made.warnings)


def test_sentencepiece_files_come_back(spaced_family):
    _, _, made, llama = spaced_family
    again = Tokenizer.from_str(tokenizer_files(made.metadata)["tokenizer.json"])
    assert differing(again, llama, (*TEXTS, *MARKED)) == []


def test_a_sentencepiece_model_alone_is_enough(tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "tokenizer.model").write_bytes(sentencepiece_model("llama-2"))
    (alone / "added_tokens.json").write_text(json.dumps({"<turn>": 5000}))
    tokenizer = write_model_directory(tmp_path / "whole", spaced_json("llama-2"))
    _, llama = converted(alone, tokenizer.get_vocab_size() + 4000)
    texts = [text for text in (*TEXTS, *MARKED) if "<" not in text]
    assert [
        text
        for text in texts
        if tokenizer.encode(text, add_special_tokens=False).ids
        != llama.tokenize(text, add_special=False)
    ] == []
    assert llama.tokenize("<turn>", add_special=False) == [5000]
