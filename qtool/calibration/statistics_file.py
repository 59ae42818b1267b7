"""Calibration statistics as an importance-matrix GGUF, the layout that llama.cpp's tools use.

For each tensor: `NAME.in_sum2` [matrices, C] float32, the sum of x^2, and `NAME.counts`
[matrices, 1], the tokens summed over; NAME is llama.cpp's tensor name, and there is more than one
matrix where a tensor holds the experts of a layer. qtool adds `NAME.in_abs` [1, C], the sum of
|x|, which AWQ needs and other readers skip. llama.cpp's own files may add `in_sum` and `stats`,
which qtool skips. Layout: llama.cpp b11549, tools/imatrix and common/imatrix-loader.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.calibration.importance_repair import Faults, Floats, usable_magnitudes, usable_means
from qtool.calibration.legacy_imatrix import LegacyMatrix
from qtool.calibration.moments import Moments
from qtool.calibration.statistics_source import (
    COUNTS,
    HINT,
    SUM_ABSOLUTE,
    SUM_SQUARES,
    open_statistics,
)
from qtool.checkpoint.gguf_file import GgufTensor, plan_gguf
from qtool.checkpoint.gguf_header import GgufContents
from qtool.checkpoint.gguf_values import many, text, u32
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import DamagedError

CHUNK_COUNT, CHUNK_SIZE, DATASETS = (
    "imatrix.chunk_count",
    "imatrix.chunk_size",
    "imatrix.datasets",
)
LEGACY_CHUNK = 512  # tokens of a call; the old files do not say, and this is llama.cpp's default


@dataclass(frozen=True)
class ExpertMoments:
    """Mean x^2 of the inputs of each expert of one tensor.

    Args:
        counts: [experts] float32, tokens that each expert saw.
        diagonal: [experts, C] float32; ones where there was no token.
    """

    counts: Tensor
    diagonal: Tensor


@dataclass(frozen=True)
class Statistics:
    """Diagonal moments of the inputs of linears, by llama.cpp's tensor name.

    Args:
        moments: of tensors with one set of inputs. Where a file does not tell experts apart, they
            lie end to end in one vector.
        datasets: what the text was; base names.
        windows: of it.
        sequence_length: tokens of a window.
        experts: of tensors that hold several matrices, each with inputs of its own.
        warnings: one line for each kind of thing that was wrong in a file.
        unusable: tensors that are there, of which no value can be used.
    """

    moments: Mapping[str, Moments]
    datasets: tuple[str, ...]
    windows: int
    sequence_length: int
    experts: Mapping[str, ExpertMoments] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    unusable: frozenset[str] = frozenset()

    def importance(self, name: str) -> Tensor | None:
        """Return mean x^2 of a tensor's inputs, [C] or [experts, C]; None if it is not known."""
        if name in self.experts:
            return self.experts[name].diagonal
        return self.moments[name].diagonal if name in self.moments else None


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
    """Write the file; the caller gives it its final name when it is complete.

    Raises:
        OSError: the disk is full or failed.
    """
    metadata = {
        "general.architecture": text(architecture),
        "general.type": text("imatrix"),
        DATASETS: many("string", statistics.datasets or ("unknown",)),
        CHUNK_COUNT: u32(statistics.windows),
        CHUNK_SIZE: u32(statistics.sequence_length),
    }
    arrays: dict[str, Floats] = {}
    for name, moments in statistics.moments.items():
        count = float(moments.tokens)
        squares = (moments.diagonal.cpu() * count).numpy()[None]
        absolute = (moments.mean_abs.cpu() * count).numpy()[None]
        arrays[name + SUM_SQUARES] = np.ascontiguousarray(squares, np.float32)
        arrays[name + COUNTS] = np.full((1, 1), count, np.float32)
        arrays[name + SUM_ABSOLUTE] = np.ascontiguousarray(absolute, np.float32)
    for name, found in statistics.experts.items():
        counts = found.counts[:, None]
        arrays[name + SUM_SQUARES] = (found.diagonal * counts).contiguous().numpy()
        arrays[name + COUNTS] = counts.contiguous().numpy()
    tensors = [GgufTensor(name, "F32", array.shape) for name, array in arrays.items()]
    plan = plan_gguf(metadata, tensors, file="statistics.gguf")
    # Not numpy's tofile, which does not say why a disk took no more.
    with path.open("wb") as file:
        file.write(plan.files[0].header)
        for name, array in arrays.items():
            file.write(bytes(plan.places[name].start - file.tell()))
            file.write(array.astype("<f4").data)
        file.write(bytes(plan.files[0].n_bytes - file.tell()))


