"""What makes a run the one it is: everything that decides the bytes of its result."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qtool import device as devices
from qtool.calibration.tokens import Windows
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.shards import file_digest
from qtool.checkpoint.untrusted import reading
from qtool.pipeline.artifact import environment
from qtool.pipeline.plan import Plan

# Keys of a recipe that change nothing in the weights: gates and texts to measure on may change
# between two halves of a run.
WITHOUT_EFFECT = ("metadata", "eval", "gates", "output", "ladder")
HASHED_AT_ONCE = 4  # files


def identity_of(
    plan: Plan,
    device: torch.device,
    windows: Windows | None,
    statistics: Path | None,
) -> dict[str, Any]:
    """Return nested mappings that are equal for two runs with the same result.

    Args:
        plan: what is done.
        device: where.
        windows: calibration tokens.
        statistics: file that stands for them.

    Raises:
        DamagedError: a source file cannot be read.
    """
    recipe = plan.recipe.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))
    recipe.pop("model", None)  # known by its files
    found: dict[str, Any] = {
        **recipe,
        **_surroundings(plan.checkpoint, device),
        "outputs": [output.fingerprint for output in plan.outputs],
    }
    if windows is not None and plan.calibrated:
        found["calibration_tokens"] = _tokens(windows)
    if statistics is not None:
        found["statistics"] = {"sha256": file_digest(statistics)}
    return found


def calibration_identity(
    checkpoint: Checkpoint, device: torch.device, windows: Windows
) -> dict[str, Any]:
    """Return nested mappings that are equal for two calibrations with the same result.

    Raises:
        DamagedError: a source file cannot be read.
    """
    surroundings = _surroundings(checkpoint, device)
    return {"command": "calibrate", **surroundings, "calibration_tokens": _tokens(windows)}


def _surroundings(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    return {
        "source": source_digests(checkpoint),
        "versions": environment(),
        "device": devices.kind(device),
        "threads": devices.threads() if device.type == "cpu" else 0,
    }


def _tokens(windows: Windows) -> dict[str, Any]:
    return {
        "windows": len(windows.ids),
        "length": int(windows.ids.shape[1]),
        "sha256": windows.sha256,
    }


def _digest(path: Path) -> str:
    with reading(path):
        status = path.stat()
    return _digest_of(path, (status.st_size, status.st_mtime_ns, status.st_ino))


@lru_cache(maxsize=4096)
def _digest_of(path: Path, status: tuple[int, ...]) -> str:
    """Hash a file once in a process, however many formats and rungs are made from it."""
    del status
    return file_digest(path)


def source_digests(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, str]]:
    """Return the SHA-256 of every file that the result depends on, by name.

    Raises:
        DamagedError: one cannot be read.
    """
    paths = sorted({ref.file for ref in checkpoint.refs.values()} | set(checkpoint.extra_files))
    config = checkpoint.path / "config.json"
    paths += [config] if config.is_file() and config not in paths else []
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        digests = list(pool.map(_digest, paths))
    names = [path.relative_to(checkpoint.path).as_posix() for path in paths]
    return {name: {"sha256": digest} for name, digest in zip(names, digests, strict=True)}
