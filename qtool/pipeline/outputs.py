"""What the plan and the engine ask of any output, whatever its files look like."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from qtool.checkpoint.written_tensors import WrittenTensors
from qtool.grids.protocol import QuantizedTensor

if TYPE_CHECKING:
    from qtool.pipeline.plan import Plan


@dataclass(frozen=True)
class CalibrationNote:
    """What a file says of the text behind it.

    Args:
        file: base name of the statistics' file, or what stands for one.
        datasets: base names, never paths.
        windows: how many were looked at.
        entries: weights for which there were statistics.
    """

    file: str
    datasets: tuple[str, ...]
    windows: int
    entries: int


class OutputWriter(Protocol):
    """Takes finished tensors and puts them in their place."""

    def write(self, name: str, quantized: QuantizedTensor) -> None:
        """Pack the linear of module path `name`."""

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that a transform rewrote; `name` is the checkpoint's."""

    @property
    def tensors(self) -> WrittenTensors:
        """The stored tensors."""

    def stored(self, name: str, names: Collection[str]) -> Tensor | None:
        """Return a rounded matrix of the checkpoint as this output holds it, dense, on the CPU.

        Args:
            name: the checkpoint's, such as `model.layers.0.mlp.up_proj.weight`.
            names: stored tensors that are there.

        Returns:
            None where it is not rounded, or none of `names` belongs to it.
        """

    def holds(self, name: str, names: Collection[str]) -> bool:
        """Tell whether stored tensors are everything of the linear of module path `name`."""

    def release(self) -> None:
        """Close what is open, and leave it as it is."""

    def finish(self, importance: Mapping[str, Tensor]) -> Mapping[str, str]:
        """Write everything that is left and close; return file name -> SHA-256.

        Args:
            importance: llama.cpp's tensor name -> [C], of matrices outside of blocks.
        """


class PlannedOutput(Protocol):
    """One result: a directory for an engine, or a GGUF file."""

    @property
    def name(self) -> str:
        """The format as one types it, such as `gptq` or `gguf:Q4_K_M`."""

    @property
    def loads_in(self) -> tuple[str, ...]:
        """Engines known to read it."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all weight files."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that is known of the files before a weight is."""

    @property
    def n_files(self) -> int:
        """How many weight files there are."""

    @property
    def working_files(self) -> tuple[str, ...]:
        """Names of the weight files, those that they have until they are complete included."""

    @property
    def kept(self) -> tuple[str, ...]:
        """Linears left as they are."""

    @property
    def weighs_head(self) -> bool:
        """Whether the head is rounded, so that what it reads matters."""

    @property
    def warnings(self) -> tuple[tuple[str, str], ...]:
        """(code, message) of what the user should know before anything starts."""

    def opened_at(self, destination: Path) -> Path:
        """Return what opens the result that is written to `destination`."""

    def noted(self, note: CalibrationNote | None) -> PlannedOutput:
        """Return the output with what its file says of the calibration text, if it says that."""

    def writer(self, plan: Plan, directory: Path, *, resume: bool = False) -> OutputWriter:
        """Create the files in `directory`, empty, and return what fills them.

        With `resume`, files that an earlier run left under the same plan are taken over.
        """

    def write_companions(self, plan: Plan, directory: Path) -> tuple[str, ...]:
        """Write the small files that belong beside the weights; return warnings."""

    def verify(self, plan: Plan, directory: Path) -> None:
        """Read everything back; DamagedError if it is not what was planned."""
