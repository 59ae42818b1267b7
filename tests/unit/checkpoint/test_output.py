"""A result appears whole or not at all, and nothing that is not a model is ever replaced."""

import errno
import os
from pathlib import Path

import pytest

from qtool.checkpoint.output import OutputDirectory, check_output, write_error
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
        assert partial.parent == output.final.parent
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
