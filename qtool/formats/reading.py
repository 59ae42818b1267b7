"""Read any directory that qtool writes as if it held dense weights: packed ones are unpacked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import TensorReader
from qtool.checkpoint.untrusted import naming
from qtool.formats.protocol import TensorLayout, format_of
from qtool.grids.protocol import Grid, QuantizedTensor

WORD_BITS = 32


class DenseSource:
    """The dense weights of a float or packed checkpoint, one at a time.

    Args:
        checkpoint: of any format that qtool reads, or float.
        reader: open on the checkpoint's tensors.
        dtype: of unpacked weights; those stored dense keep theirs.

    Raises:
        UnsupportedError: quantized in a way that qtool does not read.
        DamagedError: a packed tensor's shape contradicts the configuration.
    """

    def __init__(
        self, checkpoint: Checkpoint, reader: TensorReader, dtype: torch.dtype = torch.float32
    ) -> None:
        self._reader = reader
        self._refs = checkpoint.refs
        self._dtype = dtype
        self._format = format_of(checkpoint.config)
        self.grids: dict[str, Grid] = {}
        self._parts: dict[str, list[str]] = {}
        self._unpacked: tuple[str, Tensor] = ("", torch.empty(0))
        if self._format is not None:
            layouts = {n: TensorLayout(r.dtype, tuple(r.shape)) for n, r in self._refs.items()}
            with naming(checkpoint.path):
                self.grids = self._format.grids(checkpoint.config["quantization_config"], layouts)
            for name in self._refs:
                module = name.rpartition(".")[0]
                if module in self.grids:
                    self._parts.setdefault(module, []).append(name)

    def __contains__(self, name: object) -> bool:
        if name in self._refs:
            return True
        return isinstance(name, str) and self._packed_module(name) is not None

    def _packed_module(self, name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        return module if leaf == "weight" and module in self.grids else None

    def file(self, name: str) -> Path:
        """Return the file that a dense tensor, or the first part of a packed one, lies in.

        Raises:
            DamagedError: it is missing.
        """
        module = self._packed_module(name)
        return self._reader.file(name if module is None else self._parts[module][0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the dense tensor of that name; reads no weights.

        Raises:
            DamagedError: it is missing.
        """
        module = self._packed_module(name)
        if module is None:
            return tuple(self._reader.ref(name).shape)
        if f"{module}.weight_shape" in self._refs:
            rows, columns = self._reader.read(f"{module}.weight_shape").tolist()
            return int(rows), int(columns)
        words, width = self._refs[f"{module}.qweight"].shape
        rows = self._refs[f"{module}.scales"].shape[1]
        if width == rows:  # gptq packs along columns, awq along rows
            return rows, words * WORD_BITS // self.grids[module].bits
        return rows, words

    def logical_refs(self) -> dict[str, TensorRef]:
        """Return the tensors as if nothing were packed: `.weight` of packed modules included.

        Their byte ranges are those of one of their parts; only names, shapes and, for tensors
        stored dense, dtypes count.
        """
        packed = {part for parts in self._parts.values() for part in parts}
        refs = {}
        for name, ref in self._refs.items():
            module, _, leaf = name.rpartition(".")
            if name not in packed or leaf == "bias":
                refs[name] = ref
            elif f"{module}.weight" not in refs:
                weight = f"{module}.weight"
                refs[weight] = replace(ref, name=weight, shape=self.shape(weight), dtype="F32")
        return refs

    def quantized(self, module: str) -> QuantizedTensor:
        """Return the packed weight of a module.

        Raises:
            DamagedError: its parts contradict each other, or their bytes are missing.
            UnsupportedError: groups in an order that qtool does not read.
        """
        if self._format is None:
            raise KeyError(module)
        tensors = {name: self._reader.read(name) for name in self._parts[module]}
        with naming(self.file(f"{module}.weight")):
            return self._format.unpack(module, tensors, self.grids[module])

    def scales(self, module: str) -> Tensor:
        """Return the stored scales of a packed module in their own dtype."""
        names = self._parts[module]
        return self._reader.read(next(n for n in names if n.endswith(("scales", "weight_scale"))))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of the dense matrix of that name.

        Raises:
            DamagedError: it is missing or its bytes are.
        """
        if self._packed_module(name) is None:
            return self._reader.rows(name, start, stop)
        if self._unpacked[0] != name:  # rows are asked for in order: one matrix at a time
            self._unpacked = (name, self.read(name))
        return self._unpacked[1][start:stop]

    def read(self, name: str) -> Tensor:
        """Return the dense tensor of that name on the CPU.

        Raises:
            DamagedError: it is missing or its bytes are.
        """
        module = self._packed_module(name)
        if module is None:
            return self._reader.read(name)
        return self.quantized(module).dequantize().to(self._dtype)
