"""Read tensors of a checkpoint, one at a time, without keeping any of it in memory.

The tensors of GGUF files are read like those of safetensors; of ggml's own types only the bytes.

The bytes come through plain reads into memory of our own rather than through a memory map:
mapped pages would count as resident until the map is closed, and a file that is truncated while
it is read would kill the process instead of raising an error.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qtool.checkpoint.gguf_header import is_gguf
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.untrusted import GET_AGAIN, GET_MORE, open_regular, printable, shown_path
from qtool.errors import (
    CapacityError,
    DamagedError,
    NumericalError,
    UnsupportedError,
    is_out_of_memory,
)

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

CHUNK_BYTES = 16 << 20


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared with it."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class TensorReader:
    """Read tensors by name from the files they lie in; a context manager.

    Files are opened when first needed and closed by `close`, after which they open again.
    """

    def __init__(self, refs: Mapping[str, TensorRef]) -> None:
        self._refs = refs
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every open file."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype on the CPU, in memory of its own.

        Raises:
            DamagedError: there is no such tensor, or its file cannot be read to its end.
        """
        ref = self.ref(name)
        if ref.dtype not in TORCH_DTYPES:
            raise UnsupportedError(f"{_where(ref)} has dtype {ref.dtype}, which torch lacks")
        tensor = torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype])
        if ref.n_bytes:
            self._fill(ref, ref.start, tensor_bytes(tensor))
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of one tensor, as `read` would.

        Raises:
            DamagedError: there is no such tensor, or its file cannot be read to its end.
        """
        ref = self.ref(name)
        if ref.dtype not in TORCH_DTYPES:
            raise UnsupportedError(f"{_where(ref)} has dtype {ref.dtype}, which torch lacks")
        tensor = torch.empty((stop - start, *ref.shape[1:]), dtype=TORCH_DTYPES[ref.dtype])
        if tensor.numel():
            width = ref.n_bytes // ref.shape[0]
            self._fill(ref, ref.start + start * width, tensor_bytes(tensor))
        return tensor

    def raw(self, name: str, start: int, count: int) -> Tensor:
        """Return `count` bytes of one tensor from byte `start` of it, uint8.

        Raises:
            DamagedError: there is no such tensor, or its file cannot be read to its end.
        """
        ref = self.ref(name)
        data = torch.empty(count, dtype=torch.uint8)
        if count:
            self._fill(ref, ref.start + start, tensor_bytes(data))
        return data

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the raw bytes of one tensor, at most 16 MiB at a time.

        Each piece is valid until the next is asked for.

        Raises:
            DamagedError: there is no such tensor, or its file cannot be read to its end.
        """
        ref = self.ref(name)
        buffer = memoryview(bytearray(min(CHUNK_BYTES, ref.n_bytes)))
        for start in range(ref.start, ref.stop, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, ref.stop - start)]
            self._fill(ref, start, piece)
            yield piece

    def ref(self, name: str) -> TensorRef:
        """Return where a tensor lies.

        Raises:
            DamagedError: there is no such tensor.
        """
        if name not in self._refs:
            raise DamagedError(
                f"the model has no tensor '{printable(name)}'",
                "its config.json and its weights do not belong together",
            )
        return self._refs[name]

    def file(self, name: str) -> Path:
        """Return the file that a tensor lies in.

        Raises:
            DamagedError: there is no such tensor.
        """
        return self.ref(name).file

    def _fill(self, ref: TensorRef, position: int, buffer: memoryview) -> None:
        """Read exactly `len(buffer)` bytes at an absolute position."""
        try:
            descriptor = self._file(ref.file).fileno()
            filled = 0
            # One read call returns at most 2 GiB on Linux, so large tensors take several.
            while filled < len(buffer):
                got = os.preadv(descriptor, [buffer[filled:]], position + filled)
                if not got:
                    # It had all its bytes when the run began, and may have them again.
                    raise DamagedError(
                        f"{_where(ref)} is cut short: the file ends", GET_AGAIN, resumable=True
                    )
                filled += got
        except OSError as error:
            raise DamagedError(
                f"{_where(ref)} cannot be read: {error.strerror}",
                "check the disk, or " + GET_AGAIN,
                resumable=True,
            ) from error

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._files:
            if not is_gguf(path):
                _ask_the_library(path)
            self._files[path] = open_regular(path)[0]
        return self._files[path]


def _where(ref: TensorRef) -> str:
    return f"{shown_path(ref.file)}: tensor '{printable(ref.name)}'"


def _ask_the_library(path: Path) -> None:
    """Let safetensors' own audited parser have its say about a file, too."""
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        where, said = shown_path(path), printable(error)
        if os.strerror(errno.EMFILE) in str(error):
            raise CapacityError(f"cannot read {where}: {said}", GET_MORE, resumable=True) from error
        if not isinstance(error, SafetensorError):
            raise DamagedError(f"cannot read {where}: {said}", GET_AGAIN, resumable=True) from error
        raise DamagedError(f"{where} is not a valid safetensors file: {said}", GET_AGAIN) from error


def check_finite(name: str, tensor: Tensor, file: Path | None = None) -> None:
    """Refuse a tensor with NaN or infinite values.

    Args:
        name: of the tensor.
        tensor: its values.
        file: that it lies in, if it is one of a file's.

    Raises:
        NumericalError: names the tensor, how many values are not finite, and the first of them.
    """
    if not tensor.is_floating_point():
        return
    values = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.bfloat16)
    if not values.numel():
        return
    # Minimum and maximum propagate NaN and show infinities without a mask as large as the tensor.
    if all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values)):
        return
    bad = ~torch.isfinite(values)
    first = tuple(int(i) for i in bad.nonzero()[0])
    value = float(values[first])
    where = "" if file is None else f"{shown_path(file)}: "
    raise NumericalError(
        f"{where}tensor '{printable(name)}' has {int(bad.sum())} values that are not finite, "
        f"the first ({value}) at {list(first)}",
        "the weights are damaged; get the model again or tell its author",
    )
