"""The tokenizer files of a Hugging Face directory, made from the vocabulary of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.gguf_pretokenizers import (
    KNOWN_NAMES,
    PreTokenizer,
    by_name,
    pre_tokenizer_json,
)
from qtool.formats.gguf_vocab_pieces import SPACE
from qtool.formats.gguf_vocab_sentencepiece import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from qtool.formats.gguf_vocab_special import KEYS, TEMPLATE, TEMPLATE_NAMES

PREFIX = "tokenizer.ggml."
# Pre-tokenizers for which llama.cpp puts the first token before every text unless told otherwise.
BEGINNING_BY_DEFAULT = frozenset({"llama-bpe", "tekken"})
# The numbers that llama.cpp takes where a file of the model "llama" names no token.
DEFAULT_IDS = {"bos": 1, "eos": 2, "unk": 0}
NAMES_OF_FILES = {name: f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "mask")}
CONVERT_FROM_ORIGINAL = "take the tokenizer files of the model that the file was made from"


@dataclass(frozen=True)
class _Tokens:
    """The arrays of a GGUF vocabulary, one entry per token."""

    texts: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]

    def numbers(self) -> dict[str, int]:
        """Return text -> number of every token."""
        return {text: number for number, text in enumerate(self.texts)}

    def without_filling(self) -> _Tokens:
        """Return the same without the unused tokens at the end, rows for which no text stands."""
        used = len(self.kinds)
        while used and self.kinds[used - 1] == UNUSED:
            used -= 1
        return _Tokens(self.texts[:used], self.kinds[:used], self.scores[:used])


def tokenizer_files(metadata: Mapping[str, Value]) -> dict[str, str | bytes]:
    """Return file name -> content of the tokenizer that a GGUF file describes.

    Args:
        metadata: of the file; only `tokenizer.*` is read.

    Raises:
        UnsupportedError: a tokenizer that is neither byte-level BPE of a known structure nor
            SentencePiece with scores.
        DamagedError: keys are missing, or do not belong together.
    """
    model = _text(metadata, "model")
    tokens = _tokens(metadata)
    if model == "gpt2":
        row = _row(metadata)
        tokenizer = _byte_level(metadata, tokens, row)
        begins = row.name in BEGINNING_BY_DEFAULT
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
        begins = True
    else:
        raise UnsupportedError(
            f"the file's tokenizer is of the kind '{printable(model)}', which qtool does not turn "
            "into a tokenizer.json",
            CONVERT_FROM_ORIGINAL,
        )
    named = _named(metadata, tokens, DEFAULT_IDS if model == "llama" else {})
    tokenizer["post_processor"] = _post_processor(metadata, tokens, named, begins=begins)
    tokenizer["added_tokens"] = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for number, (text, kind) in enumerate(zip(tokens.texts, tokens.kinds, strict=True))
        if kind in {CONTROL, USER_DEFINED, UNKNOWN}
    ]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    settings |= {NAMES_OF_FILES[name]: text for name, text in named.items()}
    return {
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(settings | _templates(metadata)),
    }


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def _text(metadata: Mapping[str, Value], key: str) -> str:
    value = metadata.get(PREFIX + key)
    if value is None or not isinstance(value.content, str):
        raise DamagedError(f"the file has no text '{PREFIX}{key}'", CONVERT_FROM_ORIGINAL)
    return value.content


def _list(metadata: Mapping[str, Value], key: str, *kinds: type) -> Sequence[Any]:
    value = metadata.get(PREFIX + key)
    listed = value.content if value is not None and value.array else None
    if not isinstance(listed, tuple) or not all(isinstance(item, kinds) for item in listed):
        raise DamagedError(f"the file has no usable list '{PREFIX}{key}'", CONVERT_FROM_ORIGINAL)
    return listed


def _switch(metadata: Mapping[str, Value], key: str, *, otherwise: bool) -> bool:
    value = metadata.get(PREFIX + key)
    return value.content if value is not None and isinstance(value.content, bool) else otherwise


def _tokens(metadata: Mapping[str, Value]) -> _Tokens:
    texts = tuple(
        text or f"[EMPTY_{number}]"  # as llama.cpp calls them
        for number, text in enumerate(_list(metadata, "tokens", str))
    )
    if len(set(texts)) != len(texts):
        raise DamagedError("the file's vocabulary has one token twice", CONVERT_FROM_ORIGINAL)
    kinds = tuple(_list(metadata, "token_type", int)) or (NORMAL,) * len(texts)
    scores = (0.0,) * len(texts)
    if PREFIX + "scores" in metadata:
        scores = tuple(map(float, _list(metadata, "scores", int, float)))
    if not len(texts) == len(kinds) == len(scores):
        raise DamagedError(
            f"the file has {len(texts)} tokens, {len(kinds)} types and {len(scores)} scores",
            CONVERT_FROM_ORIGINAL,
        )
    return _Tokens(texts, kinds, scores).without_filling()


def _row(metadata: Mapping[str, Value]) -> PreTokenizer:
    name = _text(metadata, "pre")
    row = by_name(name) if name in KNOWN_NAMES else None
    if row is None:
        raise UnsupportedError(
            f"qtool does not know how the file's pre-tokenizer '{printable(name)}' is written in a "
            "tokenizer.json",
            CONVERT_FROM_ORIGINAL,
        )
    return row


def _frame(model: dict[str, Any], **parts: object) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
    } | {**parts, "model": model}


def _byte_level(
    metadata: Mapping[str, Value], tokens: _Tokens, row: PreTokenizer
) -> dict[str, Any]:
    known = tokens.numbers()
    merges = []
    for line in _list(metadata, "merges", str):
        left, _, right = line[1:].partition(" ")
        pair = [line[:1] + left, right]
        if not (pair[0] in known and pair[1] in known and pair[0] + pair[1] in known):
            raise DamagedError(
                f"the merge '{printable(line)}' of the file joins no two of its tokens",
                CONVERT_FROM_ORIGINAL,
            )
        merges.append(pair)
    bytes_as_letters = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return _frame(
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": row.whole_words,
            "vocab": known,
            "merges": merges,
        },
        pre_tokenizer=pre_tokenizer_json(row),
        decoder=bytes_as_letters,
    )


def _sentencepiece(metadata: Mapping[str, Value], tokens: _Tokens) -> dict[str, Any]:
    prefix = _switch(metadata, "add_space_prefix", otherwise=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next(
        (t for t, k in zip(tokens.texts, tokens.kinds, strict=True) if k == UNKNOWN), None
    )
    return _frame(
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": tokens.numbers(),
            "merges": merges_of_scores(tokens.texts, tokens.kinds, tokens.scores),
        },
        normalizer={"type": "Sequence", "normalizers": [*prepend, replace]},
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
    )


def merges_of_scores(
    texts: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """Return every pair of tokens whose union is a token, in the order in which they are joined.

    Args:
        texts: of the tokens.
        kinds: their types; only words take part.
        scores: the higher, the earlier.
    """
    words = {
        text: number
        for number, (text, kind) in enumerate(zip(texts, kinds, strict=True))
        if kind in {NORMAL, UNUSED}
    }
    found = [
        (-scores[number], words[text[:cut]], words[text[cut:]], text, cut)
        for text, number in words.items()
        for cut in range(1, len(text))
        if text[:cut] in words and text[cut:] in words
    ]
    return [[text[:cut], text[cut:]] for *_, text, cut in sorted(found)]


def _named(
    metadata: Mapping[str, Value], tokens: _Tokens, defaults: Mapping[str, int]
) -> dict[str, str]:
    found = {}
    for name in NAMES_OF_FILES:
        value = metadata.get(KEYS[name])
        number = value.content if value is not None else defaults.get(name)
        if isinstance(number, int) and 0 <= number < len(tokens.texts):
            found[name] = tokens.texts[number]
    return found


def _post_processor(
    metadata: Mapping[str, Value], tokens: _Tokens, named: Mapping[str, str], *, begins: bool
) -> dict[str, Any]:
    """Return what puts the first and last token around a text, as the file's switches say."""
    around = [
        name
        for name, wanted in (
            ("bos", _switch(metadata, "add_bos_token", otherwise=begins)),
            ("eos", _switch(metadata, "add_eos_token", otherwise=False)),
        )
        if wanted and name in named
    ]
    numbers = tokens.numbers()

    def one(sequence: str, type_id: int) -> list[dict[str, Any]]:
        marks = {
            name: [{"SpecialToken": {"id": named[name], "type_id": type_id}}] for name in around
        }
        middle = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        return [*marks.get("bos", []), *middle, *marks.get("eos", [])]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": [*one("A", 0), *one("B", 1)],
        "special_tokens": {
            named[name]: {
                "id": named[name],
                "ids": [numbers[named[name]]],
                "tokens": [named[name]],
            }
            for name in around
        },
    }


def _templates(metadata: Mapping[str, Value]) -> dict[str, Any]:
    found: list[dict[str, str]] = []
    names = metadata.get(TEMPLATE_NAMES)
    listed = names.content if names is not None and isinstance(names.content, tuple) else ()
    for name in (None, *map(str, listed)):
        value = metadata.get(TEMPLATE if name is None else f"{TEMPLATE}.{name}")
        if value is not None and isinstance(value.content, str):
            found.append({"name": name or "default", "template": value.content})
    if not found:
        return {}
    return {"chat_template": found[0]["template"] if len(found) == 1 and not listed else found}
