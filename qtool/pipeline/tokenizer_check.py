"""Whether a model reads and writes text as the original does: vocabulary, special tokens, template.

Figures of two models mean something together only if the same text became the same tokens, and a
chat model answers badly under another one's template. Directories are compared by what their files
say, GGUF files by their metadata, and one with the other by the metadata that the directory would
be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.gguf_vocab import vocabulary
from qtool.formats.gguf_vocab_files import TokenizerFiles, read_tokenizer_files
from qtool.pipeline.inspect_gguf import SPECIAL_IDS
from qtool.pipeline.tokenizer_files import describe_tokenizer, differences

Template = Literal["same", "different", "absent"]
TOKENS, TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"
# Metadata that decides which ids a text becomes -> how to call it.
DECIDING = {
    TOKENS: "tokens",
    "tokenizer.ggml.token_type": "token types",
    "tokenizer.ggml.merges": "merges",
    "tokenizer.ggml.scores": "scores",
}
PARTS_OF_JSON = ("model", "normalizer", "pre_tokenizer", "post_processor")


@dataclass(frozen=True)
class TokenizerCheck:
    """What came of comparing a model's tokenizer files with the original's.

    Args:
        same: whether a text becomes the same tokens and the special tokens are the same.
        template: "same" also where neither has one; "absent" where the model lost it.
        differences: one line each, the template's included.
    """

    same: bool
    template: Template
    differences: tuple[str, ...]

    def warning(self, model: str, original: str) -> str | None:
        """Return a line that says what differs, None if nothing does."""
        if not self.differences:
            return None
        return (
            f"THE TOKENIZER OR CHAT TEMPLATE OF {model} IS NOT THAT OF {original}: "
            f"{'; '.join(self.differences)}"
        )


def check_tokenizer(model: Checkpoint, original: Checkpoint) -> TokenizerCheck | None:
    """Compare a model's tokenizer and chat template with the original's.

    Returns:
        None where they cannot be compared: one is a GGUF file, and llama.cpp has no tokenizer
        like the other's.

    Raises:
        DamagedError: a tokenizer file that cannot be read.
    """
    if not model.gguf and not original.gguf:
        return _check_directories(model, original)
    try:
        ours, theirs = _metadata(model, original), _metadata(original, model)
    except UnsupportedError:
        return None
    found = [*_vocabulary_differences(ours, theirs), *_special_differences(ours, theirs)]
    template, line = _template(_text(ours), _text(theirs))
    return TokenizerCheck(not found, template, (*found, *line))


def tokenizer_json(check: TokenizerCheck) -> dict[str, Any]:
    """Return it in the terms of the JSON contract."""
    return {
        "same": check.same,
        "template": check.template,
        "differences": list(check.differences),
    }


def _template(ours: object, theirs: object) -> tuple[Template, list[str]]:
    if ours == theirs:
        return "same", []
    if ours is None:
        return "absent", ["it has no chat template, the original has one"]
    if theirs is None:
        return "different", ["it has a chat template, the original has none"]
    return "different", ["the chat template is another"]


# --- two directories -----------------------------------------------------------------------------


def _check_directories(model: Checkpoint, original: Checkpoint) -> TokenizerCheck:
    ours, theirs = describe_tokenizer(model), describe_tokenizer(original)
    found: list[str] = []
    if ours["sha256"] != theirs["sha256"]:  # the same content may be written in other ways
        files, others = read_tokenizer_files(model.path), read_tokenizer_files(original.path)
        found += _file_differences(files, others, ours["files"], theirs["files"])
    found += [
        f"{row['key']} is {_shown(row['left'])}, was {_shown(row['right'])}"
        for row in differences(ours["special"], theirs["special"])
    ]
    hashes = [side["chat_template"] and side["chat_template"]["sha256"] for side in (ours, theirs)]
    template, line = _template(*hashes)
    return TokenizerCheck(not found, template, (*found, *line))


def _file_differences(
    ours: TokenizerFiles,
    theirs: TokenizerFiles,
    files: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Say what differs between tokenizer files with other hashes; nothing if only the spelling."""
    if not ours.tokenizer or not theirs.tokenizer:
        names = [", ".join(f["name"] for f in side) or "none" for side in (files, others)]
        return [f"the tokenizer files differ ({names[0]}; the original: {names[1]})"]
    found = []
    for part in PARTS_OF_JSON:
        left, right = ours.tokenizer.get(part), theirs.tokenizer.get(part)
        if left == right:
            continue
        if part == "model" and isinstance(left, dict) and isinstance(right, dict):
            found += _model_differences(left, right)
        else:
            found.append(f"{part} of tokenizer.json differs")
    if ours.added != theirs.added:
        numbers = sorted(ours.added.keys() | theirs.added.keys())
        changed = [n for n in numbers if ours.added.get(n) != theirs.added.get(n)]
        found.append(f"{len(changed)} added tokens differ, the first is {changed[0]}")
    return found


