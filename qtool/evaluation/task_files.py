"""A person's own questions, one JSON object a line: multiple choice, or an answer to the letter.

    {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}
    {"prompt": "The capital of France is", "answer": ["Paris", "Paris, France"]}

The first kind has `choices`, and the answer is an index from 0, a letter or the text of one; the
second has none, and the answer is what greedy decoding must give. No torch.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qtool.checkpoint.untrusted import open_regular, printable, shown_path
from qtool.errors import DamagedError, UsageError

FORMS = (
    'a line is {"prompt": "...", "choices": ["...", "..."], "answer": 0} or '
    '{"prompt": "...", "answer": "..."}'
)
# What other data sets call the same; the first that is there counts.
PROMPT_KEYS = ("prompt", "question", "query", "input", "text", "ctx", "context")
CHOICE_KEYS = ("choices", "options", "endings", "candidates")
ANSWER_KEYS = (
    "answer", "answers", "gold", "label", "target", "targets", "answer_index", "answer_idx",
    "answerKey", "correct", "output",
)  # fmt: skip
STOP_KEY, CASE_KEY = "stop", "ignore_case"
DEFAULT_STOP = ("\n",)
LONGEST_LINE = 4 << 20  # bytes
MOST_ITEMS = 1_000_000
MOST_CHOICES = 1_000


@dataclass(frozen=True)
class ChoiceItem:
    """A question with `choices`, of which number `answer` is right; `place` is FILE:LINE."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    place: str


@dataclass(frozen=True)
class ExactItem:
    """A prompt that greedy decoding must go on from with one of `answers`.

    Args:
        prompt: what the model reads.
        answers: accepted texts; spaces around them do not count.
        stop: texts that end what the model says, as the end of text does.
        ignore_case: whether capitals count as small letters.
        place: FILE:LINE.
    """

    prompt: str
    answers: tuple[str, ...]
    stop: tuple[str, ...]
    ignore_case: bool
    place: str

    def folded(self, text: str) -> str:
        """Return a text as it is compared."""
        bare = text.strip()
        return bare.casefold() if self.ignore_case else bare


@dataclass(frozen=True)
class TaskFile:
    """Questions of one kind.

    Args:
        name: by which results and gates call it: the file's without its ending.
        path: as given.
        sha256: of the bytes.
        choices: the questions with choices, or none.
        exact: the others, or none.
    """

    name: str
    path: Path
    sha256: str
    choices: tuple[ChoiceItem, ...]
    exact: tuple[ExactItem, ...]

    def __len__(self) -> int:
        return len(self.choices) + len(self.exact)


def read_task_files(paths: Sequence[Path], limit: int | None = None) -> tuple[TaskFile, ...]:
    """Read several files, the first `limit` questions of each.

    Raises:
        UsageError, DamagedError: as `read_task_file`, or two files of one name.
    """
    found = tuple(read_task_file(path, limit) for path in paths)
    for index, file in enumerate(found):
        for other in found[:index]:
            if other.name == file.name:
                raise UsageError(
                    f"--task-file: {shown_path(other.path)} and {shown_path(file.path)} are both "
                    f"called {printable(file.name)}",
                    "results and gates tell them by that name: rename one",
                )
    return found


def read_task_file(path: Path, limit: int | None = None) -> TaskFile:
    """Read the first `limit` questions of a file; all of it is checked.

    Raises:
        UsageError: no file that can be read, nothing in it, or a line that is no question; names
            FILE:LINE.
        DamagedError: not UTF-8 or not JSON; names FILE:LINE.
    """
    if not path.exists():
        raise UsageError(f"--task-file: there is no file {shown_path(path)}", FORMS)
    digest = hashlib.sha256()
    choices: list[ChoiceItem] = []
    exact: list[ExactItem] = []
    try:
        file, _ = open_regular(path)
    except DamagedError as error:
        raise UsageError(f"--task-file: {error.message}", FORMS) from error
    with file:
        for place, line in _lines(file, shown_path(path)):
            digest.update(line)
            if not line.strip():
                continue
            item = _item(_record(line, place), place)
            if isinstance(item, ChoiceItem):
                choices.append(item)
            else:
                exact.append(item)
            if choices and exact:
                raise UsageError(
                    f"{place}: this question is of another kind than those before it",
                    "put questions with choices and those without into two files",
                )
            if max(len(choices), len(exact)) > MOST_ITEMS:
                raise UsageError(f"{place}: more than {MOST_ITEMS} questions", "split the file")
    if not choices and not exact:
        raise UsageError(f"--task-file: {shown_path(path)} has no questions in it", FORMS)
    sha256 = digest.hexdigest()
    return TaskFile(_name(path), path, sha256, tuple(choices[:limit]), tuple(exact[:limit]))


def _name(path: Path) -> str:
    """Return a file's name without its ending, in characters that a gate can be written with."""
    stem = path.stem or path.name
    return "".join(c if c.isprintable() and c not in " <>=:" else "_" for c in stem)[:100]


def _lines(file: BinaryIO, shown: str) -> Iterator[tuple[str, bytes]]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UsageError(
                f"{shown}:{number}: the line has more than {LONGEST_LINE >> 20} MiB",
                "a task file is JSON lines: one question a line",
            )
        yield f"{shown}:{number}", line


