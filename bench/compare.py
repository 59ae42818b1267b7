"""Quantize one model with qtool and its peers, on the same windows, in one run; print ratios.

    python bench/compare.py MODEL_DIR --text CALIBRATION.txt --evaluate EVALUATION.txt \
        --peer gptqmodel=.venv-interop/bin/python --peer autoround=.venv-autoround/bin/python \
        --peer llmcompressor=.venv-llmcompressor/bin/python

Runs follow one another, each in a process of its own, so that CPU seconds (user and system, imports
included, of the process and its children) and peak memory are the operating system's. What came
out is measured by `qtool eval`, which unpacks every format itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
SEED = 7


@dataclass
class Run:
    """One tool's turn."""

    name: str
    group: str
    directory: str
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    kld: float = float("nan")
    kld_se: float = float("nan")
    ppl: float = float("nan")


def main() -> None:
    """Run everything that was asked for and print a table."""
    options = _arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    windows = _save_windows(options)
    peers = dict(entry.split("=", 1) for entry in options.peer)
    runs = []
    for name, group, command in _commands(options, windows, peers):
        if options.only and name not in options.only:
            continue
        print(f"running {name} ...", file=sys.stderr, flush=True)
        run = _timed(name, group, command, options.out / name)
        if run is not None:
            runs.append(run)
            print(f"  {asdict(run)}", file=sys.stderr, flush=True)
    _evaluate(runs, options)
    (options.out / "compare.json").write_text(json.dumps([asdict(r) for r in runs], indent=1))
    print(table(runs))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--evaluate", type=Path, required=True, help="evaluation text")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--evaluation-windows", type=int, default=32)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", action="append", default=[], help="names of runs")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    return parser.parse_args()


def _save_windows(options: argparse.Namespace) -> Path:
    """Write the windows that `qtool quantize --seed` draws, for the peers."""
    import numpy as np
    from transformers import AutoTokenizer

    from qtool.calibration.datasets import parse_dataset
    from qtool.calibration.tokens import token_windows

    found = token_windows(
        AutoTokenizer.from_pretrained(str(options.model)),
        [parse_dataset(str(options.text))],
        windows=options.windows,
        length=options.length,
        seed=SEED,
    )
    path: Path = options.out / "windows.npy"
    np.save(path, found.ids.numpy())
    return path


def _commands(
    options: argparse.Namespace, windows: Path, peers: dict[str, str]
) -> list[tuple[str, str, list[str]]]:
    """Return (name, group of comparison, command without its output directory)."""
    size = str(options.group_size)
    data = ["-d", str(options.text), "-n", str(options.windows), "-l", str(options.length)]
    common = [*data, "--seed", str(SEED), "-g", size, "-b", "4", "--eval", "none", "-q"]
    own = [sys.executable, "-m", "qtool", "quantize", str(options.model), *common]
    symmetric, asymmetric = "W4 symmetric GPTQ", "W4 asymmetric AWQ"
    commands = [
        ("qtool-rtn-sym", symmetric, [*own, "-m", "rtn", "--sym", "-f", "gptq", "-o"]),
        ("qtool-gptq-sym", symmetric, [*own, "-m", "gptq", "--sym", "-f", "gptq", "-o"]),
        ("qtool-rtn-asym", asymmetric, [*own, "-m", "rtn", "--asym", "-f", "awq", "-o"]),
        ("qtool-awq-asym", asymmetric, [*own, "-m", "awq", "--asym", "-f", "awq", "-o"]),
    ]
    scripts = [
        ("gptqmodel", "gptqmodel-gptq-sym", symmetric, "gptqmodel_gptq.py", ["--sym"]),
        ("autoround", "autoround-sym", symmetric, "autoround_run.py", ["--sym"]),
        (
            "llmcompressor",
            "llmcompressor-gptq-sym",
            symmetric,
            "llmcompressor_run.py",
            ["--sym", "--method", "gptq"],
        ),
        (
            "llmcompressor",
            "llmcompressor-awq-asym",
            asymmetric,
            "llmcompressor_run.py",
            ["--asym", "--method", "awq"],
        ),
    ]
    for peer, name, group, script, flags in scripts:
        if peer in peers:
            python = str(Path(peers[peer]).absolute())
            start = [python, str(HERE / "peers" / script), str(options.model), str(windows)]
            commands.append((name, group, [*start, "--group-size", size, *flags]))
    return commands


def _timed(name: str, group: str, command: list[str], out: Path) -> Run | None:
    """Run a command to its end and account for it; None if it failed."""
    subprocess.run(["rm", "-rf", str(out)], check=True)
    full = [*command, str(out)]
    if command[1] != "-m":  # peers take the output in third place
        full = [*command[:4], str(out), *command[4:]]
    started = time.perf_counter()
    # For all alike: threads that spin while they wait would count as work.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    with (out.parent / f"{name}.log").open("w") as log:
        process = subprocess.Popen(full, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status != 0:
        print(f"  {name} failed, see {out.parent / name}.log", file=sys.stderr)
        return None
    cpu = usage.ru_utime + usage.ru_stime
    return Run(name, group, str(out), cpu, wall, usage.ru_maxrss * 1024)


def _evaluate(runs: list[Run], options: argparse.Namespace) -> None:
    """Measure all results against the original in one go."""
    command = [sys.executable, "-m", "qtool", "eval", *(run.directory for run in runs)]
    command += ["--ref", str(options.model), "--data", str(options.evaluate), "--json", "-q"]
    command += ["--ctx", str(options.length), "-n", str(options.evaluation_windows)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    for run, result in zip(runs, found["results"], strict=True):
        metrics = result["metrics"]
        run.kld, run.kld_se = metrics["kld"]["mean"], metrics["kld"]["se"]
        run.ppl = metrics["ppl"]["value"]


def table(runs: list[Run]) -> str:
    """Return the runs as a Markdown table, each against qtool's best of its group."""
    lines = [
        "| comparison | tool | KL divergence | perplexity | CPU s | wall s | peak GB | "
        "qtool's KL / its KL | qtool's CPU / its CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for group in dict.fromkeys(run.group for run in runs):
        members = sorted((r for r in runs if r.group == group), key=lambda r: r.kld)
        ours = next(
            (r for r in members if r.name.startswith("qtool") and "rtn" not in r.name), None
        )
        for r in members:
            ratios = "| | |"
            if ours is not None and r is not ours:
                ratios = f"| {ours.kld / r.kld:.2f} | {ours.cpu_seconds / r.cpu_seconds:.2f} |"
            lines.append(
                f"| {group} | {r.name} | {r.kld:.4f} ± {r.kld_se:.4f} | {r.ppl:.2f} | "
                f"{r.cpu_seconds:.0f} | {r.wall_seconds:.0f} | {r.peak_bytes / 1e9:.2f} {ratios}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
