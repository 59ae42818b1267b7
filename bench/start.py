"""Measure what commands take before they do anything: processor seconds, the best of several runs.

    python bench/start.py MODEL [--runs 5]

Each command runs in a process of its own. MODEL should be a small one: `calibrate` runs a single
window of eight tokens through it, so that imports, the built-in text and the tokenizer are most of
what it takes. `import torch` and `import transformers` stand in the table for comparison.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def seconds(command: list[str], runs: int) -> float:
    """Return the least processor seconds that a command took."""
    used = []
    for _ in range(runs):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        errors = process.stderr.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
        used.append(usage.ru_utime + usage.ru_stime)
    return min(used)


def main() -> None:
    """Measure and print one row for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    model = str(options.model.resolve())
    python = [sys.executable, "-c"]
    qtool = [sys.executable, "-m", "qtool"]
    with tempfile.TemporaryDirectory() as directory:
        gathered = [model, "-n", "1", "-l", "8", "-q", "--overwrite", "-o", f"{directory}/s.gguf"]
        commands = {
            "import torch": [*python, "import torch"],
            "import transformers": [*python, "from transformers import LlamaForCausalLM"],
            "qtool --help": [*qtool, "--help"],
            "qtool inspect MODEL": [*qtool, "inspect", model],
            "qtool estimate-memory 70b": [*qtool, "estimate-memory", "70b", "--gpu", "24GB"],
            "qtool quantize MODEL --dry-run": [*qtool, "quantize", model, "--dry-run"],
            "qtool calibrate MODEL -n 1 -l 8": [*qtool, "calibrate", *gathered],
        }
        print("| command | processor s |")
        print("|---|---|")
        for name, command in commands.items():
            print(f"| `{name}` | {seconds(command, options.runs):.2f} |", flush=True)


if __name__ == "__main__":
    main()