def read_statistics(path: Path) -> Statistics:
    """Read what `write_statistics` or llama.cpp's own tool wrote, in GGUF or its older form.

    Values that cannot be sums of squares are replaced, and a tensor without usable ones is left
    out; `warnings` says so.

    Raises:
        UsageError: no such file, or not statistics.
        DamagedError: truncated or malformed.
    """
    found = open_statistics(path)
    if isinstance(found, LegacyMatrix):
        return _from_legacy(path, found)
    return _from_gguf(found)


def _from_gguf(contents: GgufContents) -> Statistics:
    where = shown_path(contents.path)
    refs = {ref.name: ref for ref in contents.tensors}
    names = [name.removesuffix(SUM_SQUARES) for name in refs if name.endswith(SUM_SQUARES)]
    moments: dict[str, Moments] = {}
    experts: dict[str, ExpertMoments] = {}
    faults = Faults()
    for name in names:
        squares, counts, absolute = _sums(where, name, refs)
        means = usable_means(name, squares, counts, faults)
        if means is None:
            continue
        if len(counts) > 1:
            tokens = np.where(np.isfinite(counts) & (counts > 0), counts, 0).astype(np.float32)
            experts[name] = ExpertMoments(torch.from_numpy(tokens), torch.from_numpy(means))
            continue
        magnitudes = usable_magnitudes(absolute, counts, means)
        moments[name] = _moments(round(float(counts[0])), magnitudes, means)
    return Statistics(
        moments,
        _datasets(contents),
        _integer(contents, CHUNK_COUNT),
        _integer(contents, CHUNK_SIZE),
        experts,
        faults.warnings(where),
        frozenset(faults.unusable),
    )


def _sums(
    where: str, name: str, refs: Mapping[str, TensorRef]
) -> tuple[Floats, Floats, Floats | None]:
    """Read sums of squares [matrices, C], counts [matrices] and, if there, sums of |x|."""
    squares = _floats(where, refs[name + SUM_SQUARES])
    counts = _floats(where, refs[name + COUNTS])
    absolute = _floats(where, refs[name + SUM_ABSOLUTE]) if name + SUM_ABSOLUTE in refs else None
    shape = (counts.size, squares.size // counts.size)
    return squares.reshape(shape), counts, None if absolute is None else absolute.reshape(shape)


def _floats(where: str, ref: TensorRef) -> Floats:
    """Return a tensor's values, flat."""
    try:
        raw = np.fromfile(ref.file, "<f4", ref.n_bytes // 4, offset=ref.start)
    except OSError as error:
        raise DamagedError(f"{where} cannot be read: {error.strerror}", HINT) from error
    if raw.nbytes != ref.n_bytes:
        raise DamagedError(f"{where} was cut short while it was read", HINT)
    return raw.astype(np.float32)


def _from_legacy(path: Path, found: LegacyMatrix) -> Statistics:
    moments: dict[str, Moments] = {}
    faults = Faults()
    for name, entry in found.entries.items():
        calls = max(entry.calls, 1)  # where there are none, llama.cpp takes the values as means
        counts = np.full(1, calls, np.float32)
        means = usable_means(name, entry.sums[None], counts, faults)
        if means is not None:
            magnitudes = usable_magnitudes(None, counts, means)
            moments[name] = _moments(calls * LEGACY_CHUNK, magnitudes, means)
    datasets = (Path(found.dataset).name,) if found.dataset else ()
    warnings = faults.warnings(shown_path(path))
    unusable = frozenset(faults.unusable)
    return Statistics(moments, datasets, found.chunks, LEGACY_CHUNK, {}, warnings, unusable)


def _moments(tokens: int, magnitudes: Floats, means: Floats) -> Moments:
    return Moments(tokens, torch.from_numpy(magnitudes[0]), torch.from_numpy(means[0]))


def _integer(contents: GgufContents, key: str) -> int:
    value = contents.metadata.get(key)
    if value is None:
        return 0
    if type(value.content) is not int or value.content < 0:
        raise DamagedError(
            f"{shown_path(contents.path)} is malformed: {key} is {printable(value.content)}", HINT
        )
    return value.content


def _datasets(contents: GgufContents) -> tuple[str, ...]:
    value = contents.metadata.get(DATASETS)
    content: Any = () if value is None else value.content
    items = content if isinstance(content, tuple) else (content,)
    # llama.cpp writes whole paths; where somebody kept a text is nobody's business.
    return tuple(public_name(str(item)) for item in items)


def public_name(dataset: str) -> str:
    """Return a dataset's name as a file may carry it: a hub's whole, of a path the last part."""
    return dataset if dataset.startswith("hf:") else Path(dataset).name
