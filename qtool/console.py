"""The only module that prints: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from qtool.checkpoint.untrusted import printable
from qtool.errors import CapacityError, QtoolError
from qtool.json_text import json_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from qtool.pipeline.progress import LayerReport


WIDTH_OFF_TERMINAL = 1000
BAR_WIDTH = 12


class Terminal:
    """Where a command writes.

    Args:
        as_json: print one JSON object instead of tables.
        quiet: no progress; warnings and errors still show.
        verbose: also tracebacks of bugs.
        show_progress: draw progress at all.
    """

    def __init__(
        self,
        *,
        as_json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        show_progress: bool = True,
    ) -> None:
        self.as_json = as_json
        self.verbose = verbose
        self.quiet = quiet
        self.show_progress = show_progress and not quiet
        self.answered = False  # whether a result was printed
        # None where whoever started us closed it: rich then writes nowhere.
        file: Any = None if sys.stderr is None else _Stderr()
        self.err = Console(file=file, stderr=True, highlight=False, markup=False, emoji=False)
        self._progress: TerminalProgress | None = None

    def result(self, value: Mapping[str, Any], shown: RenderableType) -> None:
        """Print a command's result: the JSON object, or what a person reads.

        Raises:
            CapacityError: stdout is a file on a full disk.
        """
        self.answered = True
        _write_out(json_text(value) + "\n" if self.as_json else _rendered(shown))

    def note(self, message: str) -> None:
        """Print a line on stderr, unless quiet."""
        if not self.quiet:
            self.err.print(Text(printable_line(message)), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning on stderr."""
        self.err.print(Text(f"warning: {printable_line(message)}", style="yellow"), soft_wrap=True)

    def error(self, error: QtoolError) -> None:
        """Print what went wrong and what to do: two lines."""
        self.err.print(Text(f"error: {printable_line(error.message)}", style="red"), soft_wrap=True)
        if error.hint:
            self.err.print(Text(f"  try: {printable_line(error.hint)}"), soft_wrap=True)

    def progress(self) -> TerminalProgress:
        """Return the command's progress, which draws on stderr and keeps its warnings."""
        if self._progress is None:
            self._progress = TerminalProgress(self)
        return self._progress

    def close(self) -> None:
        """Take a progress display that is still drawn off the terminal."""
        if self._progress is not None:
            self._progress.clear()


