"""Hidden states between blocks: on the device while they fit, then in host memory, then on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qtool.checkpoint.disk_errors import write_error


class HiddenStates:
    """Batches of hidden states that are replaced block after block.

    Args:
        device: where blocks run.
        memory_bytes: batches beyond this many bytes go to `spill` as memory-mapped files.
        device_bytes: batches beyond this many bytes leave the device for host memory.
        spill: an existing directory for the files.
    """

    def __init__(
        self, device: torch.device, *, memory_bytes: int, device_bytes: int, spill: Path
    ) -> None:
        self._device = device
        self._memory_left = memory_bytes
        self._device_left = device_bytes
        self._spill = spill
        self._batches: list[Tensor] = []
        self._on_disk: set[int] = set()

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, batch: Tensor) -> None:
        """Add a batch [windows, length, hidden size], in the place where there is room."""
        size = batch.numel() * batch.element_size()
        if self._device.type == "cpu" or size > self._device_left:
            batch = batch.to("cpu")
            if size > self._memory_left:
                self._on_disk.add(len(self))
                self._batches.append(self._mapped(batch))
                return
            self._memory_left -= size
        else:
            self._device_left -= size
        self._batches.append(batch)

    def _mapped(self, batch: Tensor) -> Tensor:
        with tempfile.NamedTemporaryFile(dir=self._spill, delete=False) as file:
            name = file.name
            try:
                # Room is taken now: a full disk under a mapping would kill the process.
                if hasattr(os, "posix_fallocate"):
                    size = batch.numel() * batch.element_size()
                    os.posix_fallocate(file.fileno(), 0, max(1, size))
            except OSError as error:
                Path(name).unlink(missing_ok=True)
                raise write_error(self._spill, error) from error
        mapped = torch.from_file(name, shared=True, size=batch.numel(), dtype=batch.dtype)
        mapped.copy_(batch.reshape(-1))
        Path(name).unlink()  # the mapping keeps the bytes; nothing is left behind on a crash
        return mapped.reshape(batch.shape)

    def get(self, index: int) -> Tensor:
        """Return batch `index` on the device; a later `put` does not change what was returned."""
        return self._batches[index].to(self._device, copy=index in self._on_disk)

    def put(self, index: int, batch: Tensor) -> None:
        """Replace batch `index` by one of the same shape, in the same place."""
        place = self._batches[index]
        if index in self._on_disk:
            place.copy_(batch)
        else:
            self._batches[index] = batch.to(place.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.get(index) for index in range(len(self)))
