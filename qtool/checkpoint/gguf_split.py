"""A model in several GGUF files: their names, and reading all of them from the name of any.

The first part carries the metadata, the others only the three `split.*` keys, as llama.cpp
(b11549) writes and loads them.
"""

from __future__ import annotations

import re
from pathlib import Path

from qtool.checkpoint.gguf_header import GgufContents, read_gguf
from qtool.checkpoint.header import refuse_link_out
from qtool.checkpoint.untrusted import GET_AGAIN, printable, shown_path
from qtool.errors import DamagedError

SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_PARTS = 65535  # `split.count` has 16 bits
_PART_NAME = re.compile(r"(?P<stem>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def part_name(stem: str, number: int, count: int) -> str:
    """Return the file name of a part, counted from 1, as llama.cpp looks for it."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def model_stem(file: str) -> str:
    """Return a file's name without the number of a part and without `.gguf`."""
    match = _PART_NAME.fullmatch(file)
    return match["stem"] if match else file.removesuffix(".gguf")


def read_gguf_split(path: Path) -> tuple[GgufContents, ...]:
    """Read a GGUF file and, where it is one part of a model, the other parts beside it, in order.

    Raises:
        DamagedError: as `read_gguf`; or a part is missing or a link to somewhere else, or the parts
            contradict each other.
        UnsupportedError: as `read_gguf`.
    """
    found = read_gguf(path)
    count = _number(found, SPLIT_COUNT) if SPLIT_COUNT in found.metadata else 1
    if count <= 1:
        return (found,)
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise DamagedError(
            f"{shown_path(path)} is one of {count} parts by its {SPLIT_COUNT}, but not by its name",
            f"give the parts their names back: NAME-00001-of-{count:05d}.gguf and so on",
        )
    paths = [path.with_name(part_name(match["stem"], i, count)) for i in range(1, count + 1)]
    for part in paths:
        if not part.exists():
            raise DamagedError(
                f"{shown_path(part)} is missing, one of {count} parts",
                "download the missing part into the same directory",
            )
        if part != path:
            refuse_link_out(part, path.parent)
    parts = tuple(found if part == path else read_gguf(part) for part in paths)
    _check_parts(parts)
    return parts


def _number(contents: GgufContents, key: str) -> int:
    value = contents.metadata.get(key)
    number = None if value is None else value.content
    if type(number) is not int or number < 0:
        shown = "missing" if value is None else printable(number)
        raise DamagedError(
            f"{shown_path(contents.path)}: key '{key}' is {shown}, not a number", GET_AGAIN
        )
    return number


def _check_parts(parts: tuple[GgufContents, ...]) -> None:
    """Hold the parts against each other: their numbers, their tensors' names and how many."""
    places: dict[str, Path] = {}
    for i, part in enumerate(parts):
        shown = shown_path(part.path)
        if _number(part, SPLIT_COUNT) != len(parts):
            raise DamagedError(
                f"{shown} says that it is one of {_number(part, SPLIT_COUNT)} parts, the others "
                f"of {len(parts)}",
                "the parts are of different models: download them again",
            )
        if _number(part, SPLIT_NUMBER) != i:
            raise DamagedError(
                f"{shown} has the {SPLIT_NUMBER} {_number(part, SPLIT_NUMBER)}, not {i} as its "
                "name says",
                "the parts were renamed: download them again",
            )
        for ref in part.tensors:
            if ref.name in places:
                raise DamagedError(
                    f"{shown}: tensor '{printable(ref.name)}' is also in "
                    f"{shown_path(places[ref.name])}",
                    GET_AGAIN,
                )
            places[ref.name] = part.path
    declared = _number(parts[0], SPLIT_TENSORS)
    if declared != len(places):
        raise DamagedError(
            f"{shown_path(parts[0].path)} promises {declared} tensors in {len(parts)} parts, "
            f"there are {len(places)}",
            GET_AGAIN,
        )
