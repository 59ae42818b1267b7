"""Windows of token ids, all of one length and without padding, from calibration datasets.

A text file is tokenized as one stream, cut into consecutive windows, and a seeded choice of them
is used. Rows are shuffled by the seed and joined, with the end-of-text token between documents if
there is one; chats that went through the chat template mark their own ends. They are cut likewise,
and only as many rows are tokenized as needed.

If the tokenizer starts a text with a BOS token by default (Llama 3, Gemma), the first token of
every window is replaced by it: such models park large activations there, and without it every
statistic is that of a text they never see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from qtool.calibration.datasets import DatasetSpec, Row, read_rows
from qtool.checkpoint.chat_sandbox import MAX_SECONDS, Conversation, render_all
from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UsageError

ChatTemplate = Literal["auto", "on", "off"]

# Tokens of one call are those of the whole text; only longer texts are cut, at a line end, because
# a call holds about a hundred bytes a token.
LONGEST_CALL = 8_000_000  # characters
EVALUATION_CALL = 1_000_000  # characters of rows that are joined, so that `limit` stops early
BATCH = 32  # rows tokenized together
TEMPLATE_DATE = "26 Jul 2024"
TEMPLATE_ROOM = 1 << 16  # characters that a template may add to a chat
CHARACTERS_PER_SECOND = 1_000_000  # that the slowest honest template still writes


@dataclass(frozen=True)
class DatasetSource:
    """What one dataset gave: its name, the SHA-256 of its token ids, its number of windows."""

    name: str
    sha256: str
    windows: int


@dataclass(frozen=True)
class Windows:
    """Token ids to run a model on.

    Args:
        ids: [n, length] int64, no padding; not to be modified.
        sources: one for each dataset, in the order of the windows.
        sha256: over all ids, as little-endian 64-bit integers.
        warnings: one line each.
    """

    ids: Tensor
    sources: tuple[DatasetSource, ...]
    sha256: str
    warnings: tuple[str, ...] = ()


def token_windows(
    tokenizer: Any,
    specs: list[DatasetSpec],
    *,
    windows: int,
    length: int,
    seed: int,
    chat_template: ChatTemplate = "auto",
) -> Windows:
    """Draw `windows` calibration windows of `length` tokens from `specs`, the same for one seed.

    A spec with `windows` gives that many, the others share the rest evenly. Windows that do not
    exist are missing from the result, and a warning says so.

    Args:
        tokenizer: a transformers tokenizer.
        specs: one or more.
        windows: how many in all; ignored if every spec names its own number.
        length: tokens of a window, >= 2.
        seed: shuffles rows and chooses windows.
        chat_template: for rows that are chats. auto: the tokenizer's template if it has one;
            on: the same, but a tokenizer without one is refused; off: the bare messages.

    Raises:
        UsageError: less than one window in all, a template that is missing or refuses a row, or
            numbers that do not add up.
        DamagedError, HubError: as `read_rows`.
    """
    _check(length, "window length", 2)
    templated = _templated(tokenizer, chat_template)
    parts, found, warnings = [], [], []
    for spec, count in zip(specs, shares(specs, windows), strict=True):
        if spec.is_stream:
            stream = _stream(tokenizer, read_rows(spec, None), limit=None)
            available = _cut(stream, length)
            generator = torch.Generator().manual_seed(seed)
            chosen = available[torch.randperm(len(available), generator=generator)[:count]]
        else:
            stream = _joined(tokenizer, read_rows(spec, seed), count * length, templated)
            chosen = _cut(stream, length)[:count]
        parts.append(_with_bos(tokenizer, chosen))
        found.append(len(stream))
        if len(chosen) < count:
            warnings.append(
                f"{spec.name} holds {len(stream)} tokens: {len(chosen)} of the {count} windows "
                f"of {length} tokens asked for"
            )
    return _result(specs, parts, found, length, tuple(warnings))


def evaluation_windows(
    tokenizer: Any, spec: DatasetSpec, *, length: int, limit: int | None = None
) -> Windows:
    """Return the first `limit` consecutive windows of `length` tokens, in file order.

    Rows are joined by blank lines, as perplexity on WikiText is usually measured. `builtin` gives
    the text that calibration never sees.

    Args:
        tokenizer: a transformers tokenizer.
        spec: where the text comes from; its own number of windows counts if `limit` is None.
        length: tokens of a window, >= 2.
        limit: most windows to return; None for all.

    Raises:
        UsageError: less than one window.
        DamagedError, HubError: as `read_rows`.
    """
    _check(length, "window length", 2)
    limit = spec.windows if limit is None else limit
    if limit is not None:
        _check(limit, "number of windows", 1)
    if spec.kind == "builtin":
        spec = replace(spec, split="evaluation")
    needed = None if limit is None else limit * length
    rows = read_rows(spec, None)
    stream = _stream(tokenizer, rows, needed)
    windows = _with_bos(tokenizer, _cut(stream, length)[:limit])
    return _result([spec], [windows], [len(stream)], length, ())


def shares(specs: list[DatasetSpec], windows: int) -> list[int]:
    """Return how many windows each spec gives: its own number, or an even share of the rest.

    Raises:
        UsageError: no spec, or nothing is left for the specs without a number.
    """
    if not specs:
        raise UsageError("no calibration dataset", "give one: -d builtin")
    _check(windows, "number of windows", 1)
    open_specs = sum(spec.windows is None for spec in specs)
    rest = windows - sum(spec.windows or 0 for spec in specs)
    if open_specs and rest < open_specs:
        raise UsageError(
            f"{windows} windows leave {max(rest, 0)} for {open_specs} datasets without ':n='",
            "raise the number of windows (-n) or lower the ':n=' of the others",
        )
    even, extra = divmod(rest, open_specs) if open_specs else (0, 0)
    result = []
    for spec in specs:
        if spec.windows is not None:
            result.append(spec.windows)
        else:
            result.append(even + (extra > 0))
            extra -= 1
    return result


def _check(value: int, what: str, least: int) -> None:
    if value < least:
        raise UsageError(f"{what} is {value}", f"it must be at least {least}")


def _templated(tokenizer: Any, chat_template: ChatTemplate) -> bool:
    """Whether chats go through the tokenizer's template."""
    if chat_template == "on" and not tokenizer.chat_template:
        raise UsageError(
            "the tokenizer has no chat template", "use --chat-template auto or off for this model"
        )
    return chat_template != "off" and bool(tokenizer.chat_template)


