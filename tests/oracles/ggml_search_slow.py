"""Best scales by trying every rounding that any scale leads to: float64, one sub-block at a time.

As a scale shrinks to nothing, the level of a weight changes wherever the scaled weight passes the
middle of two levels. Between two such points all levels are fixed, and the best scale for fixed
levels is known. So the least error over all scales is the least over finitely many roundings.
"""

import numpy as np


def nearest(scaled, levels):
    """Positions in the ascending `levels` that lie nearest to each of `scaled`."""
    levels = np.asarray(levels, np.float64)
    return np.abs(np.asarray(scaled, np.float64)[..., None] - levels).argmin(axis=-1)


def least_error(x, weights, levels):
    """Least sum of weights * (x - scale * level)^2 over any real scale and any levels."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    levels = np.asarray(levels, np.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    least = total = float((weights * x * x).sum())
    for sign in (1.0, -1.0):
        passed = [m / (sign * v) for v in x if v for m in middles]
        inverses = np.sort([p for p in passed if p > 0])
        if not len(inverses):
            continue
        between = np.append((inverses[1:] + inverses[:-1]) / 2, inverses[-1] * 2)
        for inverse in np.append(between, inverses[0] / 2):
            chosen = levels[nearest(x * sign * inverse, levels)]
            square = (weights * chosen * chosen).sum()
            if square:
                least = min(least, total - (weights * x * chosen).sum() ** 2 / square)
    return least


def error(x, weights, scale, levels):
    """Sum of weights * (x - scale * level)^2 with the nearest levels."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    values = float(scale) * np.asarray(levels, np.float64)
    return float((weights * np.abs(x[:, None] - values).min(axis=1) ** 2).sum())


def best_integer(x, weights, unit, limits, levels):
    """The integer k in `limits` with the least error at scale `unit` * k, and that error."""
    errors = [(error(x, weights, unit * k, levels), k) for k in range(limits[0], limits[1] + 1)]
    least, k = min(errors)
    return k, least
