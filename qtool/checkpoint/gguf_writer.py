"""Fill in the tensors of a planned GGUF file, each once and in any order.

Each file is created under a name that no program loads, at its full size with an empty (sparse)
body, so finished tensors go straight to their final place; the files get their names when
everything is on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.gguf_file import GgufFile, GgufPlan
from qtool.checkpoint.shards import file_digest
from qtool.checkpoint.untrusted import shown_path
from qtool.checkpoint.work_directory import sync
from qtool.checkpoint.written_tensors import WrittenTensors
from qtool.errors import UsageError

PARTIAL_SUFFIX = ".partial"


class GgufWriter:
    """Create the files of a plan in `directory` and fill in every tensor exactly once.

    A context manager: leaving it calls `close`, or after an exception `abandon`.

    Args:
        plan: where everything goes.
        directory: an existing one.
        overwrite: replace files of these names when the new ones are complete.
        resume: take over what an earlier writer left under the same plan; see `tensors`.

    Raises:
        UsageError: a file of that name exists, and not `overwrite`; or it is a link; or another
            process is writing it.
        CapacityError: the disk is full.
        DamagedError: the disk failed.
    """

    def __init__(
        self, plan: GgufPlan, directory: Path, *, overwrite: bool = False, resume: bool = False
    ) -> None:
        self._plan = plan
        self._directory = directory
        self._overwrite = overwrite
        self._resume = resume
        self.tensors = WrittenTensors(plan.places, self._partial)
        self._descriptors: dict[str, int] = {}  # open and locked, while not named yet
        with contextlib.ExitStack() as undo:
            undo.callback(self.abandon)
            for file in plan.files:
                if resume:
                    self._take_name_back(file.file)
                self._check_free(file.file)
                self._create(file)
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def write(self, name: str, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write the bytes of one tensor to its place, piece by piece.

        Raises:
            RuntimeError: not planned, not that many bytes, or written before (a bug in the caller).
            CapacityError: the disk is full.
        """
        place = self.tensors.place(name)
        descriptor = self._descriptors[place.file]
        position = place.start
        for chunk in chunks:
            piece = memoryview(chunk)
            if position + piece.nbytes > place.stop:
                raise RuntimeError(f"'{name}' has more than {place.stop - place.start} bytes")
            flat = piece.cast("B") if piece.nbytes else memoryview(b"")
            try:
                while flat:
                    written = os.pwrite(descriptor, flat, position)
                    position += written
                    flat = flat[written:]
            except OSError as error:
                raise write_error(self._partial(place.file), error) from error
        if position != place.stop:
            raise RuntimeError(f"'{name}' ended {place.stop - position} bytes early")
        self.tensors.note(name)

    def close(self) -> None:
        """Put everything on the disk for good, and give the files their names.

        Raises:
            RuntimeError: a tensor was never written (a bug in the caller).
            UsageError: something appeared under a file's name meanwhile.
            CapacityError: the disk is full.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.abandon)
            self.tensors.check_complete()
            for file, descriptor in self._descriptors.items():
                try:
                    os.fsync(descriptor)
                except OSError as error:
                    raise write_error(self._partial(file), error) from error
            # Programs load a model by its first part: it appears when the others are there.
            for file in reversed(list(self._descriptors)):
                self._check_free(file)
                try:
                    self._partial(file).replace(self._directory / file)
                except OSError as error:
                    raise write_error(self._directory / file, error) from error
                os.close(self._descriptors.pop(file))
            try:
                sync(self._directory)
            except OSError as error:
                raise write_error(self._directory, error) from error
            undo.pop_all()

    def abandon(self) -> None:
        """Remove what has no name yet; afterwards nothing can be written any more."""
        for file in list(self._descriptors):
            with contextlib.suppress(OSError):
                self._partial(file).unlink()
            os.close(self._descriptors.pop(file))

    def release(self) -> None:
        """Close what is open and leave it as it is, for a later writer that resumes."""
        for file in list(self._descriptors):
            os.close(self._descriptors.pop(file))

    def digests(self) -> dict[str, str]:
        """Return file name -> SHA-256 of every file, as read back from the disk after `close`."""
        return {file.file: file_digest(self._directory / file.file) for file in self._plan.files}

    def path(self, file: str) -> Path:
        """Return where a file of the plan is now: under its hidden name, or closed."""
        partial = self._partial(file)
        return partial if file in self._descriptors else self._directory / file

    def _partial(self, file: str) -> Path:
        return self._directory / (file + PARTIAL_SUFFIX)

    def _take_name_back(self, file: str) -> None:
        """Make a file nameless again that an earlier writer had closed."""
        final = self._directory / file
        if final.is_file() and not final.is_symlink() and not self._partial(file).exists():
            try:
                final.rename(self._partial(file))
            except OSError as error:
                raise write_error(final, error) from error

    def _check_free(self, file: str) -> None:
        final = self._directory / file
        if final.is_symlink():
            raise UsageError(
                f"the output {shown_path(final)} is a link", "give the file it points to"
            )
        if final.exists() and not (self._overwrite and final.is_file()):
            raise UsageError(
                f"the output {shown_path(final)} exists",
                "choose another --output, or replace it with --overwrite",
            )

    def _create(self, file: GgufFile) -> None:
        """Create the nameless file, or take over the one that a killed process left."""
        path = self._partial(file.file)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            if not _is_ours(descriptor, path):
                os.close(descriptor)
                raise UsageError(
                    f"another process is writing {shown_path(path)}",
                    "wait for it, or choose another --output",
                )
            self._descriptors[file.file] = descriptor
            if not self._resume:
                os.ftruncate(descriptor, 0)
            written = 0
            while written < len(file.header):
                written += os.pwrite(descriptor, file.header[written:], written)
            os.ftruncate(descriptor, file.n_bytes)
        except OSError as error:
            raise write_error(path, error) from error


def _is_ours(descriptor: int, path: Path) -> bool:
    """Lock a file until it is closed; False where another process holds it or just renamed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
