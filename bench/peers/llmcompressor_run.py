"""Quantize with llm-compressor's GPTQ or AWQ, on the CPU, and report what it cost.

python llmcompressor_run.py MODEL_DIR WINDOWS.npy OUT_DIR --method awq --bits 4 --group-size 64
"""

import os

from accounting import Measured, arguments

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def recipe(chosen):
    """The modifiers of the method, on every linear but the head, with the peer's defaults."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=chosen.bits,
            type="int",
            symmetric=chosen.symmetric,
            strategy="group",
            group_size=chosen.group_size,
        ),
    )
    where = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if chosen.method == "gptq":
        return [GPTQModifier(**where)]
    return [AWQModifier(), QuantizationModifier(**where)]


def do_without_pinned_memory():
    """Let AWQ run without an accelerator: it pins its cache, which only one allows."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def main():
    """Load, quantize and save with the defaults of the peer."""
    chosen = arguments("GPTQ or AWQ by llm-compressor", methods=("gptq", "awq"))
    # The imports stay outside the measurement: they take seconds and say nothing about the method.
    from datasets import Dataset
    from llmcompressor import oneshot

    do_without_pinned_memory()
    rows = chosen.windows.tolist()
    samples = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    modifiers = recipe(chosen)
    with Measured(f"llmcompressor-{chosen.method}", "llmcompressor", chosen.out):
        oneshot(
            model=chosen.model,
            dataset=samples,
            recipe=modifiers,
            num_calibration_samples=len(rows),
            max_seq_length=chosen.windows.shape[1],
            output_dir=str(chosen.out),
        )


if __name__ == "__main__":
    main()
