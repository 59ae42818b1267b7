"""Show that peak memory does not grow with the number of layers: 4 equal blocks against 24.

    python bench/memory.py [--method gptq] [--blocks 4 24]

Makes random Llamas of equal blocks, runs `qtool quantize` on each in a process of its own and
prints the peak resident set that the operating system counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

HIDDEN, INTERMEDIATE, HEADS = 1024, 2816, 16


def make_llama(directory: Path, blocks: int) -> None:
    """Write a random Llama with `blocks` blocks of 12.8 million weights each."""
    import torch
    from tiny_tokenizer import tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), 512),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def peak_bytes(model: Path, out: Path, method: str) -> tuple[int, float]:
    """Return peak resident bytes and CPU seconds of one `qtool quantize`."""
    command = [sys.executable, "-m", "qtool", "quantize", str(model), "-o", str(out), "-q"]
    command += ["-m", method, "-n", "16", "-l", "512", "--eval", "none"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"qtool failed on {model}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and print one row for each number of blocks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        make_llama(options.make, options.blocks[0])
        return
    print("| method | blocks | model GB | peak resident GB | against the first | CPU s |")
    print("|---|---|---|---|---|---|")
    first = 0
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as directory:
            model = Path(directory) / "model"
            # In a process of its own: a child's peak starts at what its parent holds.
            maker = [sys.executable, __file__, "--make", str(model), "--blocks", str(blocks)]
            subprocess.run(maker, check=True, stderr=subprocess.DEVNULL)
            size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
            peak, cpu = peak_bytes(model, Path(directory) / "out", options.method)
        first = first or peak
        ratio = f"{peak / first:.3f}"
        row = [
            options.method,
            blocks,
            f"{size / 1e9:.2f}",
            f"{peak / 1e9:.3f}",
            ratio,
            f"{cpu:.0f}",
        ]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
