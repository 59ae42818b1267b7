"""Where arithmetic runs. The only module that speaks of CUDA.

Numeric code elsewhere takes tensors as they come; devices, precision switches and memory figures
are decided here.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from qtool.errors import UsageError


def resolve(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: an unknown name, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in {"cpu", "cuda"} or (index and not index.isdigit()):
        raise UsageError(f"unknown device '{name}'", "use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            "this machine has no CUDA device that PyTorch can use",
            "use --device cpu, or install a CUDA build of PyTorch",
        )
    if index and int(index) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {name}; the machine has {torch.cuda.device_count()}",
            "use --device auto",
        )
    return torch.device(name)


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype in which a model stored as `stored` runs during calibration.

    Sixteen bits where the device multiplies them natively, float32 otherwise: emulated bfloat16
    is slower than float32 on a CPU, and float16 has no fast kernels there at all.
    """
    if device.type == "cuda":
        return stored if stored in {torch.bfloat16, torch.float16} else torch.float32
    if stored == torch.bfloat16 and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 dot products (AVX512_BF16, AMX or their Arm peers)."""
    supports = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool((supports and supports()) or (amx and amx()))


@contextlib.contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Multiply float32 matrices by their leading bfloat16 parts, accumulating in float32."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    previous = getattr(matmul, "fp32_precision", None)
    if matmul is None or previous is None or not _cpu_multiplies_bfloat16():
        yield
        return
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = previous


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to `total` [A, B] float32, for left [T, A] and right [T, B] of one dtype.

    For bfloat16 operands every product is exact and sums are float32: faster, with nothing lost.
    """
    with contextlib.ExitStack() as stack:
        if left.dtype == torch.bfloat16 and left.device.type == "cpu":
            stack.enter_context(_bfloat16_products())
        rows = 16384  # a float32 copy of the operands is made; keep it small
        for a, b in zip(left.split(rows), right.split(rows), strict=True):
            a32 = a.to(torch.float32)
            total.addmm_(a32.T, a32 if b is a or left is right else b.to(torch.float32))


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Return peak bytes of (resident host memory, device memory) since the process started."""
    unit = 1 if sys.platform == "darwin" else 1024
    ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return ram, vram


def free_memory(device: torch.device) -> int:
    """Return bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 8 * 2**30


def describe(device: torch.device) -> str:
    """Return a short name of the device for reports."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
