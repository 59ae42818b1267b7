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
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import NumericalError
from qtool.grids.integer import IntegerGrid
from qtool.grids.protocol import Grid, QuantizedTensor
from qtool.methods.awq import output_error
from qtool.methods.inverse_hessian import InverseHessian, invert
from qtool.methods.propagation import corrected_target
from qtool.methods.protocol import Rounded
from qtool.pipeline.linears import PlannedLinear
from qtool.pipeline.plan import Plan
from qtool.pipeline.progress import LayerReport


@dataclass(frozen=True)
class RoundedTap:
    """The quantized linears of one tap, by full module path, and a line on each."""

    tensors: Mapping[str, QuantizedTensor]
    reports: tuple[LayerReport, ...]


def round_tap(
    plan: Plan,
    linears: Sequence[PlannedLinear],  # all of one tap
    weights: Mapping[str, Tensor],  # by path below the block, [R_i, C], any float dtype
    moments: Moments | None,  # on the device where rounding runs
    device: torch.device,
    *,
    fallback: str = "",
) -> RoundedTap:
    """Round all linears of a tap, those on one grid as one matrix.

    Raises:
        NumericalError: weights, Hessian or scales are not finite; names the linear.
    """
    started = time.perf_counter()
    sizes = [x.shape[0] for x in linears]
    joined = _joined(linears, weights, device)
    try:
        inverse = _inverse(plan, moments)
        target = _target(plan, joined, moments, inverse)
        del joined  # unless it is the target
        targets = dict(zip(linears, target.split(sizes), strict=True))
        tensors: dict[str, QuantizedTensor] = {}
        dampings: dict[str, tuple[float | None, bool]] = {}
        for grid in dict.fromkeys(x.grid for x in linears):
            alike = [x for x in linears if x.grid == grid]
            parts = [targets[x] for x in alike]
            whole = target if len(alike) == len(linears) else torch.cat(parts)
            found = _round_alike(plan, whole, parts, grid, inverse, moments)
            split = found.tensor.split_rows([x.shape[0] for x in alike])
            tensors.update(zip([x.name for x in alike], split, strict=True))
            dampings.update({x.name: (found.damp_percent, found.damp_raised) for x in alike})
    except NumericalError as error:
        where = f"{shown_path(plan.checkpoint.path)}: {linears[0].name}"
        raise NumericalError(f"{where}: {error.message}", error.hint) from error
    seconds = (time.perf_counter() - started) / len(linears)
    compared = plan.rounding.name != "rtn" or (moments is not None and moments.cross is not None)
    reports = []
    for linear in linears:
        weight = weights[linear.path].to(device, torch.float32)
        plain = _to_nearest(weight, linear.grid.plain()) if compared else None
        quantized = tensors[linear.name].dequantize()
        check_finite(f"{linear.name} (scales)", quantized)
        relative, ratio = _errors(targets[linear], quantized, plain, moments)
        damp_percent, damp_raised = dampings[linear.name]
        reports.append(
            LayerReport(
                name=linear.name,
                grid=linear.grid.name,
                bits_per_weight=linear.grid.bits_per_weight(*linear.shape),
                relative_error=relative,
                against_rtn=ratio,
                seconds=seconds,
                damp_percent=damp_percent,
                damp_raised=damp_raised,
                fallback=fallback,
            )
        )
    return RoundedTap(tensors, tuple(reports))


def _joined(
    linears: Sequence[PlannedLinear], weights: Mapping[str, Tensor], device: torch.device
) -> Tensor:
    """Return the weights of all linears as one matrix [R, C] float32."""
    joined = torch.empty(
        sum(x.shape[0] for x in linears), linears[0].shape[1], dtype=torch.float32, device=device
    )
    for linear, part in zip(linears, joined.split([x.shape[0] for x in linears]), strict=True):
        part.copy_(weights[linear.path])
        if isinstance(linear.grid, IntegerGrid):
            try:
                linear.grid.check_range(part)
            except NumericalError as error:
                raise NumericalError(f"{linear.name}: {error.message}", error.hint) from error
    return joined


def _inverse(plan: Plan, moments: Moments | None) -> InverseHessian | None:
    """Return what rounding and correcting need of the inputs, made once for both."""
    if moments is None or moments.hessian is None:
        return None
    corrects = moments.cross is not None and plan.recipe.quantize.error_propagation
    if not (corrects or plan.rounding.needs):
        return None
    options = plan.options
    return invert(moments.hessian, damp_percent=options.damp_percent, act_order=options.act_order)


def _target(
    plan: Plan, weight: Tensor, moments: Moments | None, inverse: InverseHessian | None
) -> Tensor:
    """Return what is rounded: the weight [R, C], aimed at the float model's output if it can be."""
    if moments is None or moments.cross is None or inverse is None:
        return weight
    strength = plan.recipe.quantize.error_propagation
    return corrected_target(weight, inverse, moments.cross, strength=strength)


def _round_alike(
    plan: Plan,
    whole: Tensor,  # [R, C] float32, of all linears on this grid
    parts: Sequence[Tensor],  # the same, each by itself
    grid: Grid,
    inverse: InverseHessian | None,
    moments: Moments | None,
) -> Rounded:
    importance = None if moments is None else moments.diagonal
    # Each matrix is fitted by itself: a grid per tensor must not span two of them.
    fitted = grid.join([grid.fit(part, importance) for part in parts])
    return plan.rounding.round(whole, inverse, grid, fitted, plan.options)


def _to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    parameters = grid.fit(weight)
    return grid.decode(grid.encode(weight, parameters), parameters)


def _errors(
    target: Tensor,
    rounded: Tensor,  # consumed
    plain: Tensor | None,  # consumed
    moments: Moments | None,
) -> tuple[float, float | None]:
    """Return the relative output error, and the squared error against `plain`'s if there is one."""
    columns, device = target.shape[1], target.device
    second = torch.ones(columns, device=device) if moments is None else moments.second
    error = max(output_error(rounded.sub_(target), second), 0.0)
    whole = output_error(target, second)
    relative = (error / whole) ** 0.5 if whole > 0 else 0.0
    if plain is None:
        return relative, None
    reference = output_error(plain.sub_(target), second)
    return relative, error / reference if reference > 0 else 1.0
