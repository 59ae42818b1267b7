"""Look a work directory over before anything in it is read, written or removed.

It may have come with somebody's archive. A link or pipe in it would have us write or read somewhere
else, a second name of a file would have us change the first.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qtool.checkpoint.untrusted import shown_path
from qtool.errors import UsageError

MOST_ENTRIES = 1_000_000
MOST_LEVELS = 100  # removing a tree takes a level of the stack for each of its own
REMOVE = "qtool has not put that there: remove it"


def check_entries(directory: Path) -> None:
    """Refuse links, pipes and devices at the top of a work directory.

    Raises:
        UsageError: names the entry.
        OSError: the directory cannot be read.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            _check_kind(entry, REMOVE)


def check_tree(directory: Path, *, plain: bool) -> None:
    """Refuse a work directory that nobody could go through, or go on with.

    Args:
        directory: of one process, which holds its lock.
        plain: whether links, pipes, devices and files with several names are refused too.

    Raises:
        UsageError: names the entry.
        OSError: a directory cannot be read.
    """
    waiting, count = [(directory, 0)], 0
    while waiting:
        folder, level = waiting.pop()
        if level > MOST_LEVELS:
            raise UsageError(
                f"{shown_path(directory)} is nested more than {MOST_LEVELS} deep", "remove it"
            )
        with os.scandir(folder) as entries:
            for entry in entries:
                count += 1
                if count > MOST_ENTRIES:
                    raise UsageError(
                        f"{shown_path(directory)} holds more than {MOST_ENTRIES} files", "remove it"
                    )
                if plain:
                    _check_kind(entry, f"{REMOVE}, or start over with --no-resume")
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((Path(entry.path), level + 1))


def _check_kind(entry: os.DirEntry[str], hint: str) -> None:
    shown = shown_path(Path(entry.path))
    state = entry.stat(follow_symlinks=False)
    if stat.S_ISLNK(state.st_mode):
        raise UsageError(f"{shown} is a link", hint)
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
        raise UsageError(f"{shown} is neither a file nor a directory", hint)
    if stat.S_ISREG(state.st_mode) and state.st_nlink > 1:
        raise UsageError(f"{shown} has another name elsewhere", hint)
