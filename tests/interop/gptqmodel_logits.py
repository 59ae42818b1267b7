"""Write the logits that GPTQModel computes on the CPU from a quantized directory.

    python gptqmodel_logits.py DIR TOKENS.npy OUT.npy --backend torch|torch_awq

Stands alone, because GPTQModel's pins clash with qtool's: run it with the interpreter of an
environment of its own (`make interop`). TOKENS.npy holds one window of int64 token ids, OUT.npy
receives float32 logits [tokens, vocabulary].

`--compute native` is GPTQModel as it is: both kernels multiply in float16, which alone moves the
logits by some 0.2 %. The default, `float32`, leaves GPTQModel its loader and its unpacking and
widens only the arithmetic, so that a difference that remains is a difference of layout. Its GPTQ
kernel follows the model's dtype; its AWQ kernel always multiplies in float16, so there the product
with GPTQModel's own dequantized matrix is taken in its place.
"""

import argparse
import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it cannot load a model with one worker
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # else it compiles C++ at the first token
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

BACKENDS = {"torch": BACKEND.TORCH, "torch_awq": BACKEND.TORCH_AWQ}


def widen(model):
    """Make the model compute in float32 from its packed weights."""
    model.float()
    for module in model.modules():
        if isinstance(module, AwqTorchLinear):
            module.forward = _float32_product(module)


def _float32_product(module):
    def forward(inputs):
        weight = dequantize_gemm(
            module.qweight, module.qzeros, module.scales.float(), module.bits, module.group_size
        )
        outputs = inputs @ weight
        return outputs if module.bias is None else outputs + module.bias

    return forward


def main():
    """Read the arguments, load, compute one window, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--backend", choices=sorted(BACKENDS), required=True)
    parser.add_argument("--compute", choices=("float32", "native"), default="float32")
    arguments = parser.parse_args()
    # float16, the dtype of the stored scales: bfloat16 would round them while loading.
    model = GPTQModel.load(
        arguments.directory,
        device="cpu",
        backend=BACKENDS[arguments.backend],
        dtype=torch.float16,
    ).model.eval()
    if arguments.compute == "float32":
        widen(model)
    tokens = torch.from_numpy(np.load(arguments.tokens))
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0]
    np.save(arguments.out, logits.float().numpy())


if __name__ == "__main__":
    main()
