"""Calibration statistics as an importance-matrix GGUF, the layout that llama.cpp's tools use.

For each linear: `NAME.in_sum2` [1, C] float32, the sum of x^2, and `NAME.counts` [1, 1], the
tokens summed over; NAME is llama.cpp's tensor name. qtool adds `NAME.in_abs` [1, C], the sum of
|x|, which AWQ needs and other readers skip. Layout: llama.cpp, tools/imatrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtool.calibration.moments import Moments
from qtool.errors import DamagedError, UsageError

SUM_SQUARES, SUM_ABSOLUTE, COUNTS = ".in_sum2", ".in_abs", ".counts"
MAGIC = b"GGUF"


@dataclass(frozen=True)
class Statistics:
    """Diagonal moments of the inputs of linears, by llama.cpp's tensor name."""

    moments: Mapping[str, Moments]
    datasets: tuple[str, ...]
    windows: int
    sequence_length: int


def tensor_names(architecture: str, n_blocks: int, linears: list[str]) -> dict[str, str]:
    """Return llama.cpp's tensor name of each linear, such as `blk.0.attn_q.weight`.

    Args:
        architecture: llama.cpp's name of it.
        n_blocks: how many blocks the model has.
        linears: full module paths.
    """
    import gguf

    by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[architecture], n_blocks)
    names = {linear: table.get_name(linear) for linear in linears}
    return {linear: f"{name}.weight" for linear, name in names.items() if name is not None}


def write_statistics(path: Path, statistics: Statistics, architecture: str) -> None:
    """Write the file; the caller gives it its final name when it is complete."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(statistics.datasets))
    writer.add_uint32("imatrix.chunk_count", statistics.windows)
    writer.add_uint32("imatrix.chunk_size", statistics.sequence_length)
    for name, moments in statistics.moments.items():
        count = float(moments.tokens)
        squares = (moments.diagonal.cpu() * count).numpy()[None]
        absolute = (moments.mean_abs.cpu() * count).numpy()[None]
        writer.add_tensor(name + SUM_SQUARES, np.ascontiguousarray(squares, np.float32))
        writer.add_tensor(name + COUNTS, np.full((1, 1), count, np.float32))
        writer.add_tensor(name + SUM_ABSOLUTE, np.ascontiguousarray(absolute, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_statistics(path: Path) -> Statistics:
    """Read a file that `write_statistics` or llama.cpp's own tool wrote.

    Raises:
        UsageError: no such file, or not statistics in GGUF.
        DamagedError: truncated, or values that cannot be sums of squares.
    """
    import gguf

    hint = "make one with: qtool calibrate MODEL -o stats.gguf"
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(f"cannot read statistics {path}: {error.strerror}", hint) from error
    if magic != MAGIC:
        raise UsageError(f"{path} is not a GGUF statistics file", hint)
    try:
        reader = gguf.GGUFReader(str(path))
        tensors = {t.name: np.array(t.data, np.float32) for t in reader.tensors}
        fields = {k: f.contents() for k, f in reader.fields.items() if k.startswith("imatrix.")}
        chunks = int(fields.get("imatrix.chunk_count") or 0)
        length = int(fields.get("imatrix.chunk_size") or 0)
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise DamagedError(f"{path} is truncated or malformed: {error}", hint) from error
    moments = {
        name.removesuffix(SUM_SQUARES): _moments(path, name.removesuffix(SUM_SQUARES), tensors)
        for name in tensors
        if name.endswith(SUM_SQUARES)
    }
    if not moments:
        raise UsageError(f"{path} holds no calibration statistics", hint)
    return Statistics(
        moments,
        tuple(_strings(fields.get("imatrix.datasets"))),
        chunks,
        length,
    )


def _moments(path: Path, name: str, tensors: Mapping[str, Any]) -> Moments:
    squares = tensors[name + SUM_SQUARES].reshape(-1)
    counts = tensors.get(name + COUNTS)
    if counts is None or counts.size != 1 or not 1 <= counts.flat[0] < math.inf:
        raise DamagedError(f"{path}: '{name}' has no token count", "run qtool calibrate again")
    count = float(counts.flat[0])
    absolute = tensors.get(name + SUM_ABSOLUTE)
    sums = [squares] if absolute is None else [squares, absolute]
    if any(not np.isfinite(values).all() or (values < 0).any() for values in sums):
        raise DamagedError(
            f"{path}: '{name}' has sums that are negative or not finite",
            "run qtool calibrate again",
        )
    if absolute is not None and absolute.size != squares.size:
        raise DamagedError(
            f"{path}: '{name}' has {squares.size} sums of squares but {absolute.size} of |x|",
            "run qtool calibrate again",
        )
    # llama.cpp's files have no mean |x|; the root mean square orders inputs almost alike.
    mean = np.sqrt(squares / count) if absolute is None else absolute.reshape(-1) / count
    return Moments(int(count), torch.from_numpy(mean.copy()), torch.from_numpy(squares / count))


def _strings(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]
