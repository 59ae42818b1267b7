"""Count what a program asks of a file system, and have the n-th such call go wrong.

Python's own files are covered by a raw file whose `write` and `truncate` are counted, everything
else by the functions of `os`; only paths below a root count. A call may fail with an error number,
or the process may be killed or interrupted just before or just after it.
"""

import builtins
import contextlib
import io
import os
import signal
import stat
from dataclasses import dataclass
from pathlib import Path

from qtool.checkpoint import untrusted, work_directory

BY_PATH = ("rename", "replace", "link", "symlink", "mkdir", "unlink", "remove", "rmdir", "truncate")
BY_DESCRIPTOR = ("write", "pwrite", "writev", "fsync", "fdatasync", "ftruncate", "posix_fallocate")
ROOM = frozenset({"create", "write", "pwrite", "writev", "mkdir", "ftruncate", "truncate",
                  "posix_fallocate"})  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What was asked for, and of which path below the root."""

    kind: str
    path: str


class Faults:
    """A context manager under which the `at`-th call goes wrong; counted from 1, 0 for none.

    Args:
        root: only paths below it count.
        at: which call.
        error: number that it fails with; None to send a signal instead.
        number: of the signal that this process gets.
        after: send the signal after the call instead of before it.
        lasting: every later call that needs room fails, too.
        times: how many calls in a row get the signal.
        reads: count what is read and listed instead of what is written.
    """

    def __init__(
        self,
        root,
        at=0,
        *,
        error=None,
        number=signal.SIGKILL,
        after=False,
        lasting=False,
        times=1,
        reads=False,
    ):
        self._reads = reads
        self._root = os.path.realpath(root) + os.sep
        self._at, self._error, self._number = at, error, number
        self._after, self._lasting, self._times = after, lasting, times
        self._undo = contextlib.ExitStack()
        self.calls = []

    @property
    def hit(self):
        return bool(self._at) and len(self.calls) >= self._at

    def __enter__(self):
        if self._reads:
            return self._enter_reads()
        for name in BY_PATH:
            self._replace(os, name, self._by_path(name, getattr(os, name)))
        for name in BY_DESCRIPTOR:
            self._replace(os, name, self._by_descriptor(name, getattr(os, name)))
        self._replace(os, "open", self._opening(os.open))
        self._replace(
            work_directory, "exchange", self._by_path("exchange", work_directory.exchange)
        )
        opened = self._opened(io.open)
        self._replace(io, "open", opened)
        self._replace(builtins, "open", opened)
        return self

    def _enter_reads(self):
        self._replace(os, "preadv", self._by_descriptor("read", os.preadv))
        self._replace(os, "scandir", self._listing(os.scandir))
        self._replace(os, "listdir", self._listing(os.listdir))
        faults = self

        # Reads of an `io.FileIO` cannot be seen from outside of it.
        class Raw(io.FileIO):
            def readinto(self, buffer):
                place = faults._place(self.fileno())
                return faults.call("read", place, lambda: super(Raw, self).readinto(buffer))

            def readall(self):
                place = faults._place(self.fileno())
                return faults.call("read", place, super().readall)

        named = untrusted._NamedFile
        both = type(named.__name__, (named, Raw), {})
        self._replace(untrusted, named.__name__, both)
        return self

    def __exit__(self, *_):
        self._undo.close()

    def _replace(self, module, name, wrapper):
        self._undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, wrapper)

    def _place(self, path, directory=None):
        """Return a path below the root, or None."""
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        base = Path.cwd()
        if directory is not None:
            base = Path(f"/proc/self/fd/{directory}").readlink()
        path = os.path.normpath(base / os.fsdecode(path))
        return path[len(self._root) :] if path.startswith(self._root) else None

    def call(self, kind, place, function):
        """Carry out one call, unless it is the one that goes wrong."""
        if place is None:
            return function()
        self.calls.append(Call(kind, place))
        count = len(self.calls)
        wrong = 0 < self._at <= count < self._at + self._times
        if wrong and self._error is None and not self._after:
            os.kill(os.getpid(), self._number)
        lasting = self._lasting and 0 < self._at <= count and kind in ROOM
        if self._error is not None and (wrong or lasting):
            raise OSError(self._error, os.strerror(self._error), place)
        try:
            return function()
        finally:  # a call that fails, as for a file that is not there, is one, too
            if wrong and self._error is None and self._after:
                os.kill(os.getpid(), self._number)

    def _by_path(self, kind, function):
        def called(path, *rest, **named):
            directory = named.get("dir_fd", named.get("src_dir_fd"))
            place = self._place(path, directory)
            return self.call(kind, place, lambda: function(path, *rest, **named))

        return called

    def _listing(self, function):
        def called(path="."):
            return self.call("list", self._place(path), lambda: function(path))

        return called

    def _by_descriptor(self, kind, function):
        def called(descriptor, *rest):
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            return self.call(kind, self._place(number), lambda: function(descriptor, *rest))

        return called

    def _opening(self, function):
        def called(path, flags, *rest, **named):
            creates = flags & os.O_CREAT
            place = self._place(path, named.get("dir_fd")) if creates else None
            return self.call("create", place, lambda: function(path, flags, *rest, **named))

        return called

    def _opened(self, function):
        faults = self

        class Raw(io.FileIO):
            def write(self, content):
                place = faults._place(self.fileno())
                return faults.call("write", place, lambda: super(Raw, self).write(content))

            def truncate(self, size=None):
                place = faults._place(self.fileno())
                return faults.call("ftruncate", place, lambda: super(Raw, self).truncate(size))

        def called(
            file, mode="r", buffering=-1, encoding=None, errors=None, newline=None,
            closefd=True, opener=None,
        ):  # fmt: skip
            place = self._place(file) if set(mode) & set("wax+") else None
            given = (file, mode, buffering, encoding, errors, newline, closefd, opener)
            if place is None:
                return function(*given)
            letters = mode.replace("b", "").replace("t", "")

            def make():
                return Raw(file, letters, closefd=closefd, opener=opener)

            creates = not isinstance(file, int) and "r" not in letters
            raw = self.call("create", place, make) if creates else make()
            if "b" in mode and buffering == 0:
                return raw
            held = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return held if "b" in mode else io.TextIOWrapper(held, encoding, errors, newline)

        return called


def in_fork(work):
    """Run `work` in a copy of this process; return its exit status, negative for a signal.

    Starting Python and PyTorch anew takes seconds, a copy milliseconds.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sampled(calls, step):
    """Return numbers of calls: the first and last of each kind for each kind of file, and a few."""
    seen = {}
    for number, call in enumerate(calls, start=1):
        seen.setdefault((call.kind, Path(call.path).name.rstrip("0123456789")), []).append(number)
    ends = {number for found in seen.values() for number in (found[0], found[-1])}
    return sorted(ends | set(range(1, len(calls) + 1, step)))


def listing(root):
    """Return every path below a root with what it is, contents aside."""
    return {
        path.relative_to(root).as_posix(): stat.S_IFMT(path.lstat().st_mode)
        for path in Path(root).rglob("*")
    }
