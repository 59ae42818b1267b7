"""Where calibration and evaluation text comes from: a name on the command line to rows of text.

    builtin                       text that every Python installation carries, works offline
    notes.txt                     one stream of text
    rows.jsonl | rows.parquet     one document or chat a row; `rows.jsonl:COLUMN` picks the column
    hf:ID[:SPLIT[:COLUMN]]        a hub dataset; `hf:OWNER/NAME/CONFIG` picks a configuration

Each may end in `:n=64`, the number of windows it gives.
"""

from __future__ import annotations

import json
import random
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qtool.calibration.builtin import builtin_pieces
from qtool.checkpoint.untrusted import is_bomb, printable, shown_path
from qtool.errors import DamagedError, HubError, UsageError
from qtool.recipe.schema import Dataset

FORMS = (
    "a dataset is builtin, FILE.txt, FILE.jsonl[:COLUMN], FILE.parquet[:COLUMN] or "
    "hf:ID[:SPLIT[:COLUMN]], each with an optional :n=WINDOWS"
)
CHAT_COLUMNS = ("messages", "conversations")
TEXT_COLUMN = "text"
JSON_LINES = 'a .jsonl file holds one object a line, such as {"text": "..."}'
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for what templates call roles
SHUFFLE_BUFFER = 2_000  # rows of a streamed dataset that are shuffled together

MAX_FILE_BYTES = 4 << 30
MAX_TEXT = 1 << 29  # characters of all rows of a parquet file together
MAX_LINE_BYTES = 64 << 20  # of a .jsonl file
CHECKED_BYTES = 128 << 20  # of a file that is looked through before anything else is done
ROWS_AT_ONCE = 64  # of a parquet file: a few compressed bytes may stand for long texts

_WINDOWS = re.compile(r":n=([^:]*)$")
_FILE = re.compile(r"(?P<path>.+\.(?P<kind>txt|jsonl|parquet))(?::(?P<column>[^:]+))?", re.I)
_HUB_ID = r"\w[\w.-]*(?:/\w[\w.-]*)?(?:/[^:\s/]+)?"  # no path: `datasets` would read one from here
_HUB = re.compile(rf"hf:(?P<id>{_HUB_ID})(?::(?P<split>[^:]+)(?::(?P<column>[^:]+))?)?")


@dataclass(frozen=True)
class DatasetSpec:
    """One source of text.

    Args:
        kind: builtin, file or hub.
        source: the path, or the hub id (`owner/name` or `owner/name/configuration`).
        split: of a hub dataset; "train" if not given. Of builtin: "calibration" or "evaluation".
        column: the column to read; None looks for a chat, then for `text`.
        windows: how many windows it gives; None for an even share of the rest.
    """

    kind: Literal["builtin", "file", "hub"]
    source: str = ""
    split: str | None = None
    column: str | None = None
    windows: int | None = None

    @property
    def name(self) -> str:
        """The dataset as the command line writes it, without its number of windows."""
        if self.kind == "builtin":
            return "builtin"
        if self.kind == "file":
            return f"{self.source}:{self.column}" if self.column else self.source
        parts = [f"hf:{self.source}", self.split or ("train" if self.column else None), self.column]
        return ":".join(part for part in parts if part)

    @property
    def is_stream(self) -> bool:
        """Whether it is one long text rather than rows."""
        return self.kind == "file" and self.source.lower().endswith(".txt")


@dataclass(frozen=True)
class Row:
    """A text, or a chat of {"role", "content"} messages; `place` is where it stands."""

    text: str
    messages: tuple[dict[str, str], ...] = ()
    place: str = ""


def parse_dataset(text: str) -> DatasetSpec:
    """Read a dataset as the command line writes it.

    Raises:
        UsageError: it is none of the forms, or `:n=` is not a positive number.
    """
    windows, rest = None, text.strip()
    counted = _WINDOWS.search(rest)
    if counted:
        if not (counted[1].isdecimal() and int(counted[1]) > 0):
            raise UsageError(f"dataset '{text}': ':n={counted[1]}' is not a number >= 1", FORMS)
        windows, rest = int(counted[1]), rest[: counted.start()]
    if rest == "builtin":
        return DatasetSpec("builtin", windows=windows)
    hub = _HUB.fullmatch(rest)
    if hub:
        return DatasetSpec("hub", hub["id"], hub["split"], hub["column"], windows)
    file = None if rest.startswith("hf:") else _FILE.fullmatch(rest)
    if file is None:
        raise UsageError(f"'{text}' is not a dataset", FORMS)
    if file["column"] and file["kind"].lower() == "txt":
        raise UsageError(f"dataset '{text}': a .txt file has no columns", FORMS)
    return DatasetSpec("file", file["path"], column=file["column"], windows=windows)


