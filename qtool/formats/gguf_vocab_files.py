"""The tokenizer files of a model directory, read with bounds and checked as far as they are used.

Which file says what: https://huggingface.co/docs/transformers/main_classes/tokenizer
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.checkpoint.untrusted import (
    GET_AGAIN,
    open_regular,
    printable,
    read_json_object,
    shown_path,
)
from qtool.errors import DamagedError

MAX_TOKENIZER_BYTES = 256 << 20  # the largest in use, of 262,144 tokens, has 33 MB
MAX_SETTINGS_BYTES = 64 << 20
MAX_TEMPLATE_BYTES = 4 << 20
MOST_TEMPLATES = 64
MOST_TOKENS = 4 << 20
NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
DEFAULT_TEMPLATE = "default"


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text itself, before anything splits it.

    Args:
        content: as it stands in a text.
        special: whether it is a mark for the model, as opposed to an addition to the words.
        normalized: looked for in the normalized text instead of the text.
        trims: takes spaces beside it along, or only stands between words.
    """

    id: int
    content: str
    special: bool
    normalized: bool
    trims: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a directory say; an absent one says nothing.

    Args:
        tokenizer: tokenizer.json.
        tokenizer_path: where it is, for messages.
        added: every added token by its number.
        named: the text of `bos`, `eos` ... where a file names one.
        special: the texts of all tokens that a file calls special outside the list of added ones.
        settings: tokenizer_config.json.
        generation: generation_config.json.
        templates: chat templates by name.
    """

    directory: Path
    tokenizer: Mapping[str, Any]
    tokenizer_path: Path
    added: Mapping[int, AddedToken]
    named: Mapping[str, str]
    special: frozenset[str]
    settings: Mapping[str, Any]
    generation: Mapping[str, Any]
    templates: Mapping[str, str]


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read every tokenizer file of a directory but tokenizer.model.

    Raises:
        DamagedError: one of them is not what its name promises.
    """
    path = directory / "tokenizer.json"
    tokenizer = read_json_object(path, max_bytes=MAX_TOKENIZER_BYTES) if path.exists() else {}
    settings = _settings(directory, "tokenizer_config.json")
    sources = (settings, _settings(directory, "special_tokens_map.json"))
    named = _named(*sources)
    added: dict[int, AddedToken] = {}
    for token in _added(directory, tokenizer, settings):
        known = added.get(token.id)
        if known is None or (token.special and known.content == token.content):
            added[token.id] = token
    return TokenizerFiles(
        directory=directory,
        tokenizer=tokenizer,
        tokenizer_path=path,
        added=added,
        named=named,
        special=frozenset(named.values()) | _unnamed(*sources),
        settings=settings,
        generation=_settings(directory, "generation_config.json"),
        templates=_templates(directory, settings),
    )


def whole_number(value: object, where: str) -> int:
    """Return a token's number.

    Raises:
        DamagedError: it is none.
    """
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MOST_TOKENS:
        raise DamagedError(f"{where}: '{printable(value)}' is not a token's number", GET_AGAIN)
    return number


def token_text(value: object, where: str) -> str:
    """Return a token's text.

    Raises:
        DamagedError: it is none, or not one that UTF-8 can hold.
    """
    if not isinstance(value, str):
        raise DamagedError(f"{where} has a token that is not a string", GET_AGAIN)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DamagedError(f"{where}: a token is half a character", GET_AGAIN) from error
    return value


def _settings(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    return read_json_object(path, max_bytes=MAX_SETTINGS_BYTES) if path.exists() else {}


def _named(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> text of the special tokens, the first source that names one deciding."""
    found: dict[str, str] = {}
    for source in sources:
        for name in NAMED:
            content = _content(source.get(f"{name}_token"))
            if content is not None and name not in found:
                found[name] = content
    return found


def _unnamed(*sources: Mapping[str, Any]) -> frozenset[str]:
    """Return the texts of the special tokens that have no name, or one of the model's own."""
    found: set[str] = set()
    for source in sources:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = source.get(key)
            listed = value.values() if isinstance(value, dict) else value
            if isinstance(listed, Iterable) and not isinstance(listed, str):
                found.update(filter(None, map(_content, listed)))
    return frozenset(found)


def _content(value: object) -> str | None:
    """Return the text of a token that is written as one, or as an object with flags."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _added(
    directory: Path, tokenizer: Mapping[str, Any], settings: Mapping[str, Any]
) -> Iterator[AddedToken]:
    """Yield added tokens from every file that lists some, the most trusted first."""
    where = shown_path(directory / "tokenizer.json")
    listed = tokenizer.get("added_tokens") or []
    if not isinstance(listed, list):
        raise DamagedError(f"{where}: 'added_tokens' is not a list", GET_AGAIN)
    for item in listed:
        yield _added_token(item.get("id") if isinstance(item, dict) else None, item, where)
    where = shown_path(directory / "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise DamagedError(f"{where}: 'added_tokens_decoder' is not an object", GET_AGAIN)
    for number, item in decoder.items():
        yield _added_token(number, item, where)
    where = shown_path(directory / "added_tokens.json")
    for content, number in _settings(directory, "added_tokens.json").items():
        yield _added_token(number, {"content": content}, where)


def _added_token(number: object, item: object, where: str) -> AddedToken:
    if not isinstance(item, dict):
        raise DamagedError(f"{where} has an added token that is not an object", GET_AGAIN)
    return AddedToken(
        id=whole_number(number, where),
        content=token_text(item.get("content"), where),
        special=item.get("special") is True,
        normalized=item.get("normalized") is True,
        trims=any(item.get(key) is True for key in ("lstrip", "rstrip", "single_word")),
    )


def _templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; files of their own go before the settings."""
    path = directory / "chat_template.jinja"
    if path.exists():
        found = {DEFAULT_TEMPLATE: _text(path)}
        extra = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        if len(extra) > MOST_TEMPLATES:
            raise DamagedError(
                f"{shown_path(directory)} has {len(extra)} chat templates", GET_AGAIN
            )
        return found | {file.stem: _text(file) for file in extra}
    source = settings.get("chat_template")
    if source is None:
        source = _settings(directory, "chat_template.json").get("chat_template")
    if source is None:
        return {}
    where = shown_path(directory / "tokenizer_config.json")
    if isinstance(source, str):
        return {DEFAULT_TEMPLATE: token_text(source, where)}
    if isinstance(source, list):
        named = [item for item in source if isinstance(item, dict)]
        return {
            token_text(item.get("name"), where): token_text(item.get("template"), where)
            for item in named
        }
    raise DamagedError(f"{where}: 'chat_template' is neither text nor a list", GET_AGAIN)


def _text(path: Path) -> str:
    file, size = open_regular(path)
    with file:
        if size > MAX_TEMPLATE_BYTES:
            raise DamagedError(f"{shown_path(path)} has {size} bytes: not a template", GET_AGAIN)
        try:
            return file.read(MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise DamagedError(
                f"{shown_path(path)} is not UTF-8 at byte {error.start}", GET_AGAIN
            ) from error
