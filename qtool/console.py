"""The only module that prints: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.text import Text

from qtool.checkpoint.untrusted import printable
from qtool.errors import QtoolError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from qtool.pipeline.progress import LayerReport


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
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)

    def result(self, value: Mapping[str, Any], shown: RenderableType) -> None:
        """Print a command's result: the JSON object, or what a person reads."""
        if self.as_json:
            # Escaped to ASCII: names come from files, and a terminal must not obey them.
            sys.stdout.write(json.dumps(value, ensure_ascii=True, default=str) + "\n")
        else:
            self.out.print(shown)

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
        """Return progress that draws on stderr."""
        return TerminalProgress(self)


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
        self._title = ""
        self._started = 0.0
        self._block: list[LayerReport] = []
        self.warnings: list[tuple[str, str]] = []

    def start(self, title: str, total: int) -> None:
        """Begin a phase of `total` steps."""
        self._title, self._total, self._done = title, total, 0
        self._started = time.monotonic()
        self._block = []
        if not self._shown or not self._terminal.err.is_terminal:
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._terminal.err,
            transient=True,
        )
        self._bars.start()
        self._task = self._bars.add_task(title, total=total, detail="")

    def layer(self, report: LayerReport) -> None:
        """Note one finished linear."""
        self._block.append(report)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, detail=printable(_layer_line(report)))

    def advance(self, detail: str) -> None:
        """Finish one step; off a terminal, print a line for it."""
        self._done += 1
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task)
        elif self._shown and detail:
            self._terminal.err.print(Text(self._line(detail)), soft_wrap=True)
        self._block = []

    def _line(self, detail: str) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed / self._done * (self._total - self._done)
        parts = [f"{self._title}: {detail}"]
        ratios = [r.against_rtn for r in self._block if r.against_rtn is not None]
        errors = [r.relative_error for r in self._block]
        if errors:
            parts.append(f"error {sum(errors) / len(errors):.4f}")
        if ratios:
            parts.append(f"{sum(ratios) / len(ratios):.2f} x rtn")
        return ", ".join([*parts, f"{elapsed:.0f} s, {left:.0f} s left"])

    def warn(self, code: str, message: str) -> None:
        """Show a warning and keep it for the result."""
        self.warnings.append((code, message))
        self._terminal.warn(message)

    def finish(self) -> None:
        """End the phase."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _layer_line(report: LayerReport) -> str:
    name = report.name.split(".", 2)[-1]
    ratio = "" if report.against_rtn is None else f", {report.against_rtn:.2f} x rtn"
    return f"{name} {report.relative_error:.4f}{ratio}"
