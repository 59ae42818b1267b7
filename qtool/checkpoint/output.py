"""Give a result its name only when all of it is there.

The work happens in a hidden sibling directory, so that the last step is one rename on one file
system. Whoever looks sees the old result or the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from qtool.checkpoint.gguf_split import model_stem
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import CapacityError, DamagedError, QtoolError, UsageError

# What makes a directory look like a model, so that --overwrite may replace it.
MODEL_MARKS = ("config.json", "qtool-recipe.yaml")
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG})


def write_error(path: Path, error: OSError) -> QtoolError:
    """Return the refusal that tells a user why `path` could not be written."""
    message = f"cannot write {shown_path(path)}: {error.strerror or error}"
    if error.errno in FULL_DISK:
        return CapacityError(message, "free some space or choose another --output", resumable=True)
    if error.errno in FORBIDDEN:
        return UsageError(message, "choose another --output, one that you may write to")
    return DamagedError(message, "check the disk, or choose another --output", resumable=True)


def sync(path: Path) -> None:
    """Have the kernel put a file or directory on the disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(final: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()) -> Path:
    """Return the absolute path of an output directory, or refuse it before any work is done.

    Args:
        final: where the result shall be.
        overwrite: whether a model directory there may be replaced.
        sources: input files and directories, which the output may neither be, hold, nor lie in.

    Raises:
        UsageError: a file, a link, a non-empty directory, or in the way of the input.
    """
    shown = shown_path(final)
    if final.name in {"", ".."}:
        final = final.resolve()
    if final.is_symlink():
        raise UsageError(f"the output {shown} is a link", "give the directory it points to")
    final = final.parent.resolve() / final.name
    for source in sources:
        _refuse_overlap(final, source)
    if not final.exists():
        return final
    if not final.is_dir():
        raise UsageError(f"the output {shown} is not a directory", "choose another --output")
    try:
        names = [path.name for path in final.iterdir()]
    except OSError as error:
        raise write_error(final, error) from error
    if not names:
        return final
    if not overwrite:
        raise UsageError(
            f"the output {shown} is not empty",
            "choose another --output, or replace it with --overwrite",
        )
    here = Path.cwd()
    model = bool(set(MODEL_MARKS) & set(names)) or _one_gguf(names)
    if final in {Path.home(), here} or final in here.parents or not model:
        raise UsageError(
            f"the output {shown} does not look like a model, so it is not overwritten",
            f"--overwrite replaces a directory with {' or '.join(MODEL_MARKS)}, or with one GGUF "
            "model and nothing else; choose another --output or remove it yourself",
        )
    return final


def _one_gguf(names: Sequence[str]) -> bool:
    """Tell a directory that holds one GGUF model from a collection of somebody's models."""
    weights = [name for name in names if name.endswith(".gguf")]
    one = len({model_stem(name) for name in weights}) == 1
    return one and set(names) - set(weights) <= {"Modelfile"}


def _refuse_overlap(final: Path, source: Path) -> None:
    source = source.resolve()
    if final == source:
        raise UsageError(f"the output {shown_path(final)} is the input", "choose another --output")
    if final in source.parents or source in final.parents:
        inner, outer = ("input", "output") if final in source.parents else ("output", "input")
        raise UsageError(
            f"the {inner} lies inside the {outer}: {shown_path(source)}, {shown_path(final)}",
            "choose an --output beside the model",
        )