def from_recipe(entry: Dataset) -> DatasetSpec:
    """Return the source that a recipe's `calibration.datasets` entry names.

    Raises:
        UsageError: its `path` ends in none of .txt, .jsonl and .parquet, or a .txt has a column.
    """
    if entry.path is not None:
        if not re.search(r"\.(txt|jsonl|parquet)$", entry.path, re.IGNORECASE):
            raise UsageError(f"'{entry.path}' is not a dataset", FORMS)
        if entry.column and entry.path.lower().endswith(".txt"):
            raise UsageError(f"dataset '{entry.path}': a .txt file has no columns", FORMS)
        return DatasetSpec("file", entry.path, column=entry.column, windows=entry.windows)
    if entry.hf is not None:
        if not re.fullmatch(_HUB_ID, entry.hf):
            raise UsageError(f"'{entry.hf}' is not a dataset of the hub", FORMS)
        return DatasetSpec("hub", entry.hf, entry.split, entry.column, entry.windows)
    return DatasetSpec("builtin", windows=entry.windows)


def to_recipe(spec: DatasetSpec) -> dict[str, str | int]:
    """Return the recipe entry that names `spec`; the inverse of `from_recipe`."""
    key = {"builtin": "name", "file": "path", "hub": "hf"}[spec.kind]
    entry: dict[str, str | int | None] = {
        key: spec.source or "builtin",
        "split": spec.split if spec.kind == "hub" else None,
        "column": spec.column,
        "windows": spec.windows,
    }
    return {key: value for key, value in entry.items() if value is not None}


def read_rows(spec: DatasetSpec, seed: int | None) -> Iterator[Row]:
    """Yield the rows of `spec`, shuffled by `seed`; None keeps their order.

    A .txt file is one row. Rows may be empty; a file that has no rows at all is refused.

    Raises:
        UsageError: no such file, nothing in it, or no such column; names file and line.
        DamagedError: not UTF-8, not JSON or not parquet; names file and place.
        HubError: the hub dataset cannot be reached.
    """
    if spec.kind == "hub":
        yield from _hub_rows(spec, seed)
        return
    if spec.kind == "builtin":
        part: Any = spec.split or "calibration"
        for index, text in enumerate(builtin_pieces(part, seed)):
            yield Row(text, place=f"builtin[{index}]")
        return
    rows = list(_file_rows(spec))
    if seed is not None:
        random.Random(seed).shuffle(rows)  # noqa: S311 - a shuffle, not a secret
    yield from rows


def check_file(spec: DatasetSpec) -> None:
    """Read a dataset that is a file once, if it is not too long, and keep nothing of it.

    Raises:
        UsageError, DamagedError: as `read_rows`.
    """
    if spec.kind != "file":
        return
    path = Path(spec.source)
    _check_place(path)
    if spec.is_stream and path.stat().st_size > CHECKED_BYTES:
        return  # it is decoded as a whole
    size = 0
    for row in _file_rows(spec):
        size += len(row.text) + sum(len(m["content"]) for m in row.messages)
        if size > CHECKED_BYTES and spec.source.lower().endswith(".jsonl"):
            return  # a few bytes of parquet may stand for any length: read to its bound


