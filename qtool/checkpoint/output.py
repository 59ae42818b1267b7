"""Give a result its name only when all of it is there.

The work happens in a hidden sibling directory (`work_directory`), so that the last step is one
rename on one file system. Whoever looks sees the old result or the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType

from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.gguf_split import model_stem
from qtool.checkpoint.untrusted import shown_path
from qtool.checkpoint.work_directory import WorkDirectory, sync
from qtool.errors import QtoolError, UsageError

# What makes a directory look like a model, so that --overwrite may replace it.
MODEL_MARKS = ("config.json", "qtool-recipe.yaml")
IMPATIENCE = 10  # interrupts that are not heeded while names are taken back


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
    _check_name(final)
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
    here = Path.cwd()
    if not names or WorkDirectory(final).pending():
        _refuse_here(final, here)
        return final
    if not overwrite:
        WorkDirectory(final).sweep()  # of a run that was killed when all was done
        raise UsageError(
            f"the output {shown} is not empty",
            "choose another --output, or replace it with --overwrite",
        )
    homes = set()
    with contextlib.suppress(RuntimeError):  # a container's user may have none
        homes.add(Path.home())
    model = bool(set(MODEL_MARKS) & set(names)) or _one_gguf(names)
    if final in {*homes, here} or final in here.parents or not model:
        raise UsageError(
            f"the output {shown} does not look like a model, so it is not overwritten",
            f"--overwrite replaces a directory with {' or '.join(MODEL_MARKS)}, or with one GGUF "
            "model and nothing else; choose another --output or remove it yourself",
        )
    return final


def _refuse_here(final: Path, here: Path) -> None:
    """Refuse to put a result in the place of the directory that this process stands in."""
    if final == here:
        raise UsageError(
            f"the output {shown_path(final)} is the directory that qtool runs in",
            "choose an --output inside it",
        )


def _check_name(final: Path, *beside: Path) -> None:
    """Refuse a path that no file can have, nor the work directory and what else lies beside it."""
    try:
        for path in (final, final.parent / f".{final.name}.qtool", *beside):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a valid path"
        raise UsageError(
            f"the output {shown_path(final)} cannot be: {reason}", "choose another --output"
        ) from error


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

    Entering yields the directory to write into, which lies hidden beside the final one and is
    locked: it is empty, or with `resume` what an earlier run left. `commit` gives it its name;
    leaving without that removes it, unless `keep` was called.

    Args:
        final: where the result shall be.
        overwrite: whether a model there may be replaced.
        sources: input files and directories, which the output may neither be, hold, nor lie in.
        resume: whether to take over what an earlier run left.

    Raises:
        UsageError: what is there is in the way.
    """

    def __init__(
        self,
        final: Path,
        *,
        overwrite: bool = False,
        sources: Sequence[Path] = (),
        resume: bool = False,
    ) -> None:
        self._overwrite = overwrite
        self._sources = tuple(sources)
        self._resume = resume
        self._kept = False
        self.done = False  # whether all outputs of the run have their names
        self.final = self._checked(final)
        self.work = WorkDirectory(self.final)

    def _checked(self, final: Path) -> Path:
        return check_output(final, overwrite=self._overwrite, sources=self._sources)

    @property
    def partial(self) -> Path:
        """The directory to write into."""
        return self.work.result

    def __enter__(self) -> Path:
        with contextlib.ExitStack() as undo:  # an interrupt between two steps too
            undo.callback(self._clean_up)
            try:
                self.work.open()
                self._kept = True  # what was there before is not ours to lose yet
                self.work.recover()
                self._checked(self.final)  # an old one may have got its name back
                self.work.check(plain=self._resume)
                if not self._resume:
                    self.work.empty()
                self._kept = self._resume
                self.partial.mkdir(exist_ok=True)
            except OSError as error:
                raise write_error(self.work.path, error) from error
            undo.pop_all()
        self._kept = False
        return self.partial

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean_up()

    def keep(self) -> None:
        """Leave what there is for a later run."""
        self._kept = True

    def commit(self) -> Path:
        """Put every file on the disk and give the directory its final name; return that.

        Raises:
            UsageError: something else appeared under the name meanwhile.
            CapacityError: the disk is full.
        """
        return commit_all([self])[0]

    def settle(self) -> None:
        """Put every file on the disk, for good."""
        for path in sorted(self.partial.rglob("*")):
            sync(path)
        sync(self.partial)

    def names(self) -> dict[str, Path]:
        """Return each name beside the work directory, in order -> what of the result gets it."""
        return {self.final.name: self.partial}

    def give(self) -> Path:
        """Give the result its name; return what opens it."""
        self._checked(self.final)
        self.work.give(self.final.name)
        sync(self.final.parent)
        return self.final

    def undo(self) -> None:
        """Take names back; what cannot be undone now is kept for the next run to undo."""
        for _ in range(IMPATIENCE):
            try:
                self.work.undo()
            except KeyboardInterrupt:
                continue
            except OSError:
                break
            return
        self._kept = True

    def _clean_up(self) -> None:
        self.work.close(keep=self._kept and not self.done)


