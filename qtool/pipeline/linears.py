"""The linears that will be quantized, and the dtype in which they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.checkpoint.locate import Checkpoint
from qtool.errors import UnsupportedError
from qtool.grids.protocol import Grid

STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class PlannedLinear:
    """One linear that will be quantized."""

    name: str  # full module path, without `.weight`
    path: str  # below its block
    block: int
    tap: str
    shape: tuple[int, int]
    grid: Grid


def stored_dtype(checkpoint: Checkpoint, names: list[str]) -> torch.dtype:
    """Return the widest dtype in which the linears' weights are stored.

    Raises:
        UnsupportedError: none, or one that is not a float of 16 or 32 bits.
    """
    dtypes = {checkpoint.refs[f"{name}.weight"].dtype for name in names}
    unknown = sorted(dtypes - set(STORED_DTYPES))
    if unknown:
        raise UnsupportedError(
            f"weights are stored as {', '.join(unknown)}",
            f"qtool quantizes {', '.join(STORED_DTYPES)}; use the original float checkpoint",
        )
    if not dtypes:
        raise UnsupportedError("the model has no decoder blocks", "choose another model")
    order = list(STORED_DTYPES)
    return STORED_DTYPES[max(dtypes, key=order.index)]