def _rendered(tokenizer: Any, rows: list[Row], templated: bool) -> list[str]:
    """Return the text of rows; chats as the template writes them, or as bare messages.

    The template is a stranger's program: it runs in a process of its own, with limits.
    """
    chats = [row for row in rows if row.messages]
    if not chats or not templated:
        return [_bare(row) for row in rows]
    conversations = [
        Conversation(tuple((m["role"], m["content"]) for m in row.messages), generation=False)
        for row in chats
    ]
    written = sum(len(content) for one in conversations for _, content in one.messages)
    template: str = tokenizer.get_chat_template()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    # The day is that of Llama 3's own templates: the same data are the same tokens every day.
    found = render_all(
        template,
        special,
        conversations,
        date=TEMPLATE_DATE,
        seconds=MAX_SECONDS + written / CHARACTERS_PER_SECOND,
        longest=TEMPLATE_ROOM + 8 * written,
    )
    texts = dict(zip((row.place for row in chats), found, strict=True))
    for place, rendering in texts.items():
        if rendering.text is None:
            raise UsageError(
                f"{place}: the model's chat template refuses this chat: "
                f"{printable(rendering.reason)}",
                "correct the row, or use --chat-template off",
            )
    return [texts[row.place].text or "" if row.messages else row.text for row in rows]


def _bare(row: Row) -> str:
    return row.text or "\n\n".join(message["content"] for message in row.messages)


