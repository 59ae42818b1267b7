"""A float model directory out of a packed one or a GGUF: what transformers calls dequantized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.copying import copy_file
from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import TensorReader, check_finite
from qtool.checkpoint.shards import ShardPlan, ShardWriter, StoredTensor, plan_shards
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import NumericalError
from qtool.formats.gguf_tokenizer_files import tokenizer_files
from qtool.formats.reading import DenseSource
from qtool.ggml_types import FLOAT_TYPES
from qtool.memory.expected_tensors import check_tensors
from qtool.model.conversion import RestoredTensor, checkpoint_tensors, source_order
from qtool.model.family import family_of
from qtool.model.gguf_config import checkpoint_config, family_of_metadata
from qtool.model.gguf_rope import FACTOR_TENSORS
from qtool.pipeline.gguf_rows import FLOATS, gguf_rows
from qtool.pipeline.progress import Progress

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class PlannedFloats:
    """A directory of float safetensors."""

    dtype: str
    shards: ShardPlan
    config: Mapping[str, Any]
    restored: tuple[RestoredTensor, ...] = ()  # where it comes from a GGUF
    warnings: tuple[tuple[str, str], ...] = ()
    loads_in: tuple[str, ...] = ("transformers", "vLLM")

    @property
    def name(self) -> str:
        """The format as one types it."""
        return f"safetensors:{self.dtype}"

    @property
    def n_bytes(self) -> int:
        """Bytes of all weight files and their index."""
        return self.shards.n_bytes

    def write(
        self, checkpoint: Checkpoint, directory: Path, progress: Progress
    ) -> Mapping[str, str]:
        """Write weights, configuration and tokenizer; return file name -> SHA-256.

        Raises:
            NumericalError: values that are not finite, or beyond what the dtype holds.
            CapacityError: the disk is full.
            DamagedError: the source cannot be read.
        """
        progress.start("exporting", 1)
        with TensorReader(checkpoint.refs) as reader:
            source = None if checkpoint.gguf else DenseSource(checkpoint, reader)
            by_name = {x.name: x for x in self.restored}
            with ShardWriter(self.shards, directory) as writer:
                for name, stored in self.shards.tensors.items():
                    if source is None:
                        file = checkpoint.refs[by_name[name].source].file
                        values = restored_values(checkpoint.refs, by_name[name])
                    else:
                        file, values = source.file(name), source.read(name)
                    writer.write(name, _narrowed(name, values, stored.dtype, file))
                    del values
        progress.advance("all tensors")
        digests = writer.digests()
        progress.finish()
        self._write_companions(checkpoint, directory)
        return digests

    def _write_companions(self, checkpoint: Checkpoint, directory: Path) -> None:
        text = json.dumps(dict(self.config), indent=2) + "\n"
        files: dict[str, str | bytes] = {"config.json": text}
        if checkpoint.gguf:
            files.update(tokenizer_files(checkpoint.gguf[0].metadata))
        try:
            for name, content in files.items():
                raw = content if isinstance(content, bytes) else content.encode()
                (directory / name).write_bytes(raw)
        except OSError as error:
            raise write_error(Path(error.filename or directory), error) from error
        for path in checkpoint.extra_files:
            copy_file(path, directory / path.relative_to(checkpoint.path))


def _narrowed(name: str, values: Tensor, dtype: str, file: Path) -> Tensor:
    """Return values in a float dtype of at most their size, or say which do not fit."""
    check_finite(name, values, file)
    if not values.is_floating_point():
        return values
    stored = values.to(FLOATS[dtype])
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(
            f"{shown_path(file)}: tensor '{name}' has values beyond what {dtype} holds",
            "export to safetensors:BF16 or safetensors:F32",
        )
    return stored


def plan_floats(checkpoint: Checkpoint, dtype: str | None) -> PlannedFloats:
    """Plan the float directory of a packed or GGUF model.

    Args:
        checkpoint: a directory of any format that qtool reads, or a GGUF file.
        dtype: F32, F16 or BF16; None: what most weights are stored in, BF16 for packed ones.

    Raises:
        UnsupportedError: an architecture that transformers has no family for.
        DamagedError: headers and configuration contradict each other.
    """
    if checkpoint.gguf:
        return _from_gguf(checkpoint, dtype)
    with TensorReader(checkpoint.refs) as reader:
        dense = unpacked(checkpoint, DenseSource(checkpoint, reader))
    chosen = dtype or _usual(checkpoint)
    stored = [
        StoredTensor(ref.name, chosen if ref.dtype in FLOAT_TYPES else ref.dtype, tuple(ref.shape))
        for ref in dense.refs.values()
    ]
    return PlannedFloats(chosen, plan_shards(stored), _with_dtype(dense.config, chosen))


def unpacked(checkpoint: Checkpoint, source: DenseSource) -> Checkpoint:
    """Return a checkpoint as if none of its weights were packed.

    Raises:
        DamagedError: packed weights, true to themselves, are not those that its config.json
            describes.
    """
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    dense = replace(checkpoint, refs=source.logical_refs(), config=config)
    check_tensors(dense, family_of(config))
    return dense


def _usual(checkpoint: Checkpoint) -> str:
    """Return the dtype that holds most bytes of what is stored as floats."""
    sizes = dict.fromkeys(("BF16", "F16", "F32"), 0)
    for ref in checkpoint.refs.values():
        if ref.dtype in sizes and len(ref.shape) > 1:
            sizes[ref.dtype] += ref.n_bytes
    return max(sizes, key=lambda name: sizes[name])


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: TORCH_NAMES[dtype]}


def _from_gguf(checkpoint: Checkpoint, dtype: str | None) -> PlannedFloats:
    metadata = checkpoint.gguf[0].metadata
    family = family_of_metadata(metadata)
    shapes = {name: tuple(ref.shape) for name, ref in checkpoint.refs.items()}
    factors = {
        name: _whole(checkpoint.refs[name]).tolist() for name in FACTOR_TENSORS if name in shapes
    }
    config = checkpoint_config(metadata, shapes, factors)
    restored = checkpoint_tensors(config, family, shapes)
    chosen = dtype or _usual(checkpoint)
    stored = [StoredTensor(x.name, chosen, x.shape) for x in restored]
    tokenizer_files(metadata)  # a tokenizer that cannot be written back is refused before weights
    return PlannedFloats(chosen, plan_shards(stored), _with_dtype(config, chosen), restored)


def _whole(ref: TensorRef) -> Tensor:
    return torch.cat([part.reshape(-1) for part in gguf_rows(ref)])


def restored_values(refs: Mapping[str, TensorRef], tensor: RestoredTensor) -> Tensor:
    """Return a tensor of a GGUF file as the checkpoint holds it, float32.

    Raises:
        DamagedError: the file ends too early.
    """
    values = torch.cat(list(gguf_rows(refs[tensor.source]))).reshape(tensor.shape)
    if tensor.permuted_heads:
        values = values[torch.as_tensor(source_order(tensor.shape[0], tensor.permuted_heads))]
    return values - tensor.offset if tensor.offset else values
