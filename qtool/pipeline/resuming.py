"""What surrounds a run so that another process can go on with it: journal, room, interruptions."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from qtool import device as devices
from qtool.calibration.tokens import Windows
from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.output import OutputDirectory
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import (
    CapacityError,
    DamagedError,
    InterruptionError,
    NumericalError,
    QtoolError,
    UnsupportedError,
    UsageError,
    is_out_of_memory,
)
from qtool.pipeline.journal import Journal, begun_with
from qtool.pipeline.outputs import OutputWriter
from qtool.pipeline.plan import Plan
from qtool.recipe.sizes import shown_size

# Room for the small files beside the weights, and for what others write meanwhile.
SPARE_BYTES = 16 << 20


def opened_journal(
    path: Path, device: torch.device, identity: Callable[[], Mapping[str, Any]]
) -> Journal:
    """Open the journal of a run, or begin one.

    The run goes on with as many threads as it was begun with: sums may depend on their number.

    Args:
        path: of the journal.
        device: where the run computes.
        identity: asked what the run is, once the number of threads is settled.

    Raises:
        UsageError: an unfinished run is there with other settings.
        DamagedError: a source file cannot be read.
    """
    threads = begun_with(path, "threads")
    if device.type == "cpu" and isinstance(threads, int) and 0 < threads <= 4096:
        devices.use_threads(threads)
    return Journal(path, identity())


@contextlib.contextmanager
def closing_writer(writer: OutputWriter) -> Iterator[OutputWriter]:
    """Close a writer's files whatever happens, leaving them as they are."""
    try:
        yield writer
    finally:
        writer.release()


def clear(directory: Path, *, but: Collection[str] = ()) -> None:
    """Remove everything below a directory except files of some names.

    Raises:
        DamagedError: something cannot be removed.
    """
    try:
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in but:
                path.unlink()
    except OSError as error:
        raise write_error(directory, error) from error


class LeftForALaterRun:
    """Keeps finished blocks where running again may get further, and says so; a context manager.

    A run that would fail in the same way again - a setting, a weight that is not finite, an output
    that does not read back - leaves nothing.

    Args:
        places: of the outputs.
        path: of the journal.
        n_blocks: of the model.
    """

    def __init__(self, places: Sequence[OutputDirectory], path: Path, n_blocks: int) -> None:
        self._places = places
        self._path = path
        self._n_blocks = n_blocks
        self.journal: Journal | None = None  # to be set once it is open
        self.complete = False  # to be set once everything is done but the outputs' names

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or all(place.done for place in self._places):
            return
        if self.journal is None:
            if self._path.exists():  # an earlier run's, perhaps one that this may not continue
                self._keep()
            return
        done = len(self.journal.blocks)
        if not done or not (self.complete or _may_get_further(error)):
            return
        self._keep()
        again = f"run the same command to go on: {done} of {self._n_blocks} blocks are kept in "
        again += shown_path(self._path.parent)
        if isinstance(error, KeyboardInterrupt):
            raise InterruptionError("interrupted", again, resumable=True) from error
        if is_out_of_memory(error):
            advice = f"free some memory, or set a smaller --max-ram budget; then {again}"
            raise CapacityError("out of memory", advice, resumable=True) from error
        if isinstance(error, OSError):
            error = write_error(Path(error.filename or self._path.parent), error)
            error.hint = f"{error.hint}; then {again}"
            error.resumable = True
            raise error
        if isinstance(error, QtoolError) and not _says_so(error):
            error.hint = f"{error.hint}; then {again}" if error.hint else again
            error.resumable = True

    def _keep(self) -> None:
        for place in self._places:
            place.keep()


def _says_so(error: QtoolError) -> bool:
    return error.resumable and "run the same command to go on" in error.hint


def _may_get_further(error: BaseException) -> bool:
    if isinstance(error, UsageError | UnsupportedError | NumericalError):
        return False
    return error.resumable if isinstance(error, DamagedError) else True


def check_space(
    plan: Plan,
    partials: Sequence[Path],
    states: Path,
    windows: Windows | None,
    device: torch.device,
) -> None:
    """Refuse to go on with a run that will not have room on the disk.

    Asked before any work is done, and again before each block: others may fill the disk meanwhile.

    Args:
        plan: says how large everything will be.
        partials: where the outputs are written.
        states: where hidden states are kept.
        windows: calibration tokens, whose hidden states are kept for a later run.
        device: where the model runs.

    Raises:
        CapacityError: says what is needed and what is free.
    """
    needs: dict[int, int] = {}
    for output, partial in zip(plan.outputs, partials, strict=True):
        disk = partial.stat().st_dev
        needs[disk] = needs.get(disk, 0) + output.n_bytes - _taken(partial)
    if windows is not None and plan.calibrated:
        first = partials[0].stat().st_dev
        streams = 2 if plan.recipe.quantize.error_propagation > 0 else 1
        dtype = devices.compute_dtype(plan.dtype, device)
        kept = streams * state_bytes(plan.checkpoint.config, windows, dtype)
        needs[first] += max(0, kept - _taken(states))
    for partial in partials:
        _refuse_full(partial, needs.pop(partial.stat().st_dev, 0))


def check_state_space(partial: Path, states: Path, needed: int) -> None:
    """Refuse to go on where hidden states will not have room.

    Args:
        partial: where the output is written.
        states: where hidden states are kept, on the same disk.
        needed: bytes that they take.

    Raises:
        CapacityError: says what is needed and what is free.
    """
    _refuse_full(partial, max(0, needed - _taken(states)))


def _refuse_full(partial: Path, bytes_to_write: int) -> None:
    needed = bytes_to_write + SPARE_BYTES
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise CapacityError(
            f"the disk of {shown_path(partial.parents[1])} has {shown_size(free)} free, "
            f"{shown_size(needed)} are needed",
            "free some space or choose another --output",
            resumable=True,
        )


def state_bytes(config: Mapping[str, Any], windows: Windows, dtype: torch.dtype) -> int:
    """Return the most bytes that the hidden states of a stream take on the disk meanwhile.

    The old ones go when the new ones are there.
    """
    return 2 * windows.ids.numel() * int(config["hidden_size"]) * dtype.itemsize


def _taken(directory: Path) -> int:
    """Return the bytes that files below a directory take on the disk already."""
    found = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                found += (Path(root) / name).lstat().st_blocks * 512
    return found
