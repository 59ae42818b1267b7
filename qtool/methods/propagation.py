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

from qtool.methods.inverse_hessian import InverseHessian

AT_ONCE = 512  # rows or columns; besides the target nothing of its size is made


def corrected_target(
    weight: Tensor,  # [R, C] float32; not modified
    inverse: InverseHessian,  # of the mean of x~ x~^T: damping leaves hardly seen directions alone
    cross: Tensor,  # [C, C] float32, mean of x~ x^T; not modified
    *,
    strength: float,  # 0 leaves the weight as it is, 1 corrects in full
) -> Tensor:
    """Return the weight [R, C] float32 that reproduces the float output from quantized inputs."""
    if strength == 0:
        return weight
    # W C H^-1 - W = W (x - x~) x~^T H^-1: only the difference is damped, never W itself.
    upper, order = inverse.factor, inverse.order
    back = order.argsort()
    target = torch.empty_like(weight)
    parts = (cross.split(AT_ONCE), inverse.hessian.split(AT_ONCE), target.split(AT_ONCE, dim=1))
    for seen, own, product in zip(*parts, strict=True):
        product.copy_(weight @ (seen - own).T)
    for rows, own in zip(target.split(AT_ONCE), weight.split(AT_ONCE), strict=True):
        correction = (rows.index_select(1, order) @ upper.T) @ upper
        torch.add(own, correction.index_select(1, back), alpha=strength, out=rows)
    return target
