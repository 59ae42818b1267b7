"""Quantize with AutoRound (20 iterations), on the CPU, and report what it cost.

python autoround_run.py MODEL_DIR WINDOWS.npy OUT_DIR --bits 4 --group-size 64 --sym
"""

import os

from accounting import Measured, arguments

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ITERATIONS = 20  # of its default 200, which takes ten times as long


def main():
    """Load, quantize and save in the GPTQ layout, with the defaults of the peer."""
    chosen = arguments("SignRound by AutoRound")
    # The imports stay outside the measurement: they take seconds and say nothing about the method.
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with Measured(f"autoround-{ITERATIONS}", "auto-round", chosen.out):
        rounder = AutoRound(
            AutoModelForCausalLM.from_pretrained(chosen.model, dtype="auto"),
            AutoTokenizer.from_pretrained(chosen.model),
            bits=chosen.bits,
            group_size=chosen.group_size,
            sym=chosen.symmetric,
            iters=ITERATIONS,
            nsamples=len(chosen.windows),
            seqlen=chosen.windows.shape[1],
            dataset=DataLoader(
                [{"input_ids": row} for row in torch.from_numpy(chosen.windows)],
                batch_size=min(8, len(chosen.windows)),
            ),
            device_map="cpu",
        )
        # It writes into a directory of its own naming inside the one it is given.
        inside = chosen.out.with_name(f"{chosen.out.name}.partial")
        rounder.quantize_and_save(str(inside), format="auto_gptq")
        (written,) = inside.iterdir()
        written.replace(chosen.out)
        inside.rmdir()


if __name__ == "__main__":
    main()
