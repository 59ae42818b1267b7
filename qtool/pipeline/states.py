"""Hidden states behind a finished block, kept so that a killed run goes on from the same bits.

Only those behind the last finished block are kept: two files, one for each stream, of the size that
the stream has in memory. They are written before the journal speaks of them, and hashed, so nothing
depends on when the kernel puts them on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from qtool.calibration.activations import HiddenStates
from qtool.checkpoint.disk_errors import write_error
from qtool.checkpoint.reader import tensor_bytes
from qtool.checkpoint.untrusted import open_regular
from qtool.errors import DamagedError
from qtool.pipeline.journal import StateFile

MAX_TENSOR_BYTES = 1 << 30  # of what is kept beside a block: norms, biases, moments


class States:
    """The directory of states of one run.

    Args:
        directory: is made when something is saved.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save_hidden(self, stream: str, index: int, hidden: HiddenStates) -> StateFile:
        """Write what one stream holds behind block `index`.

        Raises:
            CapacityError, DamagedError: the disk is full or failed.
        """
        name = f"{stream}-{index:05d}.bin"
        digest = hashlib.sha256()
        path = self._path(name)
        try:
            with path.open("wb", buffering=0) as file:
                for batch in hidden:
                    content = tensor_bytes(batch.detach().cpu().contiguous())
                    digest.update(content)
                    while content:
                        content = content[file.write(content) :]
        except OSError as error:
            raise write_error(path, error) from error
        return StateFile(name, digest.hexdigest())

    def load_hidden(self, file: StateFile, hidden: HiddenStates) -> bool:
        """Replace what a stream holds by what is in a file; False where the file is not whole.

        Nothing is replaced unless the file has the bytes that were saved.
        """
        if not self.whole(file, hidden):
            return False
        with (self._directory / file.name).open("rb", buffering=0) as source:
            for index in range(len(hidden)):
                batch = torch.empty_like(hidden.get(index), device="cpu").contiguous()
                content = tensor_bytes(batch)
                while content:
                    got = source.readinto(content)
                    if not got:
                        return False
                    content = content[got:]
                hidden.put(index, batch)
        return True

    def save_tensors(
        self, kind: str, index: int, tensors: Mapping[str, Tensor]
    ) -> StateFile | None:
        """Write small tensors that belong to block `index`, if there are any.

        Raises:
            CapacityError, DamagedError: the disk is full or failed.
        """
        if not tensors:
            return None
        name = f"{kind}-{index:05d}.safetensors"
        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        try:
            self._path(name).write_bytes(content)
        except OSError as error:
            raise write_error(self._directory / name, error) from error
        return StateFile(name, hashlib.sha256(content).hexdigest())

    def load_tensors(self, file: StateFile | None) -> Mapping[str, Tensor] | None:
        """Return what `save_tensors` wrote; None where the file is not whole."""
        if file is None:
            return {}
        if not self._has_bytes(file, MAX_TENSOR_BYTES):
            return None
        try:
            found: dict[str, Tensor] = load_file(self._directory / file.name)
        except (SafetensorError, OSError):
            return None
        return found

    def whole(self, file: StateFile, hidden: HiddenStates) -> bool:
        """Tell whether a file has the bytes that were saved, as many as a stream has."""
        batches = (hidden.get(index) for index in range(len(hidden)))
        return self._has_bytes(file, sum(x.numel() * x.element_size() for x in batches))

    def _has_bytes(self, file: StateFile, most: int) -> bool:
        digest = hashlib.sha256()
        try:
            source, size = open_regular(self._directory / file.name)
            with source:
                if size > most:
                    return False
                while chunk := source.read(1 << 24):
                    digest.update(chunk)
        except (OSError, DamagedError):
            return False
        return digest.hexdigest() == file.sha256

    def remove_hidden(self, *, but: Mapping[str, StateFile]) -> None:
        """Remove the hidden states of earlier blocks."""
        kept = {file.name for file in but.values()}
        for path in self._directory.glob("*.bin"):
            if path.name not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, name: str) -> Path:
        try:
            self._directory.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(self._directory, error) from error
        return self._directory / name
