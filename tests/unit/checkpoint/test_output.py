"""A result appears whole or not at all, and nothing that is not a model is ever replaced."""

import contextlib
import errno
import os
import pwd
from pathlib import Path

import pytest
from builders.faults import in_fork

from qtool.checkpoint import output, work_directory
from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.output import (
    OutputDirectory,
    OutputFile,
    check_output,
    commit_all,
)
from qtool.checkpoint.work_directory import work_path
from qtool.errors import CapacityError, DamagedError, UsageError


def model_at(path, text="old"):
    path.mkdir(parents=True)
    (path / "config.json").write_text(text)
    return path


def test_commit_gives_the_directory_its_name(tmp_path):
    output = OutputDirectory(tmp_path / "new" / "deep" / "out")
    with output as partial:
        (partial / "config.json").write_text("new")
        assert not output.final.exists()
        assert partial.parent == work_path(output.final)
        assert partial.parent.parent == output.final.parent
        output.commit()
    assert (tmp_path / "new/deep/out/config.json").read_text() == "new"
    assert [path.name for path in (tmp_path / "new/deep").iterdir()] == ["out"]


@pytest.mark.parametrize("fail", [True, False])
def test_without_commit_nothing_is_left(tmp_path, fail):
    def attempt():
        with OutputDirectory(tmp_path / "new" / "out") as partial:
            (partial / "half").write_text("half")
            if fail:
                raise KeyboardInterrupt

    if fail:
        with pytest.raises(KeyboardInterrupt):
            attempt()
    else:
        attempt()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_may_become_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    output = OutputDirectory(tmp_path / "out")
    with output as partial:
        (partial / "config.json").write_text("new")
        output.commit()
    assert (tmp_path / "out/config.json").read_text() == "new"