class _Stderr:
    """Stderr that never fails: without a reader or on a full disk the work goes on, untold."""

    def write(self, text: str) -> int:
        with self._forgiving():
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            sys.stderr.flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            discard(sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def _rendered(shown: RenderableType) -> str:
    """Return what a person reads, for the terminal that stdout is, or for none."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    # Off a terminal nothing has to fit: tables keep their lines whole.
    width = None if on_terminal else WIDTH_OFF_TERMINAL
    page = io.StringIO()
    Console(
        file=page,
        force_terminal=on_terminal,
        highlight=False,
        markup=False,
        emoji=False,
        width=width,
    ).print(shown)
    if on_terminal:
        return page.getvalue()
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


def _write_out(text: str) -> None:
    """Write to stdout and have it arrive, so that a failure is seen while it can be told."""
    if sys.stdout is None:  # closed by whoever started us
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough: that is no failure of ours
        discard(sys.stdout)
    except OSError as error:
        discard(sys.stdout)
        raise CapacityError(
            f"cannot write the result to stdout: {error.strerror}",
            "free some space, or send stdout elsewhere; the work itself is done",
        ) from error


def finish_stdout() -> None:
    """Have what was printed arrive, help texts included; whoever read it may be gone."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        discard(sys.stdout)


def discard(stream: TextIO) -> None:
    """Send what is still buffered for a stream nowhere, so that closing it cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable_line(text: str) -> str:
    """Return text on one line with everything a terminal would obey escaped."""
    return "".join(printable(part) for part in _pieces(text.replace("\n", " ")))


def _pieces(text: str, size: int = 150) -> list[str]:
    """Split text so that `printable`, which shortens long names, keeps all of it."""
    return [text[start : start + size] for start in range(0, len(text), size)]


class TerminalProgress:
    """Progress as a bar with the current linear on a terminal, as one line per block elsewhere."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._shown = terminal.show_progress
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0
        self._first = 0  # steps that were done before the phase began
        self._title, self._unit = "", "block"
        self._started = 0.0
        self._width = 0  # of a drawn line without the linear at its end
        self._block: list[LayerReport] = []
        self._told = False  # whether this phase printed lines of its own
        self.warnings: list[tuple[str, str]] = []

    def start(self, title: str, total: int, *, unit: str = "block", done: int = 0) -> None:
        """Begin a phase of `total` steps, each a `unit`, the first of which may be `done`."""
        self._unit = unit
        self._title, self._total, self._done, self._first = title, total, done, done
        self._started = time.monotonic()
        self._block, self._told = [], False
        if not self._shown or not self._terminal.err.is_terminal:
            return
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=BAR_WIDTH),
            TextColumn(f"{unit} {{task.fields[step]}} of {{task.total:.0f}}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self._terminal.err,
            transient=True,
        )
        self._bars.start()
        self._width = len(
            f"{title} {BAR_WIDTH * ' '} {unit} {total} of {total} 0:00:00 left 0:00:00 "
        )
        self._task = self._bars.add_task(
            title, total=total, completed=done, step=min(done + 1, total), detail=""
        )

    def layer(self, report: LayerReport) -> None:
        """Note one finished linear."""
        self._block.append(report)
        if self._bars is not None and self._task is not None:
            # What does not fit is cut off here: rich would take the room from the times.
            room = max(self._terminal.err.width - self._width, 0)
            self._bars.update(self._task, detail=printable(_layer_line(report))[:room])

    def advance(self, detail: str) -> None:
        """Finish one step; off a terminal, print a line for it."""
        self._done += 1
        self._told = self._told or bool(detail)
        if self._bars is not None and self._task is not None:
            step = min(self._done + 1, self._total)
            self._bars.update(self._task, advance=1, step=step)
        elif self._shown and detail:
            self._terminal.err.print(Text(self._line(detail)), soft_wrap=True)
        self._block = []

    def _line(self, detail: str) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed / (self._done - self._first) * (self._total - self._done)
        parts = [f"{self._title}: {detail}"]
        ratios = [r.against_rtn for r in self._block if r.against_rtn is not None]
        errors = [r.relative_error for r in self._block]
        if errors:
            parts.append(f"error {sum(errors) / len(errors):.4f}")
        if ratios:
            parts.append(f"{sum(ratios) / len(ratios):.2f} x rtn")
        return ", ".join([*parts, f"{elapsed:.0f} s, {left:.0f} s left"])

    def note(self, message: str) -> None:
        """Show a line, unless quiet."""
        self._terminal.note(message)

    def warn(self, code: str, message: str) -> None:
        """Show a warning and keep it for the result."""
        self.warnings.append((code, message))
        self._terminal.warn(message)

    def finish(self) -> None:
        """End the phase."""
        if self._bars is None and self._shown and not self._told:
            elapsed = time.monotonic() - self._started
            many = f"{self._done} {self._unit}{'' if self._done == 1 else 's'}"
            line = printable_line(f"{self._title}: {many}, {elapsed:.0f} s")
            self._terminal.err.print(Text(line), soft_wrap=True)
        self.clear()

    def clear(self) -> None:
        """Stop drawing, whatever came of the phase."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _layer_line(report: LayerReport) -> str:
    name = report.name.split(".", 2)[-1]
    ratio = "" if report.against_rtn is None else f", {report.against_rtn:.2f} x rtn"
    return f"{name}: error {report.relative_error:.4f}{ratio}"
