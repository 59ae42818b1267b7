"""`qtool calibrate`: run the float model on calibration text and write what its linears read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qtool import device as devices
from qtool.calibration.activations import HiddenStates
from qtool.calibration.importance_repair import listed
from qtool.calibration.moments import Moments, MomentSums
from qtool.calibration.statistics_file import (
    Statistics,
    public_name,
    read_statistics,
    tensor_names,
)
from qtool.calibration.tokens import Windows
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import TensorReader, check_finite
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import UsageError
from qtool.formats.reading import DenseSource
from qtool.model.conversion import EMBEDDING, is_tied
from qtool.model.family import Family, family_of
from qtool.model.skeleton import Skeleton, skeleton_of
from qtool.model.streaming import Stream, observe
from qtool.model.trace import final_norm
from qtool.pipeline.linears import STORED_DTYPES
from qtool.pipeline.progress import Progress

TABLE_VALUES = 1 << 22  # of head and embeddings, read at once
OUTPUT, EMBEDDINGS = "output.weight", "token_embd.weight"
# What the caller knows of a tensor: its columns, or its matrices and their columns.
Columns = int | tuple[int, int]


class Finished(Protocol):
    """Keeps what is known of the blocks that are done, for a later process."""

    blocks: dict[int, Mapping[str, Moments]]  # tap name -> moments

    def skip(self, index: int, hidden: HiddenStates) -> int:
        """Move a stream in front of block `index` as far as is known; return the block in front."""

    def note(self, index: int, moments: Mapping[str, Moments], hidden: HiddenStates) -> None:
        """Keep what a block's taps read, and the stream behind it."""


class Forgotten:
    """Keeps nothing for a later process."""

    def __init__(self) -> None:
        self.blocks: dict[int, Mapping[str, Moments]] = {}

    def skip(self, index: int, hidden: HiddenStates) -> int:
        """Return the block that the stream is in front of."""
        del hidden
        return index

    def note(self, index: int, moments: Mapping[str, Moments], hidden: HiddenStates) -> None:
        """Hold what a block's taps read."""
        del hidden
        self.blocks[index] = moments


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    windows: Windows,
    device: torch.device,
    progress: Progress,
    *,
    spill: Path,
    held_bytes: int | None = None,
    finished: Finished | None = None,
) -> Statistics:
    """Return mean |x| and mean x^2 of the inputs of every linear, from one streamed pass.

    The head's are among them: under the name of the tensor that serves as head, `output.weight`,
    or `token_embd.weight` where the embeddings do.

    Args:
        checkpoint: the model.
        windows: what it reads.
        device: to compute on.
        progress: told what happens.
        spill: directory for hidden states that do not fit in memory.
        held_bytes: most bytes of hidden states in memory; None for what there is.
        finished: knows the blocks that an earlier process is done with.

    Raises:
        UnsupportedError: the model's family is not supported.
        NumericalError: weights or activations are not finite.
    """
    family = family_of(checkpoint.config)
    finished = finished or Forgotten()
    with TensorReader(checkpoint.refs) as reader:
        source = DenseSource(checkpoint, reader)
        skeleton = skeleton_of(
            checkpoint,
            dtype=devices.compute_dtype(stored_dtype(checkpoint), device),
            device=device,
        )
        n_blocks = len(skeleton.blocks)
        _check_unread(checkpoint, family, reader)
        progress.start("calibrating", n_blocks, done=len(finished.blocks))
        stream = Stream(skeleton, source, windows.ids, spill, held_bytes=held_bytes)
        index = 0
        while (index := finished.skip(index, stream.hidden)) < n_blocks:
            known = index in finished.blocks
            finished.note(index, _observed(skeleton, source, stream, index), stream.hidden)
            if not known:
                progress.advance(f"block {index + 1} of {n_blocks}")
            index += 1
        head = head_inputs(skeleton, source, stream)
        progress.finish()
    linears = {
        f"{skeleton.block_prefix(index).removesuffix('.')}.{linear}": finished.blocks[index][
            tap.name
        ]
        for index in range(n_blocks)
        for tap in family.taps
        for linear in tap.linears
    }
    names = tensor_names(family.gguf_architecture, n_blocks, list(linears))
    return Statistics(
        {names[linear]: found for linear, found in linears.items()}
        | {EMBEDDINGS if is_tied(checkpoint.config, family) else OUTPUT: head},
        tuple(public_name(source.name) for source in windows.sources),
        len(windows.ids),
        int(windows.ids.shape[1]),
    )


def _observed(
    skeleton: Skeleton, source: DenseSource, stream: Stream, index: int
) -> dict[str, Moments]:
    """Run the stream through a block; return what each tap read."""
    family = skeleton.family
    path = skeleton.block_prefix(index).removesuffix(".")
    skeleton.load(path, source)
    block = skeleton.blocks[index]
    seen, _ = observe(
        stream, stream.hidden, block, index, family.taps, statistics="diagonal", move_on=True
    )
    for tap in family.taps:
        check_finite(
            f"{path}: input of {tap.linears[0]}",
            seen[tap.name].diagonal,
            source.file(f"{path}.{tap.linears[0]}.weight"),
        )
    skeleton.drop(path)
    return seen


