"""Round the linears that read one input: fit, aim, round, and say what it cost.

Shapes: R = out_features (of all linears of the tap together), C = in_features.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.calibration.moments import Moments
from qtool.checkpoint.reader import check_finite
from qtool.errors import NumericalError
from qtool.grids.protocol import Grid, QuantizedTensor
from qtool.methods.awq import output_error
from qtool.methods.propagation import corrected_target
from qtool.pipeline.plan import Plan, PlannedLinear
from qtool.pipeline.progress import LayerReport


@dataclass(frozen=True)
class RoundedTap:
    """The quantized linears of one tap, by full module path, and a line on each."""

    tensors: Mapping[str, QuantizedTensor]
    reports: tuple[LayerReport, ...]


def round_tap(
    plan: Plan,
    linears: Sequence[PlannedLinear],  # all of one tap and one grid
    weights: Mapping[str, Tensor],  # by path below the block, [R_i, C], any float dtype
    moments: Moments | None,  # on the device where rounding runs
    device: torch.device,
    *,
    fallback: str = "",
) -> RoundedTap:
    """Round all linears of a tap as one matrix.

    Raises:
        NumericalError: weights, Hessian or scales are not finite; names the linear.
    """
    started = time.perf_counter()
    grid = linears[0].grid
    parts = [weights[x.path].to(device, torch.float32) for x in linears]
    sizes = [part.shape[0] for part in parts]
    target = weight = torch.cat(parts) if len(parts) > 1 else parts[0]
    section = plan.recipe.quantize
    try:
        if moments is not None and moments.hessian is not None and moments.cross is not None:
            target = corrected_target(
                weight,
                moments.hessian,
                moments.cross,
                strength=section.error_propagation,
                damp_percent=plan.options.damp_percent,
            )
        importance = None if moments is None else moments.diagonal
        # Each matrix is fitted by itself: a grid per tensor must not span two of them.
        fitted = grid.join([grid.fit(part, importance) for part in target.split(sizes)])
        hessian = None if moments is None else moments.hessian
        rounded = plan.rounding.round(target, hessian, grid, fitted, plan.options)
    except NumericalError as error:
        raise NumericalError(f"{linears[0].name}: {error.message}", error.hint) from error
    check_finite(f"{linears[0].name} (scales)", rounded.tensor.dequantize())
    seconds = (time.perf_counter() - started) / len(linears)
    tensors = dict(zip([x.name for x in linears], rounded.tensor.split_rows(sizes), strict=True))
    compared = plan.rounding.name != "rtn" or target is not weight
    reports = []
    for linear, part, aimed in zip(linears, parts, target.split(sizes), strict=True):
        plain = _to_nearest(part, grid.plain()) if compared else None
        quantized = tensors[linear.name].dequantize()
        relative, ratio = _errors(aimed, quantized, plain, moments)
        reports.append(
            LayerReport(
                name=linear.name,
                grid=grid.name,
                bits_per_weight=grid.bits_per_weight(*linear.shape),
                relative_error=relative,
                against_rtn=ratio,
                seconds=seconds,
                damp_percent=rounded.damp_percent,
                damp_raised=rounded.damp_raised,
                fallback=fallback,
            )
        )
    return RoundedTap(tensors, tuple(reports))


def _to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    parameters = grid.fit(weight)
    return grid.decode(grid.encode(weight, parameters), parameters)


def _errors(
    target: Tensor, rounded: Tensor, plain: Tensor | None, moments: Moments | None
) -> tuple[float, float | None]:
    """Return the relative output error, and the squared error against `plain`'s if there is one."""
    columns, device = target.shape[1], target.device
    second = torch.ones(columns, device=device) if moments is None else moments.second
    error = max(output_error(rounded - target, second), 0.0)
    whole = output_error(target, second)
    relative = (error / whole) ** 0.5 if whole > 0 else 0.0
    if plain is None:
        return relative, None
    reference = output_error(plain - target, second)
    return relative, error / reference if reference > 0 else 1.0
