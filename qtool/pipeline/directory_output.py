"""A model directory of safetensors with a packed format, for vLLM, transformers and GPTQModel."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtool.checkpoint.copying import copy_file
from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.header import read_header
from qtool.checkpoint.locate import locate
from qtool.checkpoint.reader import TensorReader
from qtool.checkpoint.shards import ShardPlan, ShardWriter
from qtool.checkpoint.untrusted import reading
from qtool.errors import DamagedError
from qtool.formats.protocol import Format
from qtool.formats.reading import DenseSource
from qtool.grids.protocol import QuantizedTensor
from qtool.pipeline.outputs import CalibrationNote

if TYPE_CHECKING:
    from qtool.pipeline.plan import Plan


@dataclass(frozen=True)
class PlannedDirectory:
    """One directory that will be written."""

    format: Format
    shards: ShardPlan
    quantization_config: Mapping[str, Any]
    kept: tuple[str, ...]  # linears left as they are
    warnings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The format's name."""
        return self.format.name

    @property
    def loads_in(self) -> tuple[str, ...]:
        """Engines known to read it."""
        return self.format.loads_in

    @property
    def weighs_head(self) -> bool:
        """Never: the head stays as it is."""
        return False

    @property
    def n_bytes(self) -> int:
        """Bytes of all weight files and their index."""
        return self.shards.n_bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the headers and of what config.json says of the quantization."""
        config = json.dumps(self.quantization_config, sort_keys=True).encode()
        parts = [*(shard.header for shard in self.shards.shards), config]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def n_files(self) -> int:
        """How many weight files there are."""
        return len(self.shards.shards)

    @property
    def working_files(self) -> tuple[str, ...]:
        """Names of the shards."""
        return tuple(shard.file for shard in self.shards.shards)

    def opened_at(self, destination: Path) -> Path:
        """Return the directory itself."""
        return destination

    def noted(self, note: CalibrationNote | None) -> PlannedDirectory:
        """Return the output as it is: the recipe and the card beside it say more."""
        del note
        return self

    def writer(self, plan: Plan, directory: Path, *, resume: bool = False) -> DirectoryWriter:
        """Create the shards, empty, or take over those there are; return what fills them."""
        return DirectoryWriter(self, plan, directory, resume=resume)

    def write_companions(self, plan: Plan, directory: Path) -> tuple[str, ...]:
        """Write config.json, and the tokenizer and other small files of the model byte for byte.

        Raises:
            CapacityError: the disk is full.
            DamagedError: the model's cannot be read.
        """
        config = dict(plan.checkpoint.config)
        config["quantization_config"] = dict(self.quantization_config)
        for source in plan.checkpoint.extra_files:
            copy_file(source, directory / source.relative_to(plan.checkpoint.path))
        try:
            text = json.dumps(config, indent=2) + "\n"
            (directory / "config.json").write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise write_error(Path(error.filename or directory), error) from error
        return ()

    def verify(self, plan: Plan, directory: Path) -> None:
        """Open the output as a model and unpack every linear the way an engine would.

        Raises:
            DamagedError: a tensor is missing, has another grid than planned, or is not finite.
        """
        checkpoint = locate(str(directory))
        with reading(directory / "config.json"):
            json.loads((directory / "config.json").read_text(encoding="utf-8"))
        with TensorReader(checkpoint.refs) as reader:
            source = DenseSource(checkpoint, reader)
            for linear in plan.linears:
                if linear.name not in source.grids:
                    raise DamagedError(
                        f"verification failed: '{linear.name}' is not packed as {self.name}",
                        "this is a bug in qtool; nothing was kept",
                    )
                weight = source.read(f"{linear.name}.weight")
                if tuple(weight.shape) != linear.shape or not bool(torch.isfinite(weight).all()):
                    raise DamagedError(
                        f"verification failed: '{linear.name}' in {directory} does not read back "
                        f"as finite {list(linear.shape)}",
                        "this is a fault of the disk or a bug in qtool; nothing was kept",
                    )


class DirectoryWriter:
    """Packs finished linears into the shards of one directory."""

    def __init__(
        self, output: PlannedDirectory, plan: Plan, directory: Path, *, resume: bool = False
    ) -> None:
        self._format = output.format
        self._checkpoint = plan.checkpoint
        self._config = {
            **plan.checkpoint.config,
            "quantization_config": dict(output.quantization_config),
        }
        self._directory = directory
        self._planned = frozenset(output.shards.tensors)
        self._files = [shard.file for shard in output.shards.shards]
        self._shards = ShardWriter(output.shards, directory, resume=resume)
        self.tensors = self._shards.tensors

    def write(self, name: str, quantized: QuantizedTensor) -> None:
        """Pack the linear of module path `name`."""
        for full, tensor in self._format.pack(name, quantized).items():
            self._shards.write(full, tensor)

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that a transform rewrote."""
        self._shards.write(name, tensor.cpu())

    def stored(self, name: str, names: Collection[str]) -> Tensor | None:
        """Return a rounded matrix of the checkpoint, dense, if the shards hold it yet."""
        module = name.rpartition(".")[0]
        packed = module in self._source.grids and name == f"{module}.weight"
        there = packed and any(full.rpartition(".")[0] == module for full in names)
        return self._source.read(name) if there else None

    def holds(self, name: str, names: Collection[str]) -> bool:
        """Tell whether stored tensors are everything of the linear of module path `name`."""
        return bool(self._of_module[name]) and self._of_module[name] <= set(names)

    @cached_property
    def _of_module(self) -> Mapping[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for full in self._planned:
            module, _, part = full.rpartition(".")
            if part != "bias":  # which is copied, or changed
                found[module].add(full)
        return found

    @cached_property
    def _source(self) -> DenseSource:
        refs = {
            ref.name: ref for file in self._files for ref in read_header(self._directory / file)
        }
        packed = replace(self._checkpoint, refs=refs, config=self._config)
        return DenseSource(packed, TensorReader(refs))

    def release(self) -> None:
        """Do nothing: no file stays open."""

    def finish(self, importance: Mapping[str, Tensor]) -> dict[str, str]:
        """Copy what is stored as it was, byte for byte, and close; return the files' SHA-256."""
        del importance
        for name, ref in self._checkpoint.refs.items():
            if name in self.tensors.missing:
                self._shards.write_from(ref)
        self._shards.close()
        return self._shards.digests()
