"""A GGUF file: one that the engine fills block by block, or that is streamed from a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.gguf_file import GgufPlan, GgufTensor, plan_gguf
from qtool.checkpoint.gguf_header import read_gguf
from qtool.checkpoint.gguf_values import Value, text, u32
from qtool.checkpoint.gguf_writer import PARTIAL_SUFFIX, GgufWriter
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import TensorReader, tensor_bytes
from qtool.checkpoint.untrusted import naming
from qtool.errors import DamagedError
from qtool.formats.modelfile import ollama_modelfile
from qtool.formats.reading import DenseSource
from qtool.grids.ggml import LAYOUTS
from qtool.grids.protocol import QuantizedTensor
from qtool.model.conversion import ConvertedTensor, row_order, source_order
from qtool.pipeline.gguf_rows import encoded, gguf_rows, packed, reads_back_finite, stored_rows
from qtool.pipeline.gguf_sources import DirectorySource, TensorSource
from qtool.pipeline.outputs import CalibrationNote

if TYPE_CHECKING:
    from qtool.pipeline.plan import Plan

LOADS_IN = ("llama.cpp", "Ollama")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file and its type."""

    converted: ConvertedTensor
    kind: str


@dataclass(frozen=True)
class PlannedGguf:
    """One GGUF that will be written, in one file or several."""

    file_type: str
    stem: str  # of its file name
    tensors: tuple[PlannedTensor, ...]
    metadata: Mapping[str, Value]
    kept: tuple[str, ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()
    split_bytes: int | None = None
    chat_template: str | None = None
    modelfile: bool = False

    @property
    def name(self) -> str:
        """The format as one types it."""
        return f"gguf:{self.file_type}"

    @property
    def loads_in(self) -> tuple[str, ...]:
        """Engines known to read it."""
        return LOADS_IN

    @property
    def weighs_head(self) -> bool:
        """Whether there is a head of its own that is rounded.

        Of a tied one nothing is said: it is the embedding, whose columns all count alike.
        """
        return any(x.converted.name == "output.weight" and x.kind in LAYOUTS for x in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return self.layout.n_bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the headers."""
        headers = b"".join(file.header for file in self.layout.files)
        return hashlib.sha256(headers).hexdigest()

    @property
    def n_files(self) -> int:
        """How many files there are."""
        return len(self.layout.files)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of all weights, those of embeddings, norms and head included."""
        weights = sum(torch.Size(x.converted.shape).numel() for x in self.tensors)
        return 8 * self.layout.tensor_bytes / weights

    @cached_property
    def layout(self) -> GgufPlan:
        """The place of every byte."""
        return plan_gguf(
            self.metadata,
            [GgufTensor(x.converted.name, x.kind, x.converted.shape) for x in self.tensors],
            file=f"{self.stem}.gguf",
            max_bytes=self.split_bytes,
        )

    @property
    def working_files(self) -> tuple[str, ...]:
        """Names of the parts, without and with what they end in until they are complete."""
        names = [file.file for file in self.layout.files]
        return (*names, *(name + PARTIAL_SUFFIX for name in names))

    def opened_at(self, destination: Path) -> Path:
        """Return what programs open once it is written: the file, or the first of its parts.

        Args:
            destination: a name that ends in .gguf, or a directory.
        """
        if destination.suffix == ".gguf":
            named = replace(self, stem=destination.stem)
            return destination.with_name(named.layout.files[0].file)
        return destination / self.layout.files[0].file

    def noted(self, note: CalibrationNote | None) -> PlannedGguf:
        """Return the output with what llama-quantize writes about an importance matrix."""
        if note is None:
            return self
        return replace(self, metadata={**self.metadata, **_note_keys(note)})

    def writer(self, plan: Plan, directory: Path, *, resume: bool = False) -> GgufFileWriter:
        """Create the file, empty, or take over the one there is; return what fills it."""
        return GgufFileWriter(self, plan.checkpoint, directory, resume=resume)

    def write_companions(self, plan: Plan, directory: Path) -> tuple[str, ...]:
        """Write the Modelfile, if one is wanted; return what it could not say.

        Raises:
            CapacityError: the disk is full.
        """
        del plan
        return write_modelfile(self, directory) if self.modelfile else ()

    def verify(self, plan: Plan, directory: Path) -> None:
        """Read the header and every tensor back.

        Raises:
            DamagedError: a tensor is missing, of another type or shape, or not finite.
        """
        del plan
        verify_gguf(self, directory)


def write_modelfile(output: PlannedGguf, directory: Path) -> tuple[str, ...]:
    """Write `Modelfile` for Ollama; return what it could not say.

    Raises:
        CapacityError: the disk is full.
    """
    files = output.layout.files
    adds = output.metadata.get("tokenizer.ggml.add_bos_token")
    made = ollama_modelfile(
        weights=files[0].file,
        chat_template=output.chat_template,
        special=_special_tokens(output.metadata),
        adds_bos=None if adds is None else bool(adds.content),
    )
    path = directory / "Modelfile"
    try:
        path.write_text(made.text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise write_error(path, error) from error
    return made.warnings


def _special_tokens(metadata: Mapping[str, Value]) -> dict[str, str]:
    """Return bos, eos and eot tokens by name, as strings."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    found: dict[str, str] = {}
    if tokens is None or not isinstance(tokens.content, tuple):
        return found
    for name in ("bos", "eos", "eot"):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and 0 <= int(value.content) < len(tokens.content):  # type: ignore[arg-type]
            found[f"{name}_token"] = str(tokens.content[int(value.content)])  # type: ignore[arg-type]
    return found


def _note_keys(note: CalibrationNote) -> dict[str, Value]:
    return {
        "quantize.imatrix.file": text(note.file),
        "quantize.imatrix.dataset": text(", ".join(note.datasets)),
        "quantize.imatrix.entries_count": u32(note.entries),
        "quantize.imatrix.chunks_count": u32(note.windows),
    }


class GgufFileWriter:
    """Puts finished linears, changed norms and all the rest into one GGUF."""

    def __init__(
        self,
        output: PlannedGguf,
        checkpoint: Checkpoint,
        directory: Path,
        importance: Mapping[str, Tensor] | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self._by_source = {x.converted.source: x for x in output.tensors if x.converted.source}
        self._tensors = output.tensors
        self._checkpoint = checkpoint
        self._directory = directory
        self._file = GgufWriter(output.layout, directory, resume=resume)
        self.tensors = self._file.tensors
        self._layout = output.layout
        self._importance = importance or {}

    def write(self, name: str, quantized: QuantizedTensor) -> None:
        """Pack the linear of module path `name`."""
        converted = self._by_source[f"{name}.weight"].converted
        if converted.permuted_heads:
            order = torch.as_tensor(row_order(quantized.shape[0], converted.permuted_heads))
            quantized = quantized.select_rows(order)
        with naming(self._checkpoint.path):
            stored = packed(converted.name, quantized)
        self._file.write(converted.name, [tensor_bytes(stored)])

    def write_changed(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that a transform rewrote."""
        planned = self._by_source[name]
        self._encode(planned, iter([stored_rows(planned.converted, tensor.cpu())]))

    def stored(self, name: str, names: Collection[str]) -> Tensor | None:
        """Return a rounded matrix of the checkpoint, dense, if the file holds it yet."""
        planned = self._by_source.get(name)
        if planned is None or planned.converted.name not in names:
            return None
        converted = planned.converted
        place = self._layout.places[converted.name]
        path = self._file.path(place.file)
        ref = TensorRef(
            converted.name, planned.kind, converted.shape, path, place.start, place.stop
        )
        found = torch.cat(list(gguf_rows(ref))).reshape(converted.shape)
        if converted.permuted_heads:
            order = source_order(found.shape[0], converted.permuted_heads)
            found = found[torch.as_tensor(order)]
        return found

    def holds(self, name: str, names: Collection[str]) -> bool:
        """Tell whether a stored tensor is the linear of module path `name`."""
        planned = self._by_source.get(f"{name}.weight")
        return planned is not None and planned.converted.name in names

    def release(self) -> None:
        """Close the file and leave it as it is."""
        self._file.release()

    def finish(self, importance: Mapping[str, Tensor]) -> dict[str, str]:
        """Stream everything that is left from the checkpoint and close; return SHA-256s."""
        self._importance = {**self._importance, **importance}
        with TensorReader(self._checkpoint.refs) as reader:
            source = DenseSource(self._checkpoint, reader)
            self.fill(DirectorySource(source, source.logical_refs()))
        return self.close()

    def fill(self, source: TensorSource, done: Callable[[str], None] | None = None) -> None:
        """Stream everything that is left from a source; `done` is told each name."""
        for planned in self._tensors:
            name = planned.converted.name
            if name not in self.tensors.missing:
                continue
            carried = source.carried(planned.converted, planned.kind)
            if carried is None:
                self._encode(planned, source.rows(planned.converted))
            else:
                self._file.write(name, (tensor_bytes(part) for part in carried))
            if done is not None:
                done(name)

    def close(self) -> dict[str, str]:
        """Put everything on the disk for good; return file name -> SHA-256."""
        self._file.close()
        return self._file.digests()

    def _encode(self, planned: PlannedTensor, rows: Iterator[Tensor]) -> None:
        name = planned.converted.name
        importance = self._importance.get(name)

        def stored() -> Iterator[memoryview]:
            for part in rows:
                with naming(self._checkpoint.path):  # but not for what the output's disk says
                    chunk = encoded(name, planned.kind, part, importance)
                yield tensor_bytes(chunk)

        self._file.write(name, stored())


def verify_gguf(output: PlannedGguf, directory: Path) -> None:
    """Read headers and every tensor of a finished file back.

    Raises:
        DamagedError: a tensor is missing, of another type or shape, or not finite.
    """
    found = {}
    for file in output.layout.files:
        found.update({ref.name: ref for ref in read_gguf(directory / file.file).tensors})
    for planned in output.tensors:
        name, shape = planned.converted.name, planned.converted.shape
        ref = found.get(name)
        if ref is None or (ref.dtype, ref.shape) != (planned.kind, shape):
            raise DamagedError(
                f"verification failed: '{name}' does not read back as {planned.kind} {list(shape)}",
                "this is a bug in qtool; nothing was kept",
            )
        if not reads_back_finite(ref):
            raise DamagedError(
                f"verification failed: '{name}' reads back with values that are not finite",
                "this is a fault of the disk or a bug in qtool; nothing was kept",
            )
