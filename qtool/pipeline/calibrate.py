"""`qtool calibrate`: run the float model on calibration text and write what its linears read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from qtool import device as devices
from qtool.calibration.moments import Moments
from qtool.calibration.statistics_file import (
    Statistics,
    read_statistics,
    tensor_names,
    write_statistics,
)
from qtool.calibration.tokens import Windows
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.output import sync, write_error
from qtool.checkpoint.reader import TensorReader, check_finite
from qtool.errors import UsageError
from qtool.formats.reading import DenseSource
from qtool.model.family import Family, family_of
from qtool.model.skeleton import Skeleton
from qtool.model.streaming import Stream, observe
from qtool.pipeline.plan import STORED_DTYPES
from qtool.pipeline.progress import Progress


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    windows: Windows,
    device: torch.device,
    progress: Progress,
    *,
    held_bytes: int | None = None,
) -> Statistics:
    """Return mean |x| and mean x^2 of the inputs of every linear, from one streamed pass.

    Raises:
        UnsupportedError: the model's family is not supported.
        NumericalError: weights or activations are not finite.
    """
    family = family_of(checkpoint.config)
    moments: dict[str, Moments] = {}
    with TensorReader(checkpoint.refs) as reader, tempfile.TemporaryDirectory() as spill:
        source = DenseSource(checkpoint, reader)
        skeleton = Skeleton(
            checkpoint.config,
            family,
            dtype=devices.compute_dtype(stored_dtype(checkpoint), device),
            device=device,
        )
        n_blocks = len(skeleton.blocks)
        progress.start("calibrating", n_blocks)
        stream = Stream(skeleton, source, windows.ids, Path(spill), held_bytes=held_bytes)
        for index in range(n_blocks):
            path = skeleton.block_prefix(index).removesuffix(".")
            for name, tensor in skeleton.load(path, source).items():
                check_finite(f"{path}.{name}", tensor)
            block = skeleton.blocks[index]
            seen, _ = observe(
                stream,
                stream.hidden,
                block,
                index,
                family.taps,
                statistics="diagonal",
                move_on=True,
            )
            for tap in family.taps:
                check_finite(f"{path}: input of {tap.linears[0]}", seen[tap.name].diagonal)
                moments.update({f"{path}.{linear}": seen[tap.name] for linear in tap.linears})
            skeleton.drop(path)
            progress.advance(f"block {index + 1} of {n_blocks}")
        progress.finish()
    names = tensor_names(family.gguf_architecture, n_blocks, list(moments))
    return Statistics(
        {names[linear]: found for linear, found in moments.items()},
        tuple(source.name for source in windows.sources),
        len(windows.ids),
        int(windows.ids.shape[1]),
    )


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the checkpoint's largest dense tensor."""
    refs = [ref for ref in checkpoint.refs.values() if ref.dtype in STORED_DTYPES]
    if not refs:
        return torch.float32
    return STORED_DTYPES[max(refs, key=lambda ref: ref.n_bytes).dtype]


def save_statistics(
    statistics: Statistics, architecture: str, path: Path, *, overwrite: bool
) -> None:
    """Write statistics under a temporary name and give them theirs when they are complete.

    Raises:
        UsageError: the file exists and is not to be replaced.
        CapacityError: the disk is full.
    """
    if path.exists() and not overwrite:
        raise UsageError(f"the output {path} exists", "choose another -o, or use --overwrite")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_statistics(partial, statistics, architecture)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def statistics_for(
    path: Path, checkpoint: Checkpoint
) -> tuple[Mapping[int, Mapping[str, Moments]], Statistics]:
    """Read a statistics file and give its moments to the taps of each block.

    Raises:
        UsageError: the file lacks a linear of this model, or was made with another model.
        DamagedError: it is malformed.
    """
    family: Family = family_of(checkpoint.config)
    statistics = read_statistics(path)
    n_blocks = int(checkpoint.config["num_hidden_layers"])
    firsts = {
        (block, tap.name): f"{family.blocks}.{block}.{tap.linears[0]}"
        for block in range(n_blocks)
        for tap in family.taps
    }
    names = tensor_names(family.gguf_architecture, n_blocks, list(firsts.values()))
    found: dict[int, dict[str, Moments]] = {}
    for (block, tap), linear in firsts.items():
        moments = statistics.moments.get(names[linear])
        columns = checkpoint.refs[f"{linear}.weight"].shape[1]
        if moments is None or moments.diagonal.numel() != columns:
            what = "lacks" if moments is None else "has another size for"
            raise UsageError(
                f"{path} {what} '{names[linear]}' ({linear}, {columns} inputs)",
                "the statistics were made with another model; run qtool calibrate on this one",
            )
        found.setdefault(block, {})[tap] = moments
    return found, statistics