def test_a_user_without_a_home_may_overwrite(tmp_path, monkeypatch):
    """As in a container that runs under a number which /etc/passwd does not know."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    old = model_at(tmp_path / "out")
    assert check_output(old, overwrite=True) == old


def test_overwrite_replaces_only_at_the_end(tmp_path):
    old = model_at(tmp_path / "out")
    (old / "old-shard").write_text("old")
    output = OutputDirectory(old, overwrite=True)
    with output as partial:
        (partial / "config.json").write_text("new")
        assert (old / "config.json").read_text() == "old"
        output.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in old.iterdir()] == ["config.json"]
    assert (old / "config.json").read_text() == "new"


def test_overwrite_keeps_the_old_one_when_the_new_one_fails(tmp_path):
    old = model_at(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), OutputDirectory(old, overwrite=True):
        _ = 1 / 0
    assert (old / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    old = model_at(tmp_path / "out")
    output = OutputDirectory(old, overwrite=True)
    rename = Path.rename

    def fails_for_the_new(self, target):
        if self == output.partial:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    monkeypatch.setattr(work_directory, "exchange", lambda *_: False)  # as on an old kernel
    with pytest.raises(DamagedError, match="Input/output error"), output:
        output.commit()
    assert (old / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_filled_meanwhile_is_not_replaced(tmp_path):
    output = OutputDirectory(tmp_path / "out")
    with output:
        model_at(tmp_path / "out", "another run")
        with pytest.raises(UsageError, match="not empty"):
            output.commit()
    assert (tmp_path / "out/config.json").read_text() == "another run"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refused(path, hint, **options):
    with pytest.raises(UsageError) as caught:
        check_output(path, **options)
    assert caught.value.exit_code == 2
    assert hint in caught.value.hint


def test_what_is_in_the_way_is_refused(tmp_path):
    model_at(tmp_path / "model")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "model", "--overwrite")
    refused(tmp_path / "file", "--output", overwrite=True)
    refused(tmp_path / "link", "directory", overwrite=True)


def test_a_directory_that_is_no_model_is_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    refused(tmp_path / "thesis", "config.json", overwrite=True)


def test_home_and_the_working_directory_are_never_overwritten(tmp_path, monkeypatch):
    home = model_at(tmp_path / "home")
    inside = model_at(home / "here")
    monkeypatch.setenv("HOME", str(home))
    refused(home, "yourself", overwrite=True)
    monkeypatch.chdir(inside)
    refused(Path(), "yourself", overwrite=True)
    refused(inside, "yourself", overwrite=True)


def test_the_input_is_never_the_output(tmp_path):
    source = model_at(tmp_path / "models" / "source")
    for final in (source, source / "out", source.parent, source / ".." / "source"):
        refused(final, "--output", overwrite=True, sources=[source])
    (tmp_path / "alias").symlink_to(source)
    refused(source, "--output", overwrite=True, sources=[tmp_path / "alias"])


def test_a_relative_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_output(Path("out")) == tmp_path / "out"
    assert check_output(Path("a/../out")) == tmp_path / "out"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, CapacityError),
        (errno.EDQUOT, CapacityError),
        (errno.EACCES, UsageError),
        (errno.EROFS, UsageError),
        (errno.EIO, DamagedError),
    ],
)
def test_trouble_with_the_disk_is_named(number, kind):
    refusal = write_error(Path("/out/x"), OSError(number, os.strerror(number)))
    assert type(refusal) is kind
    assert "/out/x" in refusal.message
    assert os.strerror(number) in refusal.message


def test_an_output_below_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError), OutputDirectory(tmp_path / "file" / "out"):
        pass


# --- what a killed process leaves ------------------------------------------------------------


def killed(place, content="new"):
    """Enter a place, write into it, and leave it as a killed process would: locked no more."""
    partial = place.__enter__()
    (partial / "config.json").write_text(content)
    return partial


def forget(place):
    """Release the lock, as the kernel does when a process ends."""
    os.close(place.work._lock)


def test_two_runs_to_one_output_are_refused(tmp_path):
    with OutputDirectory(tmp_path / "out"):
        with pytest.raises(UsageError, match="another process is writing"):
            OutputDirectory(tmp_path / "out").__enter__()
        assert work_path(tmp_path / "out").exists()


def test_what_a_killed_process_left_is_removed_or_taken_over(tmp_path):
    first = OutputDirectory(tmp_path / "out")
    killed(first, "left")
    forget(first)
    with OutputDirectory(tmp_path / "out", resume=True) as partial:
        assert (partial / "config.json").read_text() == "left"
    assert list(tmp_path.iterdir()) == []  # unless it is kept


def test_what_is_kept_is_there_for_the_next_run(tmp_path):
    with (place := OutputDirectory(tmp_path / "out", resume=True)) as partial:
        (partial / "config.json").write_text("kept")
        place.keep()
    with OutputDirectory(tmp_path / "out", resume=True) as partial:
        assert (partial / "config.json").read_text() == "kept"
    with OutputDirectory(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_a_process_killed_after_its_last_rename_is_seen_as_not_finished(
    tmp_path, monkeypatch, old, swaps
):
    if not swaps:
        monkeypatch.setattr(work_directory, "exchange", lambda *_: False)
    if old:
        model_at(tmp_path / "out")
    place = OutputDirectory(tmp_path / "out", overwrite=old)
    killed(place)
    monkeypatch.setattr(work_directory.WorkDirectory, "close", lambda *_, **__: None)
    place.commit()
    monkeypatch.undo()
    forget(place)
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    again = OutputDirectory(tmp_path / "out", overwrite=old, resume=True)  # nothing is in the way
    with again as partial:
        assert (partial / "config.json").read_text() == "new"
        assert (tmp_path / "out").exists() == old
        again.commit()
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_outputs_get_their_names_together_or_not_at_all(tmp_path, monkeypatch):
    places = [OutputDirectory(tmp_path / name) for name in "abc"]
    for place in places:
        killed(place)
    give = OutputDirectory.give

    def fails_for_b(self):
        if self is places[1]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return give(self)

    monkeypatch.setattr(OutputDirectory, "give", fails_for_b)
    with pytest.raises(DamagedError):
        commit_all(places)
    assert [path.name for path in tmp_path.iterdir() if path.name in "abc"] == []
    monkeypatch.undo()
    assert commit_all(places) == [tmp_path / name for name in "abc"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_files_that_have_their_names_already_are_taken_back(tmp_path, monkeypatch):
    place = OutputFile(tmp_path / "x.gguf")
    partial = place.__enter__()
    for name in ("x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "Modelfile"):
        (partial / name).write_text(name)
    monkeypatch.setattr(work_directory.WorkDirectory, "close", lambda *_, **__: None)
    place.commit()
    monkeypatch.undo()
    forget(place)
    assert (tmp_path / "x.Modelfile").exists()
    with OutputFile(tmp_path / "x.gguf", resume=True) as partial:
        assert (partial / "x-00001-of-00002.gguf").exists()
        assert not list(tmp_path.glob("x*"))


OLD = ("x-00001-of-00003.gguf", "x-00002-of-00003.gguf", "x-00003-of-00003.gguf", "x.Modelfile",
       "x.qtool-report.json", "x.qtool-recipe.yaml")  # fmt: skip
REPLACEMENTS = {
    "one file": ("x.gguf",),
    "two parts": ("x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "qtool-recipe.yaml"),
}


def texts(directory):
    return {p.name: p.read_text() for p in directory.iterdir() if not p.name.startswith(".")}


def replacing(tmp_path, names):
    """A place whose result has `names`, where a model in three parts with companions lies."""
    for name in OLD:
        (tmp_path / name).write_text(f"old {name}")
    place = OutputFile(tmp_path / "x.gguf", overwrite=True)
    partial = place.__enter__()
    for name in names:
        (partial / name).write_text("new")
    return place


def given(names):
    return {name if name.startswith("x") else f"x.{name}": "new" for name in names}


@pytest.mark.parametrize("names", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_nothing_of_a_replaced_model_stays_beside_the_new_one(tmp_path, names):
    place = replacing(tmp_path, names)
    place.commit()
    place.__exit__(None, None, None)
    assert texts(tmp_path) == given(names)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_modelfile_stays_beside_a_replaced_file_that_it_names(tmp_path):
    (tmp_path / "x.gguf").write_text("old")
    (tmp_path / "x.Modelfile").write_text("edited by hand")
    place = OutputFile(tmp_path / "x.gguf", overwrite=True)
    (place.__enter__() / "x.gguf").write_text("new")
    place.commit()
    assert texts(tmp_path) == {"x.gguf": "new", "x.Modelfile": "edited by hand"}


@pytest.mark.parametrize("names", REPLACEMENTS.values(), ids=REPLACEMENTS)
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["give_file", "set_aside", "sync"])
def test_whatever_stops_a_replacement_all_of_the_old_model_is_there(
    tmp_path, monkeypatch, names, error, step
):
    place = replacing(tmp_path, names)
    old = texts(tmp_path)
    where = work_directory.WorkDirectory if step != "sync" else output
    right, calls = getattr(where, step), []

    def stops_last(*arguments):
        right(*arguments)
        if step != "sync" or arguments[0] == tmp_path:
            calls.append(arguments)
            if len(calls) == (len(names) if step == "give_file" else 1):
                raise error

    monkeypatch.setattr(where, step, stops_last)
    with pytest.raises((DamagedError, KeyboardInterrupt)):
        place.commit()
    assert calls
    assert texts(tmp_path) == old
    monkeypatch.undo()
    place.__exit__(None, None, None)
    assert texts(tmp_path) == old


def test_what_cannot_be_undone_is_undone_by_the_next_run(tmp_path, monkeypatch):
    names = REPLACEMENTS["two parts"]
    place = replacing(tmp_path, names)
    old = texts(tmp_path)

    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(output, "sync", lambda path: broken() if path == tmp_path else None)
    monkeypatch.setattr(work_directory.WorkDirectory, "take_back", broken)
    with pytest.raises(DamagedError):
        place.commit()
    place.__exit__(None, None, None)
    monkeypatch.undo()
    assert texts(tmp_path) != old
    with OutputFile(tmp_path / "x.gguf", overwrite=True):
        assert texts(tmp_path) == old
    assert texts(tmp_path) == old
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_outputs_that_were_moved_halfway_through_the_last_step_are_taken_up(tmp_path):
    """The first of two had its name when the process died; then the directory got another."""
    (tmp_path / "old").mkdir()

    def places(parent):
        return [OutputDirectory(parent / name, resume=True) for name in ("a", "b")]

    def killed():
        first, second = places(tmp_path / "old")
        for place in (first, second):
            (place.__enter__() / "config.json").write_text(place.final.name)
        second.give = lambda: os._exit(9)
        commit_all([first, second])

    assert in_fork(killed) == 9
    assert (tmp_path / "old" / "a").exists()
    (tmp_path / "old").rename(tmp_path / "new")
    found = places(tmp_path / "new")
    with contextlib.ExitStack() as stack:
        for place in found:
            partial = stack.enter_context(place)
            assert (partial / "config.json").read_text() == place.final.name
        commit_all(found)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a", "b"]


@pytest.mark.parametrize("marked", [True, False])
def test_only_files_of_the_result_are_brought_back(tmp_path, marked):
    """Of a work directory that came with somebody's archive."""
    place = OutputFile(tmp_path / "x.gguf")
    place.work.path.mkdir()
    aside = place.work.path / "aside"
    aside.mkdir()
    (aside / "x-00001-of-00002.gguf").write_text("ours")
    (aside / "other.gguf").write_text("no name of this result")
    (aside / "x.Modelfile").symlink_to("/etc/passwd")
    if marked:
        (place.work.path / "committing").write_text('{"first": "/nowhere", "inodes": {}}')
    place.work.open()
    place.work.recover()
    assert texts(tmp_path) == {"x-00001-of-00002.gguf": "ours"}


def test_a_link_in_place_of_the_work_directory_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    work_path(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        OutputDirectory(tmp_path / "out").__enter__()
    assert list((tmp_path / "elsewhere").iterdir()) == []