class OutputFile(OutputDirectory):
    """A file, or the parts of a split one, that appears complete or not at all.

    The work happens in a hidden directory beside it, as for a directory. `commit` renames what
    belongs to the result: NAME.gguf or its parts, and the small files of `COMPANIONS` as
    NAME.<theirs>.
    """

    COMPANIONS = ("Modelfile", "qtool-recipe.yaml", "qtool-report.json")

    def _checked(self, final: Path) -> Path:
        return check_output_file(final, overwrite=self._overwrite, sources=self._sources)

    def names(self) -> dict[str, Path]:
        """Return each name beside the work directory, in order -> what of the result gets it."""
        stem = self.final.stem
        others = [self.partial / name for name in self.COMPANIONS]
        found = {f"{stem}.{path.name}": path for path in others if path.exists()}
        # Programs load a model by its first part: it appears when the others are there.
        return found | {path.name: path for path in reversed(self._parts())}

    def _parts(self) -> list[Path]:
        return sorted(self.partial.glob("*.gguf"))

    def give(self) -> Path:
        """Give every file its name; return what opens the result."""
        self._checked(self.final)
        parts = self._parts()
        if not parts:  # somebody removed it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.partial))
        names = self.names()
        without = self._without_successor(names)
        for name, path in names.items():
            self.work.give_file(path, name)
        for path in without:
            self.work.set_aside(path)
        sync(self.final.parent)
        return self.final.with_name(parts[0].name)

    def _without_successor(self, names: Collection[str]) -> list[Path]:
        """Return files of what is replaced that would stay beside the result and contradict it."""
        stem = self.final.stem
        parts = {*_parts_of(self.final), self.final}
        recipe, report = (f"{stem}.{name}" for name in self.COMPANIONS[1:])
        found = [path for path in parts if path.name not in names and path.exists()]
        others = [recipe, report]
        if found:  # a Modelfile names the parts
            others.append(f"{stem}.{self.COMPANIONS[0]}")
        stale = [self.final.with_name(name) for name in others if name not in names]
        return sorted(found) + [path for path in stale if path.is_file()]


class PlainFile(OutputDirectory):
    """A single file that appears complete or not at all, written as `result/NAME`."""

    def _checked(self, final: Path) -> Path:
        shown = shown_path(final)
        _check_name(final)
        if final.is_symlink():
            raise UsageError(f"the output {shown} is a link", "give the file it points to")
        final = final.parent.resolve() / final.name
        if final.is_dir():
            raise UsageError(f"the output {shown} is a directory", "choose another --output")
        for source in self._sources:
            _refuse_overlap(final, source)
        if final.exists() and not self._overwrite and not WorkDirectory(final).pending():
            WorkDirectory(final).sweep()
            raise UsageError(
                f"the output {shown} exists",
                "choose another --output, or replace it with --overwrite",
            )
        return final

    def names(self) -> dict[str, Path]:
        """Return the name of the file -> where it is now."""
        return {self.final.name: self.partial / self.final.name}

    def give(self) -> Path:
        """Give the file its name; return that."""
        self._checked(self.final)
        (self.partial / self.final.name).replace(self.final)
        sync(self.final.parent)
        return self.final


def commit_all(places: Sequence[OutputDirectory]) -> list[Path]:
    """Give the results of one run their names, all of them or none; return what opens each.

    A process that is killed meanwhile leaves enough behind for the next to see how far it came.

    Raises:
        UsageError: something else appeared under a name meanwhile.
        CapacityError: the disk is full.
    """
    found: list[Path] = []
    place = places[0]
    try:
        for place in places:
            place.settle()
        # The first's marker comes last and goes first: with it the run is finished, or not.
        for place in reversed(places):
            inodes = {name: path.lstat().st_ino for name, path in place.names().items()}
            place.work.mark(places[0].work, inodes)
        for place in places:
            found.append(place.give())
    except (OSError, QtoolError, KeyboardInterrupt) as error:
        for given in places:
            given.undo()
        if isinstance(error, OSError):
            raise write_error(place.final, error) from error
        raise
    for place in places:
        place.done = True
    for place in places:
        place.work.close(keep=False)
    return found


def check_output_file(
    final: Path, *, overwrite: bool = False, sources: Sequence[Path] = ()
) -> Path:
    """Return the absolute path of an output file, or refuse it before any work is done.

    Raises:
        UsageError: a directory, a link, an input, or a file that is not to be replaced.
    """
    shown = shown_path(final)
    _check_name(final, *(final.parent / f"{final.stem}.{x}" for x in OutputFile.COMPANIONS))
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
    if taken and not overwrite and not WorkDirectory(final).pending():
        WorkDirectory(final).sweep()  # of a run that was killed when all was done
        raise UsageError(
            f"the output {shown if taken[0] == final else shown_path(taken[0])} exists",
            "choose another --output, or replace it with --overwrite",
        )
    return final


def _parts_of(final: Path) -> list[Path]:
    """Return the parts of a model in several files that `final` would be in one."""
    return sorted(final.parent.glob(f"{glob.escape(final.stem)}-?????-of-?????.gguf"))


def output_place(
    final: Path, *, overwrite: bool = False, sources: Sequence[Path] = (), resume: bool = False
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
    return kind(final, overwrite=overwrite, sources=sources, resume=resume)