def _model_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Say which parts of the tokenization model differ, and how many tokens do."""
    found = []
    for key in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(key), right.get(key)
        if ours == theirs:
            continue
        if key == "vocab" and isinstance(ours, dict) and isinstance(theirs, dict):
            changed = sum(ours.get(t) != theirs.get(t) for t in ours.keys() | theirs.keys())
            sizes = f"{len(ours)} tokens, {len(theirs)} in the original"
            found.append(f"{changed} entries of the vocabulary differ ({sizes})")
        else:
            found.append(f"{printable(key)} of the tokenizer's model differ")
    return found


def _shown(value: object) -> str:
    return "absent" if value is None else printable(repr(value))


# --- where a GGUF file is one of the two ---------------------------------------------------------


def _metadata(checkpoint: Checkpoint, other: Checkpoint) -> Mapping[str, Value]:
    """Return `tokenizer.*` of a file, or what a directory would be given in `other`'s size."""
    if checkpoint.gguf:
        return checkpoint.gguf[0].metadata
    items = other.gguf[0].metadata.get(TOKENS)
    rows = int(checkpoint.config.get("vocab_size", 0))
    size = len(items.content) if items is not None and isinstance(items.content, tuple) else rows
    try:
        made = vocabulary(checkpoint.path, size=size, config=checkpoint.config)
    except DamagedError:
        if size >= rows:
            raise
        # A file may stop at the last token that the tokenizer knows; fewer are a difference.
        made = vocabulary(checkpoint.path, size=rows, config=checkpoint.config)
    return made.metadata


def _items(metadata: Mapping[str, Value], key: str) -> tuple[Any, ...]:
    value = metadata.get(key)
    return value.content if value is not None and isinstance(value.content, tuple) else ()


def _scalar(metadata: Mapping[str, Value], key: str) -> Any:
    value = metadata.get(key)
    return None if value is None or value.array else value.content


def _text(metadata: Mapping[str, Value]) -> Any:
    return _scalar(metadata, TEMPLATE)


def _vocabulary_differences(ours: Mapping[str, Value], theirs: Mapping[str, Value]) -> list[str]:
    found = []
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"):
        left, right = _scalar(ours, key), _scalar(theirs, key)
        if left != right:
            found.append(f"{key} is {_shown(left)}, was {_shown(right)}")
    for key, name in DECIDING.items():
        left, right = _items(ours, key), _items(theirs, key)
        if left == right:
            continue
        changed = [n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]]
        count = len(changed) + abs(len(left) - len(right))
        first = changed[0] if changed else min(len(left), len(right))
        found.append(f"{count} {name} differ, the first is number {first}")
    return found


def _special_differences(ours: Mapping[str, Value], theirs: Mapping[str, Value]) -> list[str]:
    found = []
    for name, key in SPECIAL_IDS.items():
        left, right = (_scalar(side, f"tokenizer.ggml.{key}") for side in (ours, theirs))
        if left != right:
            found.append(f"{name} is {_shown(left)}, was {_shown(right)}")
    for end in ("bos", "eos"):
        key = f"tokenizer.ggml.add_{end}_token"
        left, right = bool(_scalar(ours, key)), bool(_scalar(theirs, key))
        if left != right and key in ours and key in theirs:
            found.append(f"add_{end}_token is {left}, was {right}")
    return found