def _record(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DamagedError(
            f"{place}: not UTF-8 text, byte 0x{line[error.start]:02x} at offset {error.start} "
            "of the line",
            "convert it first: iconv -f ENCODING -t utf-8 FILE",
        ) from error
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{place}: not JSON: {printable(error)}", FORMS) from error
    if not isinstance(record, dict):
        raise UsageError(f"{place}: {_kind(record)} where an object was expected", FORMS)
    return record


def _item(record: Mapping[str, Any], place: str) -> ChoiceItem | ExactItem:
    prompt = _prompt(record, place)
    key = next((key for key in CHOICE_KEYS if record.get(key) is not None), None)
    answer_key = next((key for key in ANSWER_KEYS if record.get(key) is not None), None)
    if answer_key is None:
        raise UsageError(
            f"{place}: there is no answer, keys are: {printable(', '.join(record))}",
            f"call it {', '.join(ANSWER_KEYS[:5])}; {FORMS}",
        )
    if key is None:
        return _exact(record, prompt, answer_key, place)
    choices, labels = _choices(record[key], key, place)
    answer = _right_choice(record[answer_key], choices, labels, answer_key, place)
    return ChoiceItem(prompt, choices, answer, place)


def _prompt(record: Mapping[str, Any], place: str) -> str:
    key = next((key for key in PROMPT_KEYS if record.get(key) is not None), None)
    if key is None:
        raise UsageError(
            f"{place}: there is no prompt, keys are: {printable(', '.join(record))}",
            f"call it {', '.join(PROMPT_KEYS[:4])}; {FORMS}",
        )
    return _text(record[key], key, place)


def _text(value: Any, key: str, place: str) -> str:
    """Return a text, refusing lone surrogates, which no tokenizer takes."""
    if not isinstance(value, str):
        raise UsageError(f"{place}: '{key}' is {_kind(value)}, not a text", FORMS)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place}: '{key}' has half a character (a lone surrogate) at {error.start}", FORMS
        ) from error
    return value


def _choices(value: Any, key: str, place: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the texts of choices and what the file calls them, if it does."""
    labels: tuple[str, ...] = ()
    if isinstance(value, dict) and set(value) == {"text", "label"}:  # as ARC has them
        marks = value["label"]
        if not isinstance(marks, list) or not all(isinstance(mark, str) for mark in marks):
            raise UsageError(f"{place}: the labels of '{key}' are not a list of texts", FORMS)
        value, labels = value["text"], tuple(marks)
    elif isinstance(value, dict):  # {"A": "...", "B": "..."}
        value, labels = list(value.values()), tuple(map(str, value))
    if not isinstance(value, list):
        raise UsageError(f"{place}: '{key}' is {_kind(value)}, not a list of texts", FORMS)
    if not 2 <= len(value) <= MOST_CHOICES or (labels and len(labels) != len(value)):
        raise UsageError(
            f"{place}: '{key}' has {len(value)} choices{_labelled(labels)}, and needs 2 to "
            f"{MOST_CHOICES}",
            FORMS,
        )
    found = tuple(_text(one, key, place) for one in value)
    empty = next((index for index, one in enumerate(found) if not one.strip()), None)
    if empty is not None:
        raise UsageError(f"{place}: choice {empty} of '{key}' is empty", FORMS)
    if len(set(found)) < len(found):
        raise UsageError(f"{place}: '{key}' has the same choice twice", FORMS)
    return found, labels


def _labelled(labels: Sequence[str]) -> str:
    return f" and {len(labels)} labels" if labels else ""


def _right_choice(
    value: Any, choices: Sequence[str], labels: Sequence[str], key: str, place: str
) -> int:
    """Return the index of the right choice: given by number, text, label or letter."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(
            f"{place}: '{key}' is {_kind(value)}, not the number or the text of one choice", FORMS
        )
    if isinstance(value, int):
        if not 0 <= value < len(choices):
            raise UsageError(
                f"{place}: '{key}' is {printable(value)}, and choices are 0 to {len(choices) - 1}",
                "they are counted from 0",
            )
        return value
    if value in choices:  # before letters: where a choice is itself "B", that text is meant
        return list(choices).index(value)
    for names in (labels, string.ascii_uppercase[: len(choices)], string.ascii_lowercase):
        if value in names and value and list(names).index(value) < len(choices):
            return list(names).index(value)
    bare = value.strip()
    if bare.isascii() and bare.isdigit() and len(bare) < 5 and int(bare) < len(choices):
        return int(bare)
    raise UsageError(f"{place}: '{key}' is '{printable(value)}', which is no choice", FORMS)


def _exact(record: Mapping[str, Any], prompt: str, key: str, place: str) -> ExactItem:
    value = record[key]
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UsageError(f"{place}: '{key}' is an empty list", FORMS)
    plain = [str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]
    answers = tuple(dict.fromkeys(_text(one, key, place).strip() for one in plain))
    if not all(answers):
        raise UsageError(f"{place}: '{key}' is empty", FORMS)
    stop = record.get(STOP_KEY)
    marks = DEFAULT_STOP if stop is None else tuple(stop if isinstance(stop, list) else [stop])
    for mark in marks:
        if not _text(mark, STOP_KEY, place):
            raise UsageError(f"{place}: '{STOP_KEY}' is empty", FORMS)
        inside = next((answer for answer in answers if mark in answer), None)
        if inside is not None:
            raise UsageError(
                f"{place}: the answer '{printable(inside)}' contains '{printable(mark)}', which "
                "ends what the model says",
                f'give "{STOP_KEY}": ["..."] with another text, or [] for the end of text only',
            )
    fold = record.get(CASE_KEY, False)
    if not isinstance(fold, bool):
        raise UsageError(f"{place}: '{CASE_KEY}' is {_kind(fold)}, not true or false", FORMS)
    return ExactItem(prompt, answers, marks, fold, place)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    found = names.get(type(value), "a number")
    return "null" if value is None else found
