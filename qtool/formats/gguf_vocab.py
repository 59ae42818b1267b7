"""The vocabulary of a GGUF file, made from the tokenizer files of a model directory.

llama.cpp has two tokenizers that matter for language models: byte-level BPE with merges ("gpt2")
and SentencePiece with scores ("llama"). What it cannot reproduce is refused or becomes a warning.

Source: src/llama-vocab.cpp of llama.cpp b11549.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.checkpoint.gguf_values import Value, flag, many, text
from qtool.checkpoint.untrusted import GET_AGAIN, printable, shown_path
from qtool.errors import DamagedError, UnsupportedError, UsageError
from qtool.formats.gguf_pretokenizers import PreTokenizer, by_name, flattened, recognise
from qtool.formats.gguf_vocab_files import (
    TokenizerFiles,
    read_tokenizer_files,
    token_text,
    whole_number,
)
from qtool.formats.gguf_vocab_merges import Merges, read_merges
from qtool.formats.gguf_vocab_pieces import SPACE, pieces_of, space_prefix
from qtool.formats.gguf_vocab_sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
)
from qtool.formats.gguf_vocab_special import special_metadata

# What the Unicode forms change is nothing in text as keyboards and web pages give it.
HARMLESS_NORMALIZERS = frozenset({"NFC"})
RARE_NORMALIZERS = frozenset({"NFKC", "NFD", "NFKD"})
ADDED_SCORE = -1000.0
NEEDS_FILES = (
    "load the model's tokenizer with transformers on any machine and save_pretrained() it into "
    "this directory, which writes tokenizer.json"
)


@dataclass(frozen=True)
class Vocabulary:
    """The `tokenizer.*` part of a GGUF file.

    Args:
        metadata: key -> value.
        size: number of tokens.
        warnings: sentences about what llama.cpp will do otherwise than transformers.
    """

    metadata: dict[str, Value]
    size: int
    warnings: tuple[str, ...]


def vocabulary(
    directory: Path, *, size: int, config: Mapping[str, Any], pre: str | None = None
) -> Vocabulary:
    """Return the vocabulary of the model in a directory, filled up to the rows of its embedding.

    Args:
        directory: with the tokenizer files in Hugging Face layout.
        size: rows of the embedding.
        config: config.json.
        pre: name of the pre-tokenizer, to be taken as it is instead of recognising one.

    Raises:
        UnsupportedError: llama.cpp has no tokenizer like this one.
        DamagedError: a file is missing, malformed, or of another model.
        UsageError: llama.cpp does not know `pre`, or it does not apply.
    """
    files = read_tokenizer_files(directory)
    warnings = _token_warnings(files)
    if _is_byte_level(files):
        pieces, metadata = _byte_level(files, pre, warnings)
    elif pre is not None:
        raise UsageError(
            f"--pre is for byte-level tokenizers, and {shown_path(directory)} has a SentencePiece "
            "one",
            "leave it out",
        )
    else:
        pieces, metadata = _sentencepiece(files, warnings)
    pieces = _with_added(pieces, files, raw_spaces=SPACE if _spaced(metadata) else None)
    tokens = _filled(pieces, size, files, warnings)
    metadata["tokenizer.ggml.tokens"] = many("string", (token.text for token in tokens))
    metadata["tokenizer.ggml.token_type"] = many("i32", (token.kind for token in tokens))
    if _spaced(metadata):
        metadata["tokenizer.ggml.scores"] = many("f32", (token.score for token in tokens))
    special, more = special_metadata(files, config, [token.text for token in tokens])
    return Vocabulary(metadata | special, len(tokens), (*warnings, *more))


def _spaced(metadata: Mapping[str, Value]) -> bool:
    return metadata["tokenizer.ggml.model"].content == "llama"


def _is_byte_level(files: TokenizerFiles) -> bool:
    """Return whether tokens are spelled in bytes as characters; refuse what is neither kind."""
    where = shown_path(files.tokenizer_path)
    if not files.tokenizer:
        if (files.directory / "tokenizer.model").exists():
            return False
        raise UnsupportedError(
            f"{shown_path(files.directory)} has neither tokenizer.json nor tokenizer.model",
            NEEDS_FILES,
        )
    model = _model(files)
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedError(
            f"{where} is a {printable(kind)} tokenizer, which qtool does not write as GGUF",
            "only BPE tokenizers, byte-level or with byte fallback, can be converted",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(
                f"{where} marks parts of words with '{printable(model[key])}', which llama.cpp "
                "does not do",
                "this model cannot be written as GGUF",
            )
    steps = flattened(files.tokenizer.get("pre_tokenizer"), "pretokenizers", where)
    if any(step.get("type") == "ByteLevel" for step in steps):
        return True
    if model.get("byte_fallback"):
        return False
    raise UnsupportedError(
        f"{where} is neither byte-level nor falls back to bytes: llama.cpp has no tokenizer for it",
        "this model cannot be written as GGUF",
    )


def _model(files: TokenizerFiles) -> Mapping[str, Any]:
    model = files.tokenizer.get("model")
    if not isinstance(model, dict):
        raise DamagedError(f"{shown_path(files.tokenizer_path)} has no object 'model'", GET_AGAIN)
    return model


def _json_vocabulary(files: TokenizerFiles) -> dict[int, str]:
    where = shown_path(files.tokenizer_path)
    listed = _model(files).get("vocab")
    if not isinstance(listed, dict):
        raise DamagedError(f"{where} has no object 'model.vocab'", GET_AGAIN)
    found = {whole_number(n, where): token_text(token, where) for token, n in listed.items()}
    if len(found) != len(listed):
        raise DamagedError(f"{where} gives one number to two tokens", GET_AGAIN)
    return found


def _byte_level(
    files: TokenizerFiles, pre: str | None, warnings: list[str]
) -> tuple[dict[int, Piece], dict[str, Value]]:
    where = shown_path(files.tokenizer_path)
    row = by_name(pre) if pre is not None else _recognised(files)
    _check_normalizers(files, forced=pre is not None, warnings=warnings)
    listed = _json_vocabulary(files)
    merges = read_merges(_model(files).get("merges"), where)
    whole_words = _model(files).get("ignore_merges") is True
    if row is not None and row.whole_words != whole_words:
        never = merges.never_made(
            listed.values(), outside={t.content for t in files.added.values()}
        )
        if never:
            warnings.append(
                f"{len(never)} tokens such as '{printable(never[0])}' are made by no merge: "
                + ("llama.cpp never uses them" if whole_words else "only llama.cpp uses them")
            )
    if row is not None and row.inexact:
        warnings.append(f"llama.cpp's '{row.name}' cuts {row.inexact} otherwise than the model's")
    metadata = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(pre or (row.name if row else "default")),
        # A space cannot stand inside a token of this alphabet: such a merge is never applied.
        "tokenizer.ggml.merges": many("string", merges.joined()),
    }
    return {number: Piece(token, 0.0, NORMAL) for number, token in listed.items()}, metadata


def _recognised(files: TokenizerFiles) -> PreTokenizer:
    return recognise(
        files.tokenizer.get("pre_tokenizer"),
        whole_words=_model(files).get("ignore_merges") is True,
        where=shown_path(files.tokenizer_path),
    )


def _check_normalizers(files: TokenizerFiles, *, forced: bool, warnings: list[str]) -> None:
    """Refuse what rewrites ordinary text, which llama.cpp's byte-level tokenizer never does."""
    where = shown_path(files.tokenizer_path)
    for step in flattened(files.tokenizer.get("normalizer"), "normalizers", where):
        kind = printable(step.get("type"))
        if kind in HARMLESS_NORMALIZERS:
            continue
        if kind not in RARE_NORMALIZERS and not forced:
            raise UnsupportedError(
                f"{where} rewrites text with {kind} before it is split, which llama.cpp does not",
                "give --pre NAME to convert it all the same",
            )
        warnings.append(
            f"llama.cpp does not rewrite text with {kind} as the model's tokenizer does"
        )


