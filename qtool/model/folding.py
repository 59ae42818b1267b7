"""Scale the input of a tap and undo it in the op before, so that the block computes the same.

Shapes: C = in_features of the tap; R = out_features of the previous linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qtool.model.family import Family, ScalePair, Tap


def head_layout(config: Any, pair: ScalePair) -> tuple[int, int]:
    """Return (head size, repeats) for `tie_repeated`: (1, 1) where inputs are not repeated."""
    if not pair.through_heads:
        return 1, 1
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return head, heads // shared


def previous_rows(pair: ScalePair, rows: int, inputs: int) -> slice:
    """Return the rows of the previous linear [rows, ...] that feed the pair's `inputs`."""
    if pair.part == "all":
        return slice(0, rows)
    # "value" rows come last in q, k, v; "up" rows are the second half of gate, up.
    return slice(rows - inputs, rows)


def fold(
    tensors: Mapping[str, Tensor],
    family: Family,
    pair: ScalePair,
    scale: Tensor,  # [C] float32 > 0, tied over repeated heads
    untied: Tensor,  # [C / repeats], one copy of each repeated head
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a block that change when tap inputs are divided by `scale`.

    Args:
        tensors: the block's, by name below the block; not modified.
        family: gives the taps and the norm offset.
        pair: where the inverse goes.
        scale: multiplies the columns of the tap's linears.
        untied: divides the rows of the previous op.

    Returns:
        Changed tensors, linears float32 (they are rounded next) and norms in their stored dtype;
        and the scale [C] that the tap's inputs were really divided by. It differs from `scale` by
        the norm's rounding to that dtype, which the linears make up for, so nothing is lost.
    """
    changed: dict[str, Tensor] = {}
    weight_name = f"{pair.previous}.weight"
    previous = tensors[weight_name]
    if pair.kind == "norm":
        old = previous.to(torch.float32) + family.norm_offset
        new = (old / scale - family.norm_offset).to(previous.dtype)
        folded = new.to(torch.float32) + family.norm_offset
        # Where a norm's weight is zero, or became zero, the input is dead whatever the scale.
        usable = (old != 0) & (folded != 0)
        scale = torch.where(usable, old / torch.where(usable, folded, 1.0), 1.0)
        changed[weight_name] = torch.where(usable, new, previous)
    else:
        rows = previous_rows(pair, previous.shape[0], untied.numel())
        divided = previous.to(torch.float32, copy=True)
        divided[rows] /= untied[:, None]
        changed[weight_name] = divided
        bias_name = f"{pair.previous}.bias"
        if bias_name in tensors:
            bias = tensors[bias_name].to(torch.float32, copy=True)
            bias[rows] /= untied
            changed[bias_name] = bias.to(tensors[bias_name].dtype)
    for name in scaled_weights(family.tap(pair.tap)):
        changed[name] = tensors[name].to(torch.float32) * scale
    return changed, scale


def scaled_weights(tap: Tap) -> list[str]:
    """Return the weight names of a tap's linears."""
    return [f"{linear}.weight" for linear in tap.linears]
