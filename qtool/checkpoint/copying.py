"""Copy the small files of a model, byte for byte."""

from __future__ import annotations

from pathlib import Path

from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.untrusted import open_regular

CHUNK_BYTES = 1 << 20


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, making the directories of its copy; what fails is named: source or copy.

    Raises:
        DamagedError: the source cannot be read, or the disk of the copy failed.
        CapacityError: the disk is full.
        UsageError: the copy may not be written.
    """
    with open_regular(source)[0] as file:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as copy:
                while chunk := file.read(CHUNK_BYTES):
                    copy.write(chunk)
        except OSError as error:
            raise write_error(target, error) from error