def head_inputs(skeleton: Skeleton, source: DenseSource, stream: Stream) -> Moments:
    """Return the moments of what the head reads: the last block's output behind the final norm."""
    path = final_norm(skeleton.family)
    skeleton.load(path, source)
    norm = skeleton.model.get_submodule(path)
    sums: MomentSums | None = None
    for batch in stream.hidden:
        normed = norm(batch)
        inputs = normed.reshape(-1, normed.shape[-1])
        if sums is None:
            sums = MomentSums(inputs.shape[1], inputs.device, hessian=False)
        sums.add(inputs)
    skeleton.drop(path)
    if sums is None:
        raise RuntimeError("there are no batches")
    found = sums.result()
    check_finite("input of the head", found.diagonal)
    return found


def _check_unread(checkpoint: Checkpoint, family: Family, reader: TensorReader) -> None:
    """Refuse a head or embeddings that are not finite: no text reads all of them.

    Raises:
        NumericalError: they hold NaN or infinity; names the tensor.
    """
    for name in (f"{EMBEDDING}.weight", f"{family.head}.weight"):
        if name not in checkpoint.refs:
            continue
        rows, columns = checkpoint.refs[name].shape
        step = max(TABLE_VALUES // columns, 1)
        for start in range(0, rows, step):
            tile = reader.rows(name, start, min(start + step, rows))
            check_finite(name, tile, reader.file(name))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the checkpoint's largest dense tensor."""
    refs = [ref for ref in checkpoint.refs.values() if ref.dtype in STORED_DTYPES]
    if not refs:
        return torch.float32
    return STORED_DTYPES[max(refs, key=lambda ref: ref.n_bytes).dtype]


def statistics_for(
    path: Path, checkpoint: Checkpoint, *, complete: bool = True
) -> tuple[Mapping[int, Mapping[str, Moments]], Statistics]:
    """Read a statistics file and give its moments to the taps of each block.

    Args:
        path: of the file.
        checkpoint: the model.
        complete: refuse a file that lacks a tap. Otherwise such taps are missing from the result,
            and a warning says so: their linears are rounded without importance.

    Raises:
        UsageError: the file was made with another model, or lacks a linear that is needed.
        DamagedError: it is malformed.
    """
    family: Family = family_of(checkpoint.config)
    statistics = read_statistics(path)
    n_blocks = int(checkpoint.config["num_hidden_layers"])
    places = {
        f"{family.blocks}.{block}.{linear}": (block, tap.name)
        for block in range(n_blocks)
        for tap in family.taps
        for linear in tap.linears
    }
    names = tensor_names(family.gguf_architecture, n_blocks, list(places))
    found: dict[int, dict[str, Moments]] = {block: {} for block in range(n_blocks)}
    missing: dict[tuple[int, str], str] = {}
    for linear, (block, tap) in places.items():
        moments = statistics.moments.get(names[linear])
        columns = checkpoint.refs[f"{linear}.weight"].shape[1]
        if moments is None:
            missing.setdefault((block, tap), names[linear])
            continue
        if moments.diagonal.numel() != columns:
            raise _of_another_model(path, f"has another size for '{names[linear]}'", columns)
        found[block].setdefault(tap, moments)
    absent = [name for (block, tap), name in missing.items() if tap not in found[block]]
    if absent and (complete or not any(found.values())):
        raise _absent(path, absent[0], statistics)
    return found, replace(statistics, warnings=statistics.warnings + _lacking(path, absent))


def importance_for(
    path: Path, names: Mapping[str, Columns]
) -> tuple[dict[str, Tensor], Statistics]:
    """Read a statistics file and return mean x^2 of the inputs of the tensors asked for.

    Args:
        path: of the file.
        names: llama.cpp's tensor name -> its columns C, or (matrices, C) where it holds several.

    Returns:
        Name -> [C], or [matrices, C] float32, for those of `names` that the file knows; and the
        statistics, with a warning about the others (but not about the embeddings and the head,
        which llama.cpp's tool leaves out unless asked).

    Raises:
        UsageError: another size for a tensor, or none of them: made with another model.
        DamagedError: it is malformed.
    """
    statistics = read_statistics(path)
    found: dict[str, Tensor] = {}
    for name, columns in names.items():
        importance = statistics.importance(name)
        if importance is None:
            continue
        shape = (columns,) if isinstance(columns, int) else columns
        if importance.numel() != math.prod(shape):
            raise _of_another_model(path, f"has another size for '{name}'", columns)
        found[name] = importance.reshape(shape)
    absent = [name for name in names if name not in found and name not in {OUTPUT, EMBEDDINGS}]
    if absent and not found:
        raise _absent(path, absent[0], statistics)
    return found, replace(statistics, warnings=statistics.warnings + _lacking(path, absent))


def _lacking(path: Path, absent: list[str]) -> tuple[str, ...]:
    if not absent:
        return ()
    return (f"{shown_path(path)} lacks {listed(absent)}: rounded without importance",)


def _absent(path: Path, name: str, statistics: Statistics) -> UsageError:
    if name not in statistics.unusable:
        return _of_another_model(path, f"lacks '{name}'", None)
    return UsageError(
        f"{shown_path(path)} has no usable value for '{name}': all are negative, too large, zero "
        "or not finite",
        "run qtool calibrate on this model",
    )


def _of_another_model(path: Path, what: str, columns: Columns | None) -> UsageError:
    expected = "" if columns is None else f" ({columns} inputs)"
    return UsageError(
        f"{shown_path(path)} {what}{expected}",
        "the statistics were made with another model; run qtool calibrate on this one",
    )
