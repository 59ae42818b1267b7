"""Error propagation: aim each layer at the float model's output, from the inputs it really gets.

A layer after quantized ones receives x~ instead of x. The weight whose output on x~ is nearest to
W x is  W* = W C H^-1  with  C = mean of x x~^T  and  H = mean of x~ x~^T.  Rounding W* instead of W
lets every layer repair part of what the layers before it lost, at no cost in the file.

Paper: Arai & Ichikawa, "Quantization Error Propagation", 2025, https://arxiv.org/abs/2504.09629.

Shapes: R = out_features, C = in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.methods.gptq import inverse_cholesky


def corrected_target(
    weight: Tensor,  # [R, C] float32; not modified
    hessian: Tensor,  # [C, C] float32, mean of x~ x~^T; not modified
    cross: Tensor,  # [C, C] float32, mean of x~ x^T; not modified
    *,
    strength: float,  # 0 leaves the weight as it is, 1 corrects in full
    damp_percent: float,  # as in GPTQ: keeps directions that were hardly seen in place
) -> Tensor:
    """Return the weight [R, C] float32 that reproduces the float output from quantized inputs.

    Raises:
        NumericalError: the Hessian cannot be factored.
    """
    if strength == 0:
        return weight
    upper, _ = inverse_cholesky(hessian, damp_percent)
    # W C H^-1 - W = W (x - x~) x~^T H^-1: only the difference is damped, never W itself.
    difference = (cross - hessian).T  # [C, C]: mean of (x - x~) x~^T
    correction = ((weight @ difference) @ upper.T) @ upper
    return torch.add(weight, correction, alpha=strength)
