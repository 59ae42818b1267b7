"""CPU seconds of `qtool eval` beside those of the plain transformers forward passes it needs.

    python bench/eval_speed.py demo/SmolLM2-135M-Instruct --model demo/SmolLM2-135M-awq-w4g64

Both sides run in processes of their own, one after the other, on the same tokens, in float32, with
imports and loading included. The plain side computes the logits of every window of both models and
looks at none of them. `--model` may be a packed model; the plain side then runs the original twice,
which is what the packed one amounts to once unpacked.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
path, windows, passes = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
for _ in range(passes):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for ids in windows:
            model(torch.tensor([ids]), use_cache=False).logits
"""
WINDOWS = """
import json, sys
from transformers import AutoTokenizer
from qtool.calibration.datasets import parse_dataset
from qtool.calibration.tokens import evaluation_windows
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found = evaluation_windows(
    tokenizer, parse_dataset("builtin"), length=int(sys.argv[2]), limit=int(sys.argv[3])
)
json.dump(found.ids.tolist(), open(sys.argv[4], "w"))
"""


def cpu_seconds(command: list[str]) -> tuple[float, float]:
    """Run a command; return its CPU seconds and its peak resident GB."""
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=quiet)
    _, status, used = os.wait4(pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)[:200]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("--model", help="default: the original itself")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=2)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text, cache = Path(scratch) / "windows.json", Path(scratch) / "cache"
        sizes = [str(chosen.context), str(chosen.windows)]
        subprocess.run(
            [sys.executable, "-c", WINDOWS, chosen.original, *sizes, str(text)], check=True
        )
        count = sum(map(len, json.loads(text.read_text())))
        plain = [sys.executable, "-c", PLAIN, chosen.original, str(text)]
        model = chosen.model or chosen.original
        ours = [sys.executable, "-m", "qtool", "eval", model, "--ref", chosen.original]
        ours += ["--ctx", sizes[0], "-n", sizes[1], "--metrics", "all", "--json", "-q"]
        kept = [*ours, "--logits-cache", str(cache)]
        print(f"{count} tokens, windows of {chosen.context}, {os.cpu_count()} cores")
        for _ in range(chosen.repeat):
            rows = [
                ("transformers, two passes", *cpu_seconds([*plain, "2"])),
                ("qtool eval --ref", *cpu_seconds(ours)),
                ("transformers, one pass", *cpu_seconds([*plain, "1"])),
                ("the same, cache empty", *cpu_seconds(kept)),
                ("the same, cache full", *cpu_seconds(kept)),
            ]
            subprocess.run(["rm", "-r", str(cache)], check=True)
            for name, seconds, peak in rows:
                base = rows[2 if name.endswith(("full", "one pass")) else 0][1]
                print(f"{name:26} {seconds:7.1f} CPU s  {seconds / base:5.2f} x  {peak:5.2f} GB")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
