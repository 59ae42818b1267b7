"""Quantize with GPTQModel's GPTQ, on the CPU, and report what it cost.

python gptqmodel_gptq.py MODEL_DIR WINDOWS.npy OUT_DIR --bits 4 --group-size 64 --sym
"""

import os

from accounting import Measured, arguments

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it cannot load a model with one worker
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main():
    """Load, quantize and save with the defaults of the peer."""
    chosen = arguments("GPTQ by GPTQModel")
    # The import stays outside the measurement: it takes seconds and says nothing about the method.
    from gptqmodel import GPTQModel, QuantizeConfig

    samples = [
        {"input_ids": row, "attention_mask": [1] * len(row)} for row in chosen.windows.tolist()
    ]
    with Measured("gptqmodel-gptq", "gptqmodel", chosen.out):
        config = QuantizeConfig(
            bits=chosen.bits,
            group_size=chosen.group_size,
            sym=chosen.symmetric,
            device="cpu",
        )
        model = GPTQModel.load(chosen.model, config)
        model.quantize(samples, batch_size=1)
        model.save(str(chosen.out))


if __name__ == "__main__":
    main()
