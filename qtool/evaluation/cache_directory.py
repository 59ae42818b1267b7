"""The directory of `--logits-cache`: its folders, its files, and what tells models apart.

    DIR/KEY/reference.json   what KEY stands for, for people
    DIR/weights.json         SHA-256 of weight files, so that a file is hashed once

KEY is a hash of everything that decides what a model says: its weights and configuration, the
dtype, the versions of the libraries. A file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.disk_errors import FULL_DISK
from qtool.checkpoint.locate import CONFIG_FILE, Checkpoint
from qtool.checkpoint.untrusted import open_regular, read_error, read_json_object, shown_path
from qtool.errors import CapacityError, DamagedError, QtoolError, UsageError

NAME_LENGTH = 32  # hexadecimal digits of a hash that name a file
CHUNK_BYTES = 1 << 22
KEY_FILE = "reference.json"
WEIGHTS_FILE = "weights.json"
MAX_WEIGHTS_BYTES = 16 << 20  # of the hashes of weight files


def cache_folder(directory: Path, key: Mapping[str, Any]) -> Path:
    """Return the folder for what one model says under one setting; made if need be.

    Args:
        directory: of all caches.
        key: what decides what the model says; JSON values.

    Raises:
        UsageError, CapacityError: the directory cannot be written.
    """
    text = json.dumps(key, sort_keys=True, indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder = directory / digest[:NAME_LENGTH]
    if folder.is_symlink():
        raise UsageError(f"the logits cache {shown_path(folder)} is a link", "remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / KEY_FILE, text.encode())
    except OSError as error:
        raise write_error(folder, error) from error
    return folder


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not _writes_on(left.suffix[1:]):
            left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # of a process that had the same number, or a link
        partial.touch(exist_ok=False)
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):  # gone with its new name; else the next process tries
            partial.unlink(missing_ok=True)


def _writes_on(process: str) -> bool:
    """Tell whether a process, by its number, is still there to finish what it writes."""
    if not process.isdigit():
        return True  # not one of ours
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(process) != os.getpid()


def write_error(path: Path, error: OSError) -> QtoolError:
    """Return the refusal that tells a user why the cache could not be written."""
    message = f"cannot write the logits cache {shown_path(path)}: {error.strerror or error}"
    if error.errno in FULL_DISK or error.errno == errno.ENOMEM:
        # What is in it already is found again.
        hint = "free some space or choose another --logits-cache"
        return CapacityError(message, hint, resumable=True)
    return UsageError(message, "choose a directory for --logits-cache that you may write to")


def identity(checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Return what tells a model's weights and configuration from any other's.

    A model from the hub is known by its commit. Files on this machine are hashed, once for each
    size, file and time of change; the hashes are noted in `directory`.

    Raises:
        UsageError, CapacityError: the directory cannot be written.
        DamagedError: a weight file cannot be read.
    """
    if checkpoint.revision is not None:
        return {"model": checkpoint.source, "revision": checkpoint.revision}
    files = sorted({ref.file for ref in checkpoint.refs.values()})
    if not checkpoint.gguf:
        files.append(checkpoint.path / CONFIG_FILE)
    known = _known_weights(directory)
    found: dict[str, str] = {}
    for file in files:
        try:
            found[file.name] = _hashed(file, known)
        except OSError as error:
            raise read_error(file, error) from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / WEIGHTS_FILE, json.dumps(known, indent=2).encode())
    except OSError as error:
        raise write_error(directory, error) from error
    return {"files": found}


def _hashed(file: Path, known: dict[str, Any]) -> str:
    """Return a file's SHA-256, from `known` if it has not changed since."""
    state = file.stat()
    # Archives and copies bring times of change along: two models of a size may have the same.
    mark = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    entry = known.get(str(file))
    if isinstance(entry, list) and entry[:-1] == mark:
        noted = str(entry[-1])
        if re.fullmatch("[0-9a-f]{64}", noted):
            return noted
    digest = hashlib.sha256()
    with open_regular(file)[0] as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
    known[str(file)] = [*mark, digest.hexdigest()]
    return digest.hexdigest()


def _known_weights(directory: Path) -> dict[str, Any]:
    """Return the hashes noted earlier; none if the file is not what was written."""
    try:
        return read_json_object(directory / WEIGHTS_FILE, max_bytes=MAX_WEIGHTS_BYTES)
    except DamagedError:
        return {}
