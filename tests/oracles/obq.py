"""Textbook Optimal Brain Quantization: slow, float64, numpy, no cleverness.

Before each column the Hessian of the columns that are left is inverted anew. O(C^4).
Shapes: R = out_features, C = in_features.
"""

import numpy as np


def obq(weight, hessian, scale, zero, top, order, damping):
    """Codes [R, C] of rounding columns in `order`, the rest absorbing each error.

    weight [R, C], hessian [C, C], scale and zero [R, C] (one for each weight), codes in [0, top];
    `damping` is a fraction of the mean of the Hessian's diagonal.
    """
    left = weight.astype(np.float64).copy()
    damped = hessian.astype(np.float64) + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    codes = np.zeros(weight.shape, dtype=np.uint8)
    remaining = list(order)
    for column in order:
        inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
        chosen = np.rint(left[:, column] / scale[:, column] + zero[:, column]).clip(0, top)
        codes[:, column] = chosen
        rounded = scale[:, column] * (chosen - zero[:, column])
        error = (left[:, column] - rounded) / inverse[0, 0]
        left[:, remaining] -= np.outer(error, inverse[0])
        remaining = remaining[1:]
    return codes


def output_error(difference, hessian):
    """tr(D H D^T) in float64."""
    d, h = np.asarray(difference, np.float64), np.asarray(hessian, np.float64)
    return float(np.trace(d @ h @ d.T))
