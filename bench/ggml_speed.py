"""Quantize to every block type of ggml with qtool and with llama.cpp, side by side in one run.

    python bench/ggml_speed.py [--model DIRECTORY] [--types Q4_K Q6_K] [--million 1.0]

qtool: scales, codes and bytes. llama.cpp: `ggml_quantize_chunk` in the xllamacpp wheel. One thread,
CPU seconds of this process, the median of rounds in which the two take turns. The error is the
squared error weighted by importance, relative to the weights' squares weighted alike.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qtool.formats.ggml_blocks import dequantize, pack
from qtool.ggml_types import GGML_TYPES
from qtool.grids.ggml import LAYOUTS, GgmlGrid
from qtool.grids.protocol import QuantizedTensor

COLUMNS = 1024
SIDES = ("reference-Mw/s", "ours-Mw/s", "ratio", "reference-error", "ours-error", "ratio")
HEADINGS = ("type", "importance", "weights", *SIDES)


def reference_quantizer() -> Callable[[Tensor, str, Tensor | None], Tensor]:
    """Return llama.cpp's own quantizer: weight [R, C], type, importance [C] -> bytes."""
    import xllamacpp  # noqa: F401  loads the libraries that its own needs

    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("xllamacpp is not installed")
    library = ctypes.CDLL(str(Path(spec.origin).parent / "xllamacpp.abi3.so"))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]

    def quantize(weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
        rows, columns = weight.shape
        kind = GGML_TYPES[name]
        stored = np.empty((rows, columns // kind.block * kind.block_bytes), dtype=np.uint8)
        weights = None if importance is None else importance.data_ptr()
        chunk(kind.number, weight.data_ptr(), stored.ctypes.data, 0, rows, columns, weights)
        return torch.from_numpy(stored)

    return quantize


def quantize(weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
    """Return the bytes that qtool makes of weight [R, C]."""
    grid = GgmlGrid(name)
    parameters = grid.fit(weight, importance)
    return pack(QuantizedTensor(grid.encode(weight, parameters), parameters, grid))


def normal(rows: int) -> Tensor:
    """Return normal weights."""
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02


def student(rows: int) -> Tensor:
    """Return weights with the heavy tails of Student's t, five degrees of freedom."""
    draw = torch.Generator().manual_seed(1)
    chi = sum(torch.randn(rows, COLUMNS, generator=draw).square() for _ in range(5)) / 5
    return torch.randn(rows, COLUMNS, generator=draw) / chi.sqrt() * 0.02


def of_model(directory: Path, count: int) -> Tensor:
    """Return about `count` weights of the matrices of one width in a model's directory."""
    from safetensors import safe_open

    matrices: dict[int, list[Tensor]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  a handle, not a mapping
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and shape[1] % 256 == 0 and "embed" not in name:
                    matrices.setdefault(shape[1], []).append(file.get_tensor(name).float())
    if not matrices:
        raise SystemExit(f"no matrix in {directory} has rows of whole blocks of 256")
    width, parts = max(matrices.items(), key=lambda item: sum(map(Tensor.numel, item[1])))
    return torch.cat(parts)[: max(1, count // width)].contiguous()


def relative_error(weight: Tensor, stored: Tensor, name: str, importance: Tensor) -> float:
    """Return the weighted squared error as a share of the weighted squares."""
    values = dequantize(name, stored, weight.shape[1]).double()
    squares = (weight.double().square() * importance.double()).sum()
    return float(((weight.double() - values).square() * importance.double()).sum() / squares)


def seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return the CPU seconds of a call, and what it returned."""
    start = time.process_time()
    made = call()
    return time.process_time() - start, made


def main() -> None:
    """Measure every combination and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="take real weights from here as well")
    parser.add_argument("--types", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--million", type=float, default=1.0, help="weights of each matrix")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = int(options.million * 2**20)
    matrices = {"normal": normal(count // COLUMNS), "student-t": student(count // COLUMNS)}
    if options.model:
        matrices["model"] = of_model(options.model, count)
    theirs = reference_quantizer()
    print("| " + " | ".join(HEADINGS) + " |")
    print("|---" * len(HEADINGS) + "|")
    for name in options.types:
        for source, weight in matrices.items():
            draw = torch.Generator().manual_seed(2)
            lognormal = torch.randn(weight.shape[1], generator=draw).exp()
            for label, importance in (("none", None), ("lognormal", lognormal)):
                turns = (
                    (theirs, weight, name, importance),
                    (quantize, weight, name, importance),
                )
                times: list[list[float]] = [[], []]
                errors = [0.0, 0.0]
                scored = torch.ones_like(lognormal) if importance is None else importance
                for _ in range(options.rounds):
                    for side, (call, *arguments) in enumerate(turns):
                        spent, stored = seconds(lambda: call(*arguments))  # noqa: B023  runs now
                        times[side].append(spent)
                        errors[side] = relative_error(weight, stored, name, scored)
                speeds = [weight.numel() / statistics.median(spent) / 1e6 for spent in times]
                print(
                    f"| {name} | {label} | {source} | {speeds[0]:.1f} | {speeds[1]:.1f} "
                    f"| {speeds[1] / speeds[0]:.2f} | {errors[0]:.4e} | {errors[1]:.4e} "
                    f"| {errors[1] / errors[0]:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
