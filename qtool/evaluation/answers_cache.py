"""What a model answered to tasks, on disk: a run that was interrupted goes on where it was.

    DIR/KEY/answers.jsonl   a line for each answer: a checksum, then JSON

KEY stands for the model, see `cache_directory`. A line says what was asked by its hash alone, so it
serves every task that asks the same, whatever else is asked with it. Lines that are not what was
written count as absent, so a file may end anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qtool.checkpoint.untrusted import open_regular
from qtool.errors import DamagedError
from qtool.evaluation.cache_directory import NAME_LENGTH, cache_folder, write_error
from qtool.evaluation.continuations import Answer, Request, TaskRunner, Tokens

T = TypeVar("T")
LAYOUT = 1
ANSWERS_FILE = "answers.jsonl"
CHECKSUM_LENGTH = 16
LONGEST_LINE = 4 << 20  # bytes
MOST_TOKENS = 1 << 32  # ids are below that


class CachedTasks:
    """A model that answers tasks, and asks itself only what it has not answered before.

    Args:
        runner: the model.
        directory: of all caches; made if need be.
        key: what decides the answers beside what is asked; JSON values.
        tokens_at_once: answers are kept after about so many tokens that the model read.
        check: refuses to keep more where the model is not the one of the key any more.

    Raises:
        UsageError, CapacityError: the directory cannot be written.
    """

    def __init__(
        self,
        runner: TaskRunner,
        directory: Path,
        key: Mapping[str, Any],
        tokens_at_once: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner, self._tokens_at_once, self._check = runner, tokens_at_once, check
        folder = cache_folder(directory, {**key, "layout": LAYOUT, "kind": "answers"})
        self._path = folder / ANSWERS_FILE

    @property
    def longest(self) -> int:
        """Most tokens that the model was made to read."""
        return self._runner.longest

    def close(self) -> None:
        """Free the model."""
        self._runner.close()

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests, those that are new in as many runs as keep little at stake.

        Raises:
            UsageError, CapacityError: the directory cannot be written.
            QtoolError: as the model itself.
        """
        names = [_hashed("score", r.context, r.continuation) for r in requests]
        by_name = dict(zip(names, requests, strict=True))
        answers = {
            name: answer
            for name, entry in self._found(by_name)
            if (answer := _answer(entry, by_name[name])) is not None
        }
        missing = sorted(set(by_name) - answers.keys(), key=lambda name: by_name[name].read)
        for part in self._parts(missing, lambda name: len(by_name[name].read)):
            new = self._runner.score([by_name[name] for name in part])
            answers.update(zip(part, new, strict=True))
            self._keep(
                {"ask": name, "p": answer.log_probability, "tokens": answer.greedy}
                for name, answer in zip(part, new, strict=True)
            )
        return [answers[name] for name in names]

    def generate(
        self, prompts: Sequence[Tokens], most: Sequence[int], ended: Callable[[int, Tokens], bool]
    ) -> list[Tokens]:
        """Go on greedily from prompts, where what was written before does not tell.

        Raises:
            UsageError, CapacityError: the directory cannot be written.
            QtoolError: as the model itself.
        """
        names = [_hashed("generate", prompt) for prompt in prompts]
        known: dict[str, Tokens] = {}
        for name, entry in self._found(set(names)):
            made = _tokens(entry)
            if made is not None and len(made) >= len(known.get(name, ())):
                known[name] = made
        found: dict[int, Tokens] = {}
        for index, name in enumerate(names):
            made = _as_far(known.get(name, ()), most[index], lambda t, i=index: ended(i, t))  # type: ignore[misc]
            if made is not None:
                found[index] = made
        missing = sorted(
            set(range(len(prompts))) - found.keys(), key=lambda index: (len(prompts[index]), index)
        )
        for part in self._parts(missing, lambda index: len(prompts[index]) + most[index]):
            new = self._runner.generate(
                [prompts[index] for index in part],
                [most[index] for index in part],
                lambda number, made, part=part: ended(part[number], made),  # type: ignore[misc]
            )
            found.update(zip(part, new, strict=True))
            self._keep(
                {"ask": names[index], "tokens": made} for index, made in zip(part, new, strict=True)
            )
        return [found[index] for index in range(len(prompts))]

    def _parts(self, items: Sequence[T], tokens: Callable[[T], int]) -> Iterator[list[T]]:
        part: list[T] = []
        read = 0
        for item in items:
            part.append(item)
            read += tokens(item)
            if read >= self._tokens_at_once:
                yield part
                part, read = [], 0
        if part:
            yield part

    def _found(self, wanted: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield what the file says about some questions."""
        names = frozenset(wanted)
        try:
            file, _ = open_regular(self._path)
        except (OSError, DamagedError):
            return
        with file:
            while line := file.readline(LONGEST_LINE):
                entry = _read(line)
                if entry is not None and entry.get("ask") in names:
                    yield entry["ask"], entry

    def _keep(self, entries: Iterable[Mapping[str, Any]]) -> None:
        content = b"".join(map(_line, entries))
        self._check()
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(self._path, flags, 0o666), "ab") as file:
                # What a killed process began is ended, so that it spoils one line and not two.
                file.write(b"\n" + content)
        except OSError as error:
            raise write_error(self._path, error) from error


def _hashed(kind: str, *texts: Tokens) -> str:
    digest = hashlib.sha256(kind.encode())
    for text in texts:
        digest.update(struct.pack(f"<Q{len(text)}Q", len(text), *text))
    return digest.hexdigest()[:NAME_LENGTH]


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return _checksum(text) + b" " + text + b"\n"


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:CHECKSUM_LENGTH].encode()


def _read(line: bytes) -> Mapping[str, Any] | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not text or checksum != _checksum(text):
        return None
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("ask"), str) else None


def _tokens(entry: Mapping[str, Any]) -> Tokens | None:
    found = entry.get("tokens")
    if not isinstance(found, list):
        return None
    good = all(type(token) is int and 0 <= token < MOST_TOKENS for token in found)
    return tuple(found) if good else None


def _answer(entry: Mapping[str, Any], request: Request) -> Answer | None:
    probability, greedy = entry.get("p"), _tokens(entry)
    if not isinstance(probability, float) or not math.isfinite(probability):
        return None
    if greedy is None or len(greedy) != len(request.continuation):
        return None
    return Answer(probability, greedy)


def _as_far(made: Tokens, most: int, ended: Callable[[Tokens], bool]) -> Tokens | None:
    """Return what is wanted of tokens that were written earlier; None if they are too few."""
    for count in range(1, min(len(made), most) + 1):
        if ended(made[:count]):
            return made[:count]
    return made[:most] if len(made) >= most else None