def _file_rows(spec: DatasetSpec) -> Iterator[Row]:
    """Yield the rows of a file in their order, and refuse it at its end if it says nothing."""
    path = Path(spec.source)
    _check_place(path)
    read = {".txt": _text_row, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    written = False
    try:
        for row in read[path.suffix.lower()](path, spec.column):
            written = written or bool(row.text.strip() or row.messages)
            yield row
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(f"cannot read dataset '{path}': {why}", FORMS) from error
    if not written:
        raise UsageError(f"dataset '{path}' is empty", "give a file with text in it, or -d builtin")


def _check_place(path: Path) -> None:
    """Refuse what would block for ever, and more text than any calibration reads."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "not a valid path"
        raise UsageError(f"cannot read dataset '{shown_path(path)}': {why}", FORMS) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a file"
        raise UsageError(f"cannot read dataset '{shown_path(path)}': it is {kind}", FORMS)
    if found.st_size > MAX_FILE_BYTES:
        raise UsageError(
            f"dataset '{shown_path(path)}' has {found.st_size} bytes, more than the "
            f"{MAX_FILE_BYTES} qtool reads",
            "give a part of it: calibration needs some hundred thousand tokens",
        )


def _text_row(path: Path, _column: str | None) -> list[Row]:
    text = _decoded(path.read_bytes(), f"{path}")
    # What Python's own text mode does, so that tokens do not depend on who wrote the file.
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return [Row(text, place=str(path))]


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(
            f"{place}: not UTF-8 text, byte 0x{data[error.start]:02x} at offset {error.start}",
            "convert it first: iconv -f ENCODING -t utf-8 FILE",
        ) from error


def _jsonl_rows(path: Path, column: str | None) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            place = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise DamagedError(
                    f"{place}: a line of more than {MAX_LINE_BYTES} bytes", JSON_LINES
                )
            if not line.strip():
                continue
            if is_bomb(line):
                raise DamagedError(
                    f"{place}: a line of brackets and commas rather than of text", JSON_LINES
                )
            text = _decoded(line, place).removeprefix("\ufeff")
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DamagedError(f"{place}: not JSON: {error}", JSON_LINES) from error
            if not isinstance(record, dict):
                raise DamagedError(
                    f"{place}: a {type(record).__name__} where an object was expected", JSON_LINES
                )
            yield _row(record, column, place)


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    with path.open("rb") as file:  # a missing or forbidden file is an OSError of its own
        try:
            table = parquet.ParquetFile(file)
            wanted = [column] if column else [*CHAT_COLUMNS, TEXT_COLUMN]
            names = table.schema_arrow.names
            # With none of them there, the first record says so and nothing more is read.
            columns = [name for name in names if name in wanted] or None
            batches = table.iter_batches(ROWS_AT_ONCE, columns=columns)
            records = (record for batch in batches for record in batch.to_pylist())
            size = 0
            for number, record in enumerate(records, start=1):
                row = _row(record, column, f"{path}:{number}")
                size += len(row.text) + sum(len(m["content"]) for m in row.messages)
                if size > MAX_TEXT:
                    raise DamagedError(
                        f"{path}:{number}: the rows hold more than {MAX_TEXT} characters",
                        "give a part of it: calibration needs some hundred thousand tokens",
                    )
                yield row
        except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
            raise DamagedError(
                f"{path}: not a readable parquet file: {_first_line(error)}",
                "download or write it again",
            ) from error


def _row(record: Mapping[str, Any], column: str | None, place: str) -> Row:
    """Read one record: the named column, else a chat column, else `text`."""
    for key in (column,) if column else (*CHAT_COLUMNS, TEXT_COLUMN):
        value = record.get(key)
        if isinstance(value, list) and value:
            return Row("", tuple(_message(m, f"{place}: {key}") for m in value), place)
        if isinstance(value, str):
            return Row(_text(value, place), place=place)
        if key in record and value in (None, []) and (column or key == TEXT_COLUMN):
            return Row("", place=place)  # a null is an empty document, not a mistake
    wanted = f"no text or chat in column '{column}'" if column else "no column 'text' or 'messages'"
    raise UsageError(
        f"{place}: {wanted}",
        f"columns there: {printable(', '.join(map(str, record))) or 'none'}; choose one with "
        "FILE:COLUMN or hf:ID:SPLIT:COLUMN",
    )


def _text(text: str, place: str) -> str:
    """Return a text that is one; JSON can spell halves of characters, which no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DamagedError(
                f"{place}: holds half of a surrogate pair, which is no character",
                "correct the row",
            ) from error
    return text


def _message(message: Any, place: str) -> dict[str, str]:
    """Read {"role", "content"} or ShareGPT's {"from", "value"}."""
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            content = "".join(str(part.get("text") or "") for part in content)
        if content is None:
            content = ""  # a message that only calls a tool
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _text(ROLES.get(role, role), place), "content": _text(content, place)}
    raise UsageError(
        f"{place}: not a chat message",
        'a message is {"role": "user", "content": "..."} or {"from": "human", "value": "..."}',
    )


def _hub_rows(spec: DatasetSpec, seed: int | None) -> Iterator[Row]:
    import datasets
    from huggingface_hub import constants

    owner, *rest = spec.source.split("/", 2)
    repository = "/".join([owner, *rest[:1]])
    configuration = rest[1] if len(rest) > 1 else None
    if Path(repository).exists():  # which `datasets` would prefer
        raise UsageError(f"there is a '{repository}' here, too", "run from another directory")
    # Offline, only the cache of a full download can answer; otherwise fetch no more than is used.
    streaming = not constants.HF_HUB_OFFLINE
    with _hub_errors(spec):
        loaded: Any = datasets.load_dataset(
            repository, configuration, split=spec.split or "train", streaming=streaming
        )
        if seed is not None:
            buffer = {"buffer_size": SHUFFLE_BUFFER} if streaming else {}
            loaded = loaded.shuffle(seed=seed, **buffer)
        for index, record in enumerate(loaded):
            yield _row(record, spec.column, f"{spec.name}[{index}]")


@contextmanager
def _hub_errors(spec: DatasetSpec) -> Iterator[None]:
    """Turn what `datasets` and its transport raise into one line and an exit code."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors

    # The hub library of today stands on httpx2, that of yesterday on httpx: ask it which.
    transport_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        yield
    except DatasetNotFoundError as error:
        raise HubError(
            f"{spec.name}: no such dataset on the hub, or it is private or gated",
            "check the id; for a private or gated one set HF_TOKEN",
        ) from error
    except (ValueError, DatasetsError, RuntimeError) as error:  # split, configuration, script
        raise UsageError(
            f"{spec.name}: {_first_line(error)}",
            "name split and configuration: hf:OWNER/NAME/CONFIG:SPLIT",
        ) from error
    except (OSError, transport_error) as error:
        raise HubError(
            f"{spec.name}: cannot be reached: {_first_line(error)}",
            "check the network and HF_HUB_OFFLINE, or use -d builtin or a file",
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
