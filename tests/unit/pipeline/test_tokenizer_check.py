"""A model's tokenizer and template against the original's, in directories and GGUF files."""

import json
import shutil
from dataclasses import replace

import pytest
from builders.tiny_models import tiny_model
from tiny_tokenizer import CHATML, tiny_tokenizer

from qtool.checkpoint.gguf_values import flag, many, text, u32
from qtool.checkpoint.locate import locate
from qtool.formats.gguf_vocab import vocabulary
from qtool.pipeline import tokenizer_check
from qtool.pipeline.tokenizer_check import check_tokenizer, tokenizer_json


@pytest.fixture
def original(tmp_path):
    """The original: a directory with a chat template."""
    tiny_model("llama", tmp_path / "original")
    tiny_tokenizer(bos=True, chat_template=CHATML).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.fixture
def copy(original):
    """A copy of it, to be changed."""
    shutil.copytree(original, original.with_name("copy"))
    return original.with_name("copy")


def check(model, original):
    return check_tokenizer(locate(str(model)), locate(str(original)))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_copy_is_the_same_however_its_json_is_spelled(original, copy):
    edit(copy / "tokenizer.json", lambda content: None)  # other white space
    assert (copy / "tokenizer.json").read_bytes() != (original / "tokenizer.json").read_bytes()
    found = check(copy, original)
    assert (found.same, found.template, found.differences) == (True, "same", ())
    assert found.warning("a", "b") is None


def rename_token(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["new"] = vocabulary.pop("!")


DIFFERENCES = {
    "a token": ("tokenizer.json", rename_token, "2 entries of the vocabulary differ"),
    "the splitting": (
        "tokenizer.json",
        lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
        "pre_tokenizer of tokenizer.json differs",
    ),
    "an added token": (
        "tokenizer.json",
        lambda c: c["added_tokens"][1].update(special=False),
        "1 added tokens differ, the first is 257",
    ),
    "the end of text": (
        "tokenizer_config.json",
        lambda c: c.update(eos_token="<bos>"),
        "eos_token is '<bos>', was '<eos>'",
    ),
    "its number": (
        "generation_config.json",
        lambda c: c.update(eos_token_id=5),
        "eos_token_id is 5, was 257",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_is_named(original, copy, name):
    file, change, said = DIFFERENCES[name]
    edit(copy / file, change)
    found = check(copy, original)
    assert not found.same
    assert found.template == "same"
    assert found.differences == (said,) or said in found.differences[0]
    assert said in found.warning("./copy", "./original")


def test_templates(original, copy):
    path = copy / "chat_template.jinja"
    path.write_text(path.read_text() + "!")
    assert check(copy, original).template == "different"
    path.unlink()
    found = check(copy, original)
    assert (found.template, found.same) == ("absent", True)
    assert check(original, copy).template == "different"
    assert tokenizer_json(found) == {
        "same": True,
        "template": "absent",
        "differences": ["it has no chat template, the original has one"],
    }


def test_a_directory_without_a_tokenizer_differs(original, copy):
    (copy / "tokenizer.json").unlink()
    assert "tokenizer files differ" in check(copy, original).differences[0]


# --- GGUF files ----------------------------------------------------------------------------------


class Contents:
    """As much of a file as the check looks at."""

    def __init__(self, metadata):
        self.metadata = metadata


def as_file(directory, **changes):
    """The directory as a GGUF file, with other `tokenizer.*` values; None leaves a key out."""
    checkpoint = locate(str(directory))
    made = vocabulary(directory, size=300, config=checkpoint.config, pre="gpt-2").metadata
    for name, value in changes.items():
        key = "tokenizer.chat_template" if name == "template" else f"tokenizer.ggml.{name}"
        made[key] = value
    metadata = {key: value for key, value in made.items() if value is not None}
    return replace(checkpoint, name="file", config={}, gguf=(Contents(metadata),))


@pytest.fixture
def known(monkeypatch):
    """The tiny tokenizer's splitting has no name in llama.cpp: give it one."""

    def named(directory, *, size, config):
        return vocabulary(directory, size=size, config=config, pre="gpt-2")

    monkeypatch.setattr(tokenizer_check, "vocabulary", named)


def test_a_file_made_from_the_directory_is_the_same_either_way(original, known):
    directory, file = locate(str(original)), as_file(original)
    for pair in ((file, directory), (directory, file), (file, file)):
        found = check_tokenizer(*pair)
        assert (found.same, found.template, found.differences) == (True, "same", ())


def test_a_file_that_differs(original, known):
    directory = locate(str(original))
    tokens = [*as_file(original).gguf[0].metadata["tokenizer.ggml.tokens"].content]
    tokens[3] = "other"
    changed = as_file(
        original,
        tokens=many("string", tokens),
        eos_token_id=u32(3),
        add_bos_token=flag(False),
        template=text("{{ other }}"),
    )
    found = check_tokenizer(changed, directory)
    assert not found.same
    assert found.template == "different"
    assert found.differences == (
        "1 tokens differ, the first is number 3",
        "eos_token is 3, was 257",
        "add_bos_token is False, was True",
        "the chat template is another",
    )
    assert check_tokenizer(as_file(original, template=None), directory).template == "absent"
    other = check_tokenizer(as_file(original, pre=text("llama-bpe")), directory)
    assert other.differences == ("tokenizer.ggml.pre is 'llama-bpe', was 'gpt-2'",)


def test_a_file_that_is_cut_to_what_the_tokenizer_knows_is_the_same(original, known):
    """The embedding of the directory has 300 rows, 258 of them with a token."""
    metadata = as_file(original).gguf[0].metadata
    cut = {
        name: replace(
            metadata[f"tokenizer.ggml.{name}"],
            content=metadata[f"tokenizer.ggml.{name}"].content[:258],
        )
        for name in ("tokens", "token_type")
    }
    found = check_tokenizer(as_file(original, **cut), locate(str(original)))
    assert found.differences == ()
    few = {name: replace(value, content=value.content[:200]) for name, value in cut.items()}
    found = check_tokenizer(as_file(original, **few), locate(str(original)))
    assert not found.same
    assert "tokens differ, the first is number 200" in found.differences[0]


def test_what_llama_cpp_cannot_express_is_not_compared(original):
    """Without a name for the splitting there is nothing to hold the file to."""
    edit(original / "tokenizer.json", lambda c: c["pre_tokenizer"].update(add_prefix_space=True))
    file = as_file(original)
    found = check_tokenizer(file, locate(str(original)))
    assert found is None or not found.same
