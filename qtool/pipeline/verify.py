"""Read a finished output back from the disk and check that it is what the plan promised."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qtool.checkpoint.locate import locate
from qtool.checkpoint.reader import TensorReader
from qtool.errors import DamagedError
from qtool.formats.reading import DenseSource
from qtool.pipeline.plan import Plan, PlannedOutput


def verify(plan: Plan, output: PlannedOutput, directory: Path) -> None:
    """Open an output as a model and unpack every linear the way an engine would.

    Raises:
        DamagedError: a tensor is missing, has another grid than planned, or is not finite.
    """
    checkpoint = locate(str(directory))
    json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with TensorReader(checkpoint.refs) as reader:
        source = DenseSource(checkpoint, reader)
        for linear in plan.linears:
            weight = _unpacked(source, linear.name, output)
            if tuple(weight.shape) != linear.shape or not bool(torch.isfinite(weight).all()):
                raise DamagedError(
                    f"verification failed: '{linear.name}' in {directory} does not read back as "
                    f"finite {list(linear.shape)}",
                    "this is a fault of the disk or a bug in qtool; nothing was kept",
                )


def _unpacked(source: DenseSource, name: str, output: PlannedOutput) -> torch.Tensor:
    if name not in source.grids:
        raise DamagedError(
            f"verification failed: '{name}' is not packed as {output.format.name}",
            "this is a bug in qtool; nothing was kept",
        )
    return source.read(f"{name}.weight")
