"""The hidden directory beside an output in which it comes into being.

    .NAME.qtool/lock         held while a process works here
    .NAME.qtool/result/      becomes the output, by a rename on the same file system
    .NAME.qtool/committing   there while outputs get their names: who they are, by inode
    .NAME.qtool/aside/       files that belonged to what is replaced and have no successor

It survives a killed process, so that the next one can go on; it is renamed away, in one step, when
everything that belongs to a run has its name: to .NAME.qtool-done-PID, which goes at once, or with
the next run.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.checkpoint.untrusted import read_json_object, shown_path
from qtool.checkpoint.work_contents import check_entries, check_tree
from qtool.errors import QtoolError, UsageError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
DONE = "-done-"  # of a directory that is being removed, before the process's id
MARKER, LOCK, RESULT = "committing", "lock", "result"
REPLACED, ASIDE = "replaced", "aside"  # a directory, and files, that made way for a result
MAX_MARKER_BYTES = 16 << 20  # a model has at most 99,999 parts
ATTEMPTS = 10  # to lock a directory that others are just removing


def work_path(final: Path) -> Path:
    """Return where the output `final` is worked on."""
    return final.with_name(f".{final.name}.qtool")


def sync(path: Path) -> None:
    """Have the kernel put a file or directory on the disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WorkDirectory:
    """A directory of one process at a time.

    Args:
        final: absolute path of the output.
    """

    def __init__(self, final: Path) -> None:
        self.path = work_path(final)
        self.result = self.path / RESULT
        self._final = final
        self._lock: int | None = None
        self._created_parents: list[Path] = []

    def open(self) -> None:
        """Create it, or take over what a process that is gone left; lock it.

        Raises:
            UsageError: another process works here.
            OSError: it cannot be created.
        """
        parent = self.path.parent
        self.sweep()
        for path in reversed([p for p in (parent, *parent.parents) if not p.exists()]):
            path.mkdir()
            self._created_parents.append(path)
        for _ in range(ATTEMPTS):
            if self.path.is_symlink():
                raise UsageError(f"{shown_path(self.path)} is a link", "remove it")
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"{shown_path(self.path)} is not a directory", "remove it")
            self.path.mkdir(exist_ok=True)
            try:
                if self._locked():
                    return
            except FileNotFoundError:  # removed by who just finished
                continue
            except OSError:  # no room for the lock
                with contextlib.suppress(OSError):  # somebody else's, who has one
                    self.path.rmdir()
                raise
        raise UsageError(f"others keep removing {shown_path(self.path)}", "choose another --output")

    def _locked(self) -> bool:
        """Lock the directory; False if it is not the one of that name any more."""
        path = self.path / LOCK
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise UsageError(f"{shown_path(path)} is not a file", "remove it")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UsageError(
                        f"another process is writing {shown_path(self._final)}",
                        "wait for it, or choose another --output",
                    ) from error
                except OSError as error:  # a file system without locks
                    if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}:
                        raise
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                self._lock, descriptor = descriptor, -1
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return self._lock is not None

    def check(self, *, plain: bool) -> None:
        """Refuse what could not be gone through, and with `plain` what leads somewhere else.

        Raises:
            UsageError: names the entry.
            OSError: it cannot be read.
        """
        check_tree(self.path, plain=plain)

    def empty(self) -> None:
        """Remove everything in it but the lock."""
        for path in self.path.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def close(self, *, keep: bool) -> None:
        """Unlock it, and unless `keep` remove it and the parents that were made for it."""
        if self._lock is not None:
            if not keep:
                with contextlib.suppress(OSError):  # a second interrupt came in between
                    self._put_back()
                    self._restore()
                self._remove()
            lock, self._lock = self._lock, None
            with contextlib.suppress(OSError):  # it is closed all the same
                os.close(lock)
        if not keep:
            for path in reversed(self._created_parents):
                with contextlib.suppress(OSError):  # something else is there, the result perhaps
                    path.rmdir()
        self._created_parents.clear()

    def sweep(self) -> None:
        """Remove what processes that were killed while they removed theirs have left."""
        for path in self.path.parent.glob(f"{glob.escape(self.path.name)}{DONE}*"):
            if path.name.removeprefix(self.path.name + DONE).isdigit() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        if self._lock is None and not self.path.is_symlink() and self._finished():
            # Of several outputs of a run the first is cleaned up after first: this one was left.
            with contextlib.suppress(UsageError, OSError):
                self._locked()
                self.close(keep=False)

    def _finished(self) -> bool:
        """Whether all outputs of the run that worked here have their names."""
        marker = self._marker()
        if marker is None or self._goes_on(marker):
            return False
        return bool(self._given(marker["inodes"]))

    def _remove(self) -> None:
        """Remove it so that nobody ever finds a part of it under its name."""
        trash = self.path.with_name(f"{self.path.name}{DONE}{os.getpid()}")
        try:
            self.path.rename(trash)
        except OSError:
            trash = self.path
        for _ in range(2):  # where one step fails, the next may not
            with contextlib.suppress(OSError):  # an interrupt can have it close a directory twice
                shutil.rmtree(trash, ignore_errors=True)

    # --- giving the output its name ---------------------------------------------------------

    def mark(self, first: WorkDirectory, inodes: Mapping[str, int]) -> None:
        """Note that outputs are about to get their names.

        Args:
            first: of the outputs that belong together; the run is finished when its directory goes.
            inodes: file name beside this directory -> inode of what gets that name.
        """
        # Relative: the directory above may have another name when somebody looks.
        beside = os.path.relpath(first.path, self.path.parent)
        text = json.dumps({"first": beside, "inodes": dict(inodes)})
        partial = self.path / f"{MARKER}.partial"
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(self.path / MARKER)
        sync(self.path)

    def pending(self) -> Mapping[str, int]:
        """Return the names that this directory's results have got already, by a run not finished.

        Empty where there are none; name -> inode.
        """
        marker = self._marker()
        if marker is None or not self._goes_on(marker):
            return {}
        return self._given(marker["inodes"])

    def _goes_on(self, marker: Mapping[str, Any]) -> bool:
        """Whether the run of a marker has still to finish."""
        return (self.path.parent / marker["first"] / MARKER).exists()

    def _marker(self) -> dict[str, Any] | None:
        """Return the marker, None where there is none that is whole."""
        path = self.path / MARKER
        if path.is_symlink():
            return None
        try:
            marker = read_json_object(path, max_bytes=MAX_MARKER_BYTES)
        except QtoolError:
            return None
        first, inodes = marker.get("first"), marker.get("inodes")
        if not isinstance(first, str) or "\0" in first or not isinstance(inodes, dict):
            return None
        whole = all(self._ours(name) and type(inode) is int for name, inode in inodes.items())
        return marker if whole else None

    def _ours(self, name: str) -> bool:
        """Tell whether a result of this directory may get a name: nothing else is ever moved."""
        stem = re.escape(self._final.stem)
        other = rf"{stem}(-\d{{5}}-of-\d{{5}})?\.gguf|{stem}\.(Modelfile|qtool-[a-z.]+)"
        single = self._final.suffix == ".gguf"
        return name == self._final.name or (single and re.fullmatch(other, name) is not None)

    def _given(self, inodes: Mapping[str, int]) -> dict[str, int]:
        found = {}
        for name, inode in inodes.items():
            with contextlib.suppress(OSError):
                if self._final.with_name(name).lstat().st_ino == inode:
                    found[name] = inode
        return found

    def recover(self) -> None:
        """Bring what a killed process left halfway through its last step back to before that step.

        If that process had finished but for cleaning up, what it left is removed instead.

        Raises:
            UsageError: a link or pipe lies where only files and directories may.
            OSError: something cannot be renamed.
        """
        check_entries(self.path)
        finished = self._finished()
        self.undo()
        if finished:
            self.empty()  # finished: only this directory was not removed
        (self.path / MARKER).unlink(missing_ok=True)

    def give(self, name: str) -> None:
        """Give the whole result a name beside this directory, in one step where that can be.

        What has the name now is kept in this directory until it is closed.

        Raises:
            OSError: it cannot be renamed; the old one is back.
        """
        final = self._final.with_name(name)
        if not final.exists() or (final.is_dir() and not any(final.iterdir())):
            self.result.rename(final)
            return
        if exchange(self.result, final):
            return
        try:
            final.rename(self.path / REPLACED)
            self.result.rename(final)
        except (OSError, KeyboardInterrupt):
            self._put_back()
            raise

    def give_file(self, path: Path, name: str) -> None:
        """Give one file of the result a name beside this directory.

        What has the name now takes the file's place, so that `take_back` can undo it.

        Raises:
            OSError: it cannot be renamed.
        """
        final = self._final.with_name(name)
        if not final.exists() or not exchange(path, final):
            path.rename(final)

    def set_aside(self, path: Path) -> None:
        """Take the name of a file beside this directory, which goes when the directory goes.

        Raises:
            OSError: it cannot be renamed.
        """
        aside = self.path / ASIDE
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)

    def undo(self) -> None:
        """Bring everything beside this directory back to before results got their names.

        A run that has finished is left as it is.

        Raises:
            OSError: something cannot be renamed.
        """
        for name in self.pending():
            self.take_back(name)
        self._put_back()
        self._restore()

    def _restore(self) -> None:
        """Give files that were set aside their names again, unless the result has its own."""
        marker, aside = self._marker(), self.path / ASIDE
        given = marker is not None and bool(self._given(marker["inodes"]))
        if given or aside.is_symlink() or not aside.is_dir():
            return
        for path in sorted(aside.iterdir()):
            final = self._final.with_name(path.name)
            regular = stat.S_ISREG(path.lstat().st_mode)
            if regular and self._ours(path.name) and not os.path.lexists(final):
                path.rename(final)

    def _put_back(self) -> None:
        """Give a result that was to be replaced its name again, where nothing has it now."""
        aside = self.path / REPLACED
        if aside.exists() and not self._final.exists():
            aside.rename(self._final)

    def take_back(self, name: str) -> None:
        """Undo `give`, or the move of a single file of the result.

        Raises:
            OSError: it cannot be renamed.
        """
        given = self._final.with_name(name)
        if given.is_dir():
            if self.result.exists():
                exchange(self.result, given)
                return
            given.rename(self.result)
            aside = self.path / REPLACED
            if aside.exists():
                aside.rename(given)
            return
        self.result.mkdir(exist_ok=True)
        old = [self.result / name, self.result / name.removeprefix(f"{self._final.stem}.")]
        if not any(path.exists() and exchange(path, given) for path in old):
            given.rename(self.result / name)


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the system cannot.

    Raises:
        OSError: the disk failed.
    """
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}:
        return False
    raise OSError(number, os.strerror(number), str(other))
