"""Where arithmetic runs. The only module that speaks of CUDA.

Numeric code elsewhere takes tensors as they come; devices, precision switches and memory figures
are decided here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from qtool.errors import UsageError

ROWS_AT_ONCE = 16384  # of inputs that are widened to float32 together
GRAM_WIDTH = 256  # narrower strips of a Gram matrix multiply too slowly to be worth saving


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


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Have the same operations on the same device give the same bits while the context lasts.

    The CPU does so by itself for one number of threads. On CUDA, kernels that add in any order are
    replaced, or warned of where there is no other.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    chooses, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.backends.cudnn.benchmark = chooses


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


def add_products(gram: Tensor, cross: Tensor | None, inputs: Tensor, twin: Tensor | None) -> None:
    """Add x^T x to `gram` and x^T y to `cross`, for x `inputs` and y `twin`.

    For bfloat16 inputs every product is exact and sums are float32: faster, with nothing lost.

    Args:
        gram: [C, C] float32; only its upper triangle is kept up, see `mirror`.
        cross: [C, C] float32, or None.
        inputs: [T, C].
        twin: [T, C] of the same dtype, or None.
    """
    columns = gram.shape[0]
    width = max(GRAM_WIDTH, -(-columns // 4))
    twins = inputs.split(ROWS_AT_ONCE) if twin is None else twin.split(ROWS_AT_ONCE)
    with contextlib.ExitStack() as stack:
        if inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu":
            stack.enter_context(_bfloat16_products())
        for part, other in zip(inputs.split(ROWS_AT_ONCE), twins, strict=True):
            wide = part.to(torch.float32)
            for start in range(0, columns, width):
                left = wide[:, start : start + width].T
                gram[start : start + width, start:].addmm_(left, wide[:, start:])
            if cross is not None:
                cross.addmm_(wide.T, other.to(torch.float32))


def mirror(gram: Tensor) -> Tensor:
    """Fill in the lower triangle of a symmetric matrix [C, C] of which the upper one is known.

    Works in place and returns the matrix: a second one would not fit where the first just did.
    """
    for start in range(0, len(gram), GRAM_WIDTH):
        stop = min(start + GRAM_WIDTH, len(gram))
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Return peak bytes of (resident host memory, device memory) since the program started."""
    # What getrusage says begins with the peak of the process that started this one, so that a
    # small run launched by a large program would be reported as large.
    ram = _linux_bytes("/proc/self/status", "VmHWM")
    if ram is None:
        unit = 1 if sys.platform == "darwin" else 1024
        ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return ram, vram


def free_memory(device: torch.device) -> int:
    """Return bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _linux_bytes("/proc/meminfo", "MemAvailable")
    return 8 * 2**30 if available is None else available


def _linux_bytes(path: str, name: str) -> int | None:
    """Return a figure that Linux gives in kB in one of its tables, or None elsewhere."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(path) as lines:  # noqa: PTH123
        for line in lines:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library would keep it.

    Large tensors come and go around small ones that stay, so that glibc's heap grows block after
    block although no more of it is in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def kind(device: torch.device) -> str:
    """Return what decides how sums are rounded: the GPU's name, or the CPU's instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def threads() -> int:
    """Return how many threads share an operation on the CPU; sums may depend on it."""
    return torch.get_num_threads()


def use_threads(count: int) -> None:
    """Share operations on the CPU among `count` threads."""
    torch.set_num_threads(count)


def describe(device: torch.device) -> str:
    """Return a short name of the device for reports."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