class OutputDirectory:
    """A directory that comes into being whole or not at all; a context manager.

    Entering yields a new empty directory beside the final one. `commit` gives it its name;
    leaving without that removes it.
    """

    def __init__(
        self, final: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()
    ) -> None:
        self.final = check_output(final, overwrite=overwrite, sources=sources)
        self._overwrite = overwrite
        self._sources = tuple(sources)
        self.partial = self.final.with_name(f".{self.final.name}.partial-{os.getpid()}")
        self._created_parents: list[Path] = []

    def __enter__(self) -> Path:
        parent = self.final.parent
        missing = [path for path in (parent, *parent.parents) if not path.exists()]
        with contextlib.ExitStack() as undo:  # an interrupt between two steps too
            undo.callback(self._clean_up)
            try:
                for path in reversed(missing):
                    path.mkdir()
                    self._created_parents.append(path)
                if self.partial.exists():  # left by a killed process whose number we now have
                    shutil.rmtree(self.partial)
                self.partial.mkdir()
            except OSError as error:
                raise write_error(self.partial, error) from error
            undo.pop_all()
        return self.partial

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean_up()

    def commit(self) -> Path:
        """Put every file on the disk and give the directory its final name; return that.

        Raises:
            UsageError: something else appeared under the name meanwhile.
            CapacityError: the disk is full.
        """
        check_output(self.final, overwrite=self._overwrite, sources=self._sources)
        try:
            for path in sorted(self.partial.rglob("*")):
                sync(path)
            sync(self.partial)
            self._rename()
            sync(self.final.parent)
        except OSError as error:
            raise write_error(self.final, error) from error
        self._created_parents.clear()
        return self.final

    def _rename(self) -> None:
        """Put the new directory in the old one's place; on failure the old one stays."""
        if not self.final.exists() or not any(self.final.iterdir()):
            self.partial.rename(self.final)  # atomic, over an empty directory too
            return
        aside = self.final.with_name(f".{self.final.name}.replaced-{os.getpid()}")
        self.final.rename(aside)
        try:
            self.partial.rename(self.final)
        except OSError:
            aside.rename(self.final)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _clean_up(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        for path in reversed(self._created_parents):
            with contextlib.suppress(OSError):  # somebody else put something there
                path.rmdir()
        self._created_parents.clear()


class OutputFile(OutputDirectory):
    """A file, or the parts of a split one, that appears complete or not at all.

    The work happens in a hidden directory beside it, as for a directory. `commit` renames what
    belongs to the result: NAME.gguf or its parts, and the small files of `COMPANIONS` as
    NAME.<theirs>.
    """

    COMPANIONS = ("Modelfile", "qtool-recipe.yaml", "qtool-report.json")

    def __init__(
        self, final: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()
    ) -> None:
        self.final = check_output_file(final, overwrite=overwrite, sources=sources)
        self._overwrite = overwrite
        self._sources = tuple(sources)
        self.partial = self.final.with_name(f".{self.final.name}.partial-{os.getpid()}")
        self._created_parents = []

    def commit(self) -> Path:
        """Put every file on the disk and give it its final name; return that.

        Raises:
            UsageError: something else appeared under the name meanwhile.
            CapacityError: the disk is full.
        """
        check_output_file(self.final, overwrite=self._overwrite, sources=self._sources)
        stem = self.final.stem
        parts = sorted(self.partial.glob("*.gguf"))
        others = [self.partial / name for name in self.COMPANIONS]
        replaced = {*_parts_of(self.final), self.final}
        try:
            # Programs load a model by its first part: it appears when the others are there.
            for path in [*(p for p in others if p.exists()), *reversed(parts)]:
                sync(path)
                name = path.name if path in parts else f"{stem}.{path.name}"
                path.rename(self.final.with_name(name))
            for path in replaced - {self.final.with_name(part.name) for part in parts}:
                path.unlink(missing_ok=True)  # else two models would share the name
            sync(self.final.parent)
        except OSError as error:
            raise write_error(self.final, error) from error
        self._created_parents.clear()
        return self.final.with_name(parts[0].name)


def check_output_file(
    final: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()
) -> Path:
    """Return the absolute path of an output file, or refuse it before any work is done.

    Raises:
        UsageError: a directory, a link, an input, or a file that is not to be replaced.
    """
    shown = shown_path(final)
    if final.is_symlink():
        raise UsageError(f"the output {shown} is a link", "give the file it points to")
    final = final.parent.resolve() / final.name
    parts = _parts_of(final)
    for source in sources:
        if final == source.resolve() or {source.absolute(), source.resolve()} & set(parts):
            raise UsageError(f"the output {shown} is the input", "choose another --output")
    if final.is_dir():
        raise UsageError(f"the output {shown} is a directory", "choose another --output")
    # Somebody may have edited a Modelfile.
    taken = [path for path in (*parts, final, final.with_suffix(".Modelfile")) if path.exists()]
    if taken and not overwrite:
        raise UsageError(
            f"the output {shown if taken[0] == final else shown_path(taken[0])} exists",
            "choose another --output, or replace it with --overwrite",
        )
    return final


def _parts_of(final: Path) -> list[Path]:
    """Return the parts of a model in several files that `final` would be in one."""
    return sorted(final.parent.glob(f"{glob.escape(final.stem)}-?????-of-?????.gguf"))


def output_place(
    final: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()
) -> OutputDirectory:
    """Return the place of a result: a file where the name ends in .gguf, else a directory.

    Raises:
        UsageError: what is there is in the way.
    """
    if final.suffix != ".gguf" and final.suffix.lower() == ".gguf":
        raise UsageError(
            f"the output {shown_path(final)} ends in {final.suffix}", "write .gguf in small letters"
        )
    kind = OutputFile if final.suffix == ".gguf" else OutputDirectory
    return kind(final, overwrite=overwrite, sources=sources)
