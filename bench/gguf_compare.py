"""What GGUF files by qtool lose, beside llama.cpp's own quantizer on the same tensor types.

    python bench/gguf_compare.py MODEL --text CALIBRATION.txt --evaluate EVALUATION.txt

The reference file has the types, names and keys of qtool's own, but every quantized tensor in it
was made by `ggml_quantize_chunk` out of the xllamacpp wheel, with importance from the statistics
that `qtool calibrate` takes of the same text, as llama-quantize does with an imatrix. All files
are run by llama.cpp; the KL divergence is against the float model in transformers.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from qtool.checkpoint.gguf_header import read_gguf
from qtool.ggml_types import FLOAT_TYPES, GGML_TYPES

METHODS = ("rtn", "awq", "gptq", "awq+gptq")
QTOOL = [sys.executable, "-m", "qtool"]


def reference_quantizer():
    """Return `ggml_quantize_chunk` of the wheel."""
    import xllamacpp  # noqa: F401  loads the libraries beside it

    origin = Path(importlib.util.find_spec("xllamacpp").origin)
    function = ctypes.CDLL(str(origin.parent / "xllamacpp.abi3.so")).ggml_quantize_chunk
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return function


def run(*arguments):
    """Run qtool and return its JSON and its CPU seconds."""
    before = os.times()
    done = subprocess.run(
        [*QTOOL, *map(str, arguments), "--json", "-q"], capture_output=True, text=True, check=False
    )
    after = os.times()
    if done.returncode:
        sys.exit(done.stderr)
    spent = after.children_user + after.children_system
    return json.loads(done.stdout), spent - before.children_user - before.children_system


def importances(statistics):
    """Return tensor name -> mean x^2 of its inputs."""
    contents = read_gguf(statistics)
    raw = np.memmap(statistics, np.uint8, "r")
    values = {t.name: raw[t.start : t.stop].view(np.float32) for t in contents.tensors}
    ending = ".in_sum2"
    return {
        name.removesuffix(ending): data / values[name.removesuffix(ending) + ".counts"]
        for name, data in values.items()
        if name.endswith(ending)
    }


def write_reference(floats, like, target, importance):
    """Fill a copy of `like` with what the reference quantizer makes of the tensors of `floats`."""
    quantize = reference_quantizer()
    shutil.copyfile(like, target)
    source = {t.name: t for t in read_gguf(floats).tensors}
    raw, out = np.memmap(floats, np.uint8, "r"), np.memmap(target, np.uint8, "r+")
    started = time.process_time()
    for tensor in read_gguf(target).tensors:
        if tensor.dtype in FLOAT_TYPES:
            continue
        found = source[tensor.name]
        weights = np.ascontiguousarray(raw[found.start : found.stop]).view(np.float32)
        rows, columns = tensor.shape
        made = np.empty(tensor.stop - tensor.start, np.uint8)
        weight = importance.get(tensor.name)
        pointer = None
        if weight is not None:
            weight = np.ascontiguousarray(weight, np.float32)
            pointer = weight.ctypes.data
        number = GGML_TYPES[tensor.dtype].number
        written = quantize(number, weights.ctypes.data, made.ctypes.data, 0, rows, columns, pointer)
        assert written == made.nbytes, tensor.name
        out[tensor.start : tensor.stop] = made
    out.flush()
    return time.process_time() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--evaluate", required=True, help="text for the KL divergence")
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q3_K_M", "Q2_K"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--evaluation-windows", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("bench-gguf"))
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="more flags of qtool")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    text = ["-d", options.text, "-n", options.windows, "-l", options.length]
    statistics, floats = out / "statistics.gguf", out / "floats.gguf"
    run("calibrate", options.model, "-o", statistics, *text, "--overwrite")
    run("export", options.model, "-f", "gguf:F32", "-o", floats, "--overwrite")
    importance = importances(statistics)
    print("| type | maker | KL divergence | against the reference | MB | CPU s |")
    print("|---|---|---|---|---|---|", flush=True)
    for kind in options.types:
        base = out / f"importance-{kind}.gguf"
        flags = ("-f", f"gguf:{kind}", "-o", base, "--overwrite", "--statistics", statistics)
        _, spent = run("export", options.model, *flags)
        files = {"reference, importance": (out / f"reference-{kind}.gguf", 0.0)}
        reference = files["reference, importance"][0]
        files["reference, importance"] = (
            reference, write_reference(floats, base, reference, importance)
        )  # fmt: skip
        files["qtool rtn, importance"] = (base, spent)
        for method in options.methods:
            path = out / f"{method}-{kind}.gguf"
            data = [] if method == "rtn" else text
            flags = ("-m", method, "-f", f"gguf:{kind}", "-o", path, "--overwrite", *data)
            _, spent = run("quantize", options.model, *flags, "--eval", "none", *options.extra)
            files[f"qtool {method}"] = (path, spent)
        paths = [path for path, _ in files.values()]
        setting = ("--data", options.evaluate, "--ctx", "512", "-n", options.evaluation_windows)
        found, _ = run("eval", *paths, "--ref", options.model, *setting)
        results = [one["metrics"]["kld"] for one in found["results"]]
        for (name, (path, spent)), kld in zip(files.items(), results, strict=True):
            print(
                f"| {kind} | {name} | {kld['mean']:.4f} ± {kld['se']:.4f} | "
                f"{kld['mean'] / results[0]['mean']:.3f} | {path.stat().st_size / 1e6:.1f} | "
                f"{spent:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