def _sentencepiece(
    files: TokenizerFiles, warnings: list[str]
) -> tuple[dict[int, Piece], dict[str, Value]]:
    listed: dict[int, str] = {}
    merges: Merges | None = None
    if files.tokenizer:
        listed = _json_vocabulary(files)
        merges = read_merges(_model(files).get("merges"), shown_path(files.tokenizer_path))
    pieces, model = pieces_of(files, listed, merges, warnings)
    metadata = {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.add_space_prefix": flag(space_prefix(files, model, warnings)),
    }
    return pieces, metadata


def _with_added(
    pieces: dict[int, Piece], files: TokenizerFiles, *, raw_spaces: str | None
) -> dict[int, Piece]:
    """Return the pieces with the added tokens among them, typed as llama.cpp looks for them.

    Args:
        pieces: the vocabulary of the model proper, by number.
        files: which name the added tokens.
        raw_spaces: the character that stands for a space in pieces, which texts do not contain.
    """
    found = dict(pieces)
    for number, token in files.added.items():
        known = found.get(number)
        if known is not None and known.kind in {BYTE, UNKNOWN} and known.text == token.content:
            continue
        special = token.special or token.content in files.special
        shown = token.content
        if raw_spaces is not None and not special:
            shown = shown.replace(raw_spaces, " ")
        found[number] = Piece(shown, ADDED_SCORE, CONTROL if special else USER_DEFINED)
    # transformers makes every special token an added one, whether or not the list has it.
    for number, piece in found.items():
        if piece.kind == NORMAL and piece.text in files.special and number not in files.added:
            found[number] = Piece(piece.text, piece.score, CONTROL)
    return found


def _filled(
    pieces: dict[int, Piece], size: int, files: TokenizerFiles, warnings: list[str]
) -> list[Piece]:
    """Return one token per row of the embedding, holes and the rest filled with unused ones."""
    where = shown_path(files.directory)
    beyond = sorted(number for number in pieces if number >= size)
    if any(number not in files.added for number in beyond):
        raise DamagedError(
            f"{shown_path(files.tokenizer_path)} has the token number {beyond[-1]}, the embedding "
            f"only {size} rows",
            "the tokenizer files belong to another model; get both from one place",
        )
    if beyond:
        shown = ", ".join(printable(pieces[number].text) for number in beyond[:4])
        warnings.append(
            f"{len(beyond)} added tokens without a row in the embedding are left out: {shown}"
        )
    taken: dict[str, int] = {}
    for number, piece in sorted(pieces.items()):
        if number < size and taken.setdefault(piece.text, number) != number:
            raise DamagedError(
                f"{where}: tokens {taken[piece.text]} and {number} are both "
                f"'{printable(piece.text)}', and llama.cpp stops at such a file",
                "remove one of them from the added tokens",
            )
    tokens = []
    for number in range(size):
        filler = f"[PAD{number}]"
        while filler in taken:
            filler = f"[{filler}]"
        tokens.append(pieces.get(number, Piece(filler, 10 * ADDED_SCORE, UNUSED)))
    return tokens


def _token_warnings(files: TokenizerFiles) -> list[str]:
    trimming = [token.content for token in files.added.values() if token.trims]
    if not trimming:
        return []
    return [
        f"llama.cpp keeps the spaces beside {len(trimming)} added tokens such as "
        f"'{printable(trimming[0])}', which the model's tokenizer takes along (it takes those "
        "behind along in files whose name contains phi-3)"
    ]