class _Panics:
    """Turns what a library in Rust raises into a RuntimeError.

    Where it gives up that is no Exception; where it refuses, one of no kind of its own.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        panic = kind is not None and kind.__name__ == "PanicException"  # it cannot be imported
        if panic or kind is Exception:
            raise RuntimeError(str(error))


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: windows are cut afterwards, a text longer than the model's context is no fault.
    faults = (TypeError, ValueError, LookupError, RuntimeError, AttributeError, OverflowError)
    try:
        with _Panics():
            batch = tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
        ids: list[list[int]] = batch["input_ids"]
    except faults as error:
        where = printable(getattr(tokenizer, "name_or_path", "") or "the model")
        raise DamagedError(
            f"the tokenizer of {where} fails on the text: {printable(error)}",
            "compare its tokenizer files with the original model's",
        ) from error
    return ids


def _encoded(tokenizer: Any, texts: list[str], needed: int) -> Iterable[list[int]]:
    """Return the ids of texts; of those too long for one call, no more than about `needed`."""
    if sum(map(len, texts)) <= LONGEST_CALL:
        return _encode(tokenizer, texts)
    return (_stream(tokenizer, iter([Row(text)]), needed).tolist() for text in texts)


def _joined(tokenizer: Any, rows: Iterator[Row], needed: int, templated: bool) -> Tensor:
    """Tokenize shuffled rows, one document after the other, until `needed` tokens exist."""
    stream: list[int] = []
    end = tokenizer.eos_token_id
    while len(stream) < needed and (batch := list(islice(rows, BATCH))):
        texts = _rendered(tokenizer, batch, templated)
        for row, ids in zip(batch, _encoded(tokenizer, texts, needed), strict=True):
            stream += ids
            if ids and end is not None and not (templated and row.messages):
                stream.append(end)
    return torch.tensor(stream, dtype=torch.int64)


def _stream(tokenizer: Any, rows: Iterator[Row], limit: int | None) -> Tensor:
    """Tokenize rows as one text, blank lines between them, until `limit` tokens exist."""
    parts, count = [torch.empty(0, dtype=torch.int64)], 0
    templated = bool(tokenizer.chat_template)
    for piece in _pieces(_texts(tokenizer, rows, templated)):
        parts.append(torch.tensor(_encode(tokenizer, [piece])[0], dtype=torch.int64))
        count += len(parts[-1])
        if limit is not None and count >= limit:
            break
    return torch.cat(parts)


def _texts(tokenizer: Any, rows: Iterator[Row], templated: bool) -> Iterator[str]:
    """Yield the texts of rows, as many chats at a time as go through the template together."""
    while batch := list(islice(rows, BATCH)):
        yield from _rendered(tokenizer, batch, templated)


def _pieces(texts: Iterator[str]) -> Iterator[str]:
    """Join texts with blank lines into pieces that one tokenizer call can hold."""
    waiting: list[str] = []
    size = 0
    for index, text in enumerate(texts):
        rest = f"\n\n{text}" if index else text
        while len(rest) > LONGEST_CALL:
            cut = rest.rfind("\n", 0, LONGEST_CALL) + 1 or LONGEST_CALL
            yield "".join([*waiting, rest[:cut]])
            rest, waiting, size = rest[cut:], [], 0
        waiting.append(rest)
        size += len(rest)
        if size > EVALUATION_CALL:
            yield "".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield "".join(waiting)


def _cut(stream: Tensor, length: int) -> Tensor:
    """Return the consecutive windows [n, length] of a stream of ids [T]; a remainder is dropped."""
    return stream[: len(stream) // length * length].view(-1, length)


def _with_bos(tokenizer: Any, windows: Tensor) -> Tensor:
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return windows
    started = windows.clone()
    started[:, 0] = bos
    return started


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _result(
    specs: list[DatasetSpec],
    parts: list[Tensor],
    found: list[int],
    length: int,
    warnings: tuple[str, ...],
) -> Windows:
    ids = torch.cat(parts).contiguous()
    if not len(ids):
        counted = ", ".join(
            f"{spec.name} holds {n} token{'' if n == 1 else 's'}"
            for spec, n in zip(specs, found, strict=True)
        )
        raise UsageError(
            f"{counted}: not one window of {length}",
            "give a longer text or a smaller window length (-l), or use -d builtin",
        )
    sources = tuple(
        DatasetSource(spec.name, _digest(part), len(part))
        for spec, part in zip(specs, parts, strict=True)
    )
    return Windows(ids, sources, _digest(ids), warnings)
