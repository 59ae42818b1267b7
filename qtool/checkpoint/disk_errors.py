"""Failures of the system, in the words and exit codes of a refusal."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from qtool.checkpoint.untrusted import GET_MORE, SCARCE, shown_path
from qtool.errors import CapacityError, DamagedError, QtoolError, UsageError

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG})


def write_error(path: Path, error: OSError) -> QtoolError:
    """Return the refusal that tells a user why `path` could not be written."""
    return _refusal(f"cannot write {shown_path(path)}", error)


def system_error(error: Exception) -> QtoolError | None:
    """Return the refusal for a failure of the system of which only the error itself is known.

    None where it is something else. Libraries written in Rust tell the number in their text.
    """
    told = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return CapacityError("the system gives this process no more threads", GET_MORE)
    if not isinstance(error, OSError) and told:
        error = OSError(int(told[1]), os.strerror(int(told[1])))
    if not isinstance(error, OSError) or error.errno is None:
        return None
    named = isinstance(error.filename, str | bytes)
    shown = shown_path(Path(os.fsdecode(error.filename))) if named else "a file"
    return _refusal(f"cannot read or write {shown}", error)


def _refusal(what: str, error: OSError) -> QtoolError:
    message = f"{what}: {error.strerror or error}"
    if error.errno in FULL_DISK:
        return CapacityError(message, "free some space or choose another --output", resumable=True)
    if error.errno in SCARCE:
        return CapacityError(message, GET_MORE, resumable=True)
    if error.errno in FORBIDDEN:
        return UsageError(message, "choose another --output, one that you may write to")
    return DamagedError(message, "check the disk, or choose another --output", resumable=True)
