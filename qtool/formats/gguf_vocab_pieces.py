"""The pieces and scores of a SentencePiece-like tokenizer, from tokenizer.model or tokenizer.json.

llama.cpp joins neighbours whose union is a token, the best score first. The merges of a
tokenizer.json that was converted from SentencePiece say the same: a token's score is how early the
first merge makes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import UnsupportedError
from qtool.formats.gguf_pretokenizers import flattened
from qtool.formats.gguf_vocab_files import TokenizerFiles
from qtool.formats.gguf_vocab_merges import Merges
from qtool.formats.gguf_vocab_sentencepiece import (
    BYTE,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    read_sentencepiece,
)

SPACE = "▁"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def pieces_of(
    files: TokenizerFiles, listed: Mapping[int, str], merges: Merges | None, warnings: list[str]
) -> tuple[dict[int, Piece], SentencePieceModel | None]:
    """Return the pieces by number, and the tokenizer.model where it was one that could be used.

    Args:
        files: of the model.
        listed: number -> token of tokenizer.json; empty where there is none.
        merges: of tokenizer.json.
        warnings: to be added to.

    Raises:
        UnsupportedError: it is not BPE, or has no tokens for single bytes.
        DamagedError: tokenizer.model is not one.
    """
    path = files.directory / "tokenizer.model"
    model = read_sentencepiece(path) if path.exists() else None
    if model is not None and not listed and model.kind != "bpe":
        raise UnsupportedError(
            f"{shown_path(path)} is a {model.kind} model, which llama.cpp's tokenizer 'llama' is "
            "not",
            "only BPE tokenizers can be converted",
        )
    if model is not None and not _agrees(model, listed, files):
        warnings.append("tokenizer.model is of another vocabulary than tokenizer.json: not used")
        model = None
    if model is not None:
        if model.normalizes or model.squeezes:
            warnings.append("llama.cpp does not normalize text as tokenizer.model says")
        pieces = {
            number: Piece(
                piece.text.replace(SPACE, " ") if piece.kind == USER_DEFINED else piece.text,
                piece.score,
                piece.kind,
            )
            for number, piece in enumerate(model.pieces)
        }
    else:
        pieces = _from_merges(files, listed, merges or Merges(()), warnings)
    if sum(piece.kind == BYTE for piece in pieces.values()) != 256:
        raise UnsupportedError(
            f"{shown_path(files.directory)}: the tokenizer lacks tokens for single bytes, which "
            "llama.cpp needs",
            "this model cannot be written as GGUF",
        )
    return pieces, model


def _agrees(model: SentencePieceModel, listed: Mapping[int, str], files: TokenizerFiles) -> bool:
    """Return whether both files give the same numbers to the same tokens."""
    if not listed:
        return True
    texts = dict(enumerate(piece.text for piece in model.pieces))
    return model.kind == "bpe" and all(
        texts.get(number) == token for number, token in listed.items() if number not in files.added
    )


def _from_merges(
    files: TokenizerFiles, listed: Mapping[int, str], merges: Merges, warnings: list[str]
) -> dict[int, Piece]:
    unknown = files.tokenizer["model"].get("unk_token")
    outside = {token.content for token in files.added.values()}
    words = {
        token
        for number, token in listed.items()
        if number not in files.added and not _BYTE_TOKEN.fullmatch(token)
    }
    loose = merges.incomplete(words - outside)
    if loose:
        warnings.append(
            f"{loose} tokens can be joined from parts that are no merge of tokenizer.json; "
            "llama.cpp joins them all the same"
        )
    last = float(-len(merges.pairs))
    pieces = {}
    for number, token in listed.items():
        kind = NORMAL
        if _BYTE_TOKEN.fullmatch(token):
            kind = BYTE
        elif token == unknown:
            kind = UNKNOWN
        rank = merges.ranks.get(token)
        pieces[number] = Piece(token, last if rank is None else float(-rank), kind)
    return pieces


def space_prefix(
    files: TokenizerFiles, model: SentencePieceModel | None, warnings: list[str]
) -> bool:
    """Return whether a text gets a space before it, as tokenizer.json or else the model says.

    Raises:
        UnsupportedError: tokenizer.json does something that llama.cpp does not.
    """
    if not files.tokenizer:
        return model is not None and model.prefix
    where = shown_path(files.tokenizer_path)
    prefix, escaped = _normalizers(files, where, warnings)
    for step in flattened(files.tokenizer.get("pre_tokenizer"), "pretokenizers", where):
        if step.get("type") == "Metaspace" and step.get("replacement") == SPACE:
            escaped = True
            prefix = prefix or _metaspace(files, step, warnings)
        elif not (escaped and step.get("pattern") == {"String": " "}):  # finds no space any more
            raise _unknown(where, step)
    if not escaped:
        raise UnsupportedError(
            f"{where} does not write spaces as '{SPACE}', as llama.cpp's tokenizer 'llama' does",
            "this model cannot be written as GGUF",
        )
    late = [token.content for token in files.added.values() if token.normalized]
    if prefix and late:
        warnings.append(
            f"{len(late)} added tokens such as '{printable(late[0])}' are looked for after a space "
            "is put before the text; llama.cpp looks for them in the text"
        )
    return prefix


def _normalizers(files: TokenizerFiles, where: str, warnings: list[str]) -> tuple[bool, bool]:
    """Return whether the normalizers put a space before a text, and escape spaces."""
    prefix = escaped = False
    for step in flattened(files.tokenizer.get("normalizer"), "normalizers", where):
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and _escapes_spaces(step):
            escaped = True
        elif kind in {"NFKC", "NFD", "NFKD", "Precompiled"}:
            warnings.append(f"llama.cpp does not rewrite text with {kind} as tokenizer.json says")
        elif kind != "NFC":
            raise _unknown(where, step)
    return prefix, escaped


def _metaspace(files: TokenizerFiles, step: Mapping[str, object], warnings: list[str]) -> bool:
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    if step.get("split", True):
        inner = [token for token in files.tokenizer["model"]["vocab"] if SPACE in token[1:]]
        if inner:
            warnings.append(
                f"{len(inner)} tokens with a space inside, which this tokenizer never makes, "
                "can come from llama.cpp"
            )
    if scheme == "first" and files.templates:
        # What a chat template writes begins with a mark, and behind one there is no space.
        warnings.append(
            "llama.cpp will not put a space before a text without chat template, as the model's "
            "tokenizer does"
        )
        return False
    if scheme == "first":
        warnings.append(
            "llama.cpp puts a space before the text after every special token, the model's "
            "tokenizer only at the very beginning"
        )
    if scheme != "never":
        warnings.append(
            "llama.cpp puts a space before a text that begins with one, the model's tokenizer not"
        )
    return scheme != "never"


def _escapes_spaces(step: Mapping[str, object]) -> bool:
    return step.get("pattern") == {"String": " "} and step.get("content") == SPACE


def _unknown(where: str, step: Mapping[str, object]) -> UnsupportedError:
    return UnsupportedError(
        f"{where} has the step {printable(dict(step))}, which llama.cpp's tokenizer 'llama' does "
        "not do",
        "this model cannot be written as GGUF",
    )
