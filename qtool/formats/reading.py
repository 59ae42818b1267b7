"""Read any directory that qtool writes as if it held dense weights: packed ones are unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.reader import TensorReader
from qtool.formats.protocol import TensorLayout, format_of
from qtool.grids.protocol import QuantizedTensor


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
        self.grids = {}
        self._parts: dict[str, list[str]] = {}
        if self._format is not None:
            layouts = {n: TensorLayout(r.dtype, tuple(r.shape)) for n, r in self._refs.items()}
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

    def quantized(self, module: str) -> QuantizedTensor:
        """Return the packed weight of a module."""
        if self._format is None:
            raise KeyError(module)
        tensors = {name: self._reader.read(name) for name in self._parts[module]}
        return self._format.unpack(module, tensors, self.grids[module])

    def read(self, name: str) -> Tensor:
        """Return the dense tensor of that name on the CPU.

        Raises:
            DamagedError: it is missing or its bytes are.
        """
        module = self._packed_module(name)
        if module is None:
            return self._reader.read(name)
        return self.quantized(module).dequantize().to(self._dtype)
