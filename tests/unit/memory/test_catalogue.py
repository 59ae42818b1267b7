"""The catalogue: sizes and names that people write, and the real models that they stand for."""

import pytest

from qtool.errors import UsageError
from qtool.memory.catalogue import find_shape, rows, shape_of_row
from qtool.memory.file_sizes import weight_bytes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("70b", "Llama-3.3-70B"),
        ("8b", "Llama-3.1-8B"),
        ("0.5b", "Qwen2.5-0.5B"),
        ("8x7b", "Mixtral-8x7B"),
        ("30b-a3b", "Qwen3-30B-A3B"),
        ("671b", "DeepSeek-V3"),
        ("135M", "SmolLM2-135M"),
        ("1T", "Kimi-K2"),
        ("235b", "Qwen3-235B-A22B"),
    ],
)
def test_a_size_stands_for_a_real_model_and_says_which(text, name):
    found = find_shape(text)
    assert found.shape.name == name
    assert name in found.assumed
    assert found.shape.exact
    assert name not in found.others


def test_the_others_of_a_size_are_offered():
    assert "Qwen3-8B" in find_shape("8b").others


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("llama-3.1-8b", "Llama-3.1-8B"),
        ("Llama-3.1-8B", "Llama-3.1-8B"),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("bartowski/Meta-Llama-3.1-8B-Instruct-GGUF", "Llama-3.1-8B"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen2.5-7B"),
        ("QwQ-32B", "Qwen2.5-32B"),
        ("gpt-oss-20b", "gpt-oss-20b"),
    ],
)
def test_a_name_leaves_nothing_to_assume(text, name):
    found = find_shape(text)
    assert (found.shape.name, found.assumed) == (name, "")


@pytest.mark.parametrize("text", ["42b", "0.25b", "55B", "1.1t"])
def test_a_size_between_models_is_labelled_and_offers_its_neighbours(text):
    found = find_shape(text)
    if any(row.size == text.lower() for row in rows()):
        pytest.fail("choose a size that no model has")
    target = float(text[:-1]) * {"b": 1e9, "t": 1e12}[text[-1].lower()]
    assert not found.shape.exact
    assert found.shape.parameters == pytest.approx(target, rel=0.05)
    assert len(found.others) == 3
    assert not weight_bytes(found.shape, "gguf:Q4_K_M").exact


@pytest.mark.parametrize(
    "text",
    ["70x", "", " ", "b", "-5b", "0b", "9999t", "5x3b", "42b-a1b", "1e9b", "nonsense", "7" * 99],
)
def test_what_is_no_size_is_refused_with_examples(text):
    with pytest.raises(UsageError) as refused:
        find_shape(text)
    assert any(example in refused.value.hint for example in ("70b", "nearest: "))


def test_a_typing_error_names_what_may_have_been_meant():
    with pytest.raises(UsageError) as refused:
        find_shape("lama-3.1-8b")
    assert "llama-3.1-8b" in refused.value.hint


def test_the_beginning_of_several_names_lists_them():
    with pytest.raises(UsageError, match="Gemma-3-4B"):
        find_shape("gemma-3")


def test_every_row_has_a_source_and_a_name_of_its_own():
    names = [name.lower() for row in rows() for name in (row.name, *row.aliases)]
    assert len(set(names)) == len(names)
    assert all(row.source.startswith("https://huggingface.co/") for row in rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_the_size_of_a_row_is_about_its_parameters(row):
    unit = {"m": 1e6, "b": 1e9, "t": 1e12}
    head = row.size.partition("-")[0]
    if "x" in head:
        pytest.skip("experts times size says little about the sum")
    stated = float(head[:-1]) * unit[head[-1]]
    assert shape_of_row(row.name).parameters == pytest.approx(stated, rel=0.7)
