"""How the pipeline reports what it does; the command line decides how that looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class LayerReport:
    """One quantized linear.

    Args:
        name: module path.
        grid: name of the grid.
        bits_per_weight: scales included.
        relative_error: ||(W - Q) X|| / ||W X|| on the calibration inputs, or without them
            ||W - Q|| / ||W||.
        against_rtn: squared error relative to round-to-nearest's on the same grid, from the same
            target; None where the method is round-to-nearest.
        seconds: wall time of its tap, shared equally by the linears of the tap.
        damp_percent: the damping that GPTQ used; None where there is none.
        damp_raised: whether that is more than the recipe's.
        fallback: what was given up for this linear, empty if nothing.
    """

    name: str
    grid: str
    bits_per_weight: float
    relative_error: float
    against_rtn: float | None
    seconds: float
    damp_percent: float | None = None
    damp_raised: bool = False
    fallback: str = ""


class Progress(Protocol):
    """Told what happens; all methods return at once."""

    def start(self, title: str, total: int, *, unit: str = "block", done: int = 0) -> None:
        """Begin a phase of `total` steps, each a `unit`, the first of which may be `done`."""

    def layer(self, report: LayerReport) -> None:
        """Note one finished linear."""

    def advance(self, detail: str) -> None:
        """Finish one step of the phase."""

    def note(self, message: str) -> None:
        """Say something that is no warning."""

    def warn(self, code: str, message: str) -> None:
        """Note something that the user should know."""

    def finish(self) -> None:
        """End the phase."""


class Silent:
    """Progress that nobody watches; collects warnings."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, str]] = []

    def start(self, title: str, total: int, *, unit: str = "block", done: int = 0) -> None:
        """Do nothing."""

    def layer(self, report: LayerReport) -> None:
        """Do nothing."""

    def advance(self, detail: str) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""

    def warn(self, code: str, message: str) -> None:
        """Keep the warning."""
        self.warnings.append((code, message))

    def finish(self) -> None:
        """Do nothing."""
