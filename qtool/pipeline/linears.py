"""Find the linears of every block from headers, before anything is decided about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.checkpoint.locate import Checkpoint
from qtool.errors import DamagedError, UnsupportedError
from qtool.grids.protocol import Grid
from qtool.model.family import Family

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


@dataclass(frozen=True)
class FoundLinear:
    """One linear of a block."""

    path: str
    block: int
    tap: str
    shape: tuple[int, int]


def block_linears(checkpoint: Checkpoint, family: Family) -> dict[str, FoundLinear]:
    """Return full module path -> where it stands, for every linear of every block.

    Raises:
        DamagedError: headers and configuration disagree.
    """
    found: dict[str, FoundLinear] = {}
    _check_surplus(checkpoint, family)
    for block in range(int(checkpoint.config["num_hidden_layers"])):
        for tap in family.taps:
            for path in tap.linears:
                name = f"{family.blocks}.{block}.{path}"
                ref = checkpoint.refs.get(f"{name}.weight")
                if ref is None:
                    raise DamagedError(
                        f"tensor '{name}.weight' is missing from {checkpoint.path}",
                        f"config.json says {family.name} with "
                        f"{checkpoint.config['num_hidden_layers']} layers: the download is "
                        "incomplete, or config.json is another model's",
                    )
                if len(ref.shape) != 2:
                    raise DamagedError(
                        f"tensor '{name}.weight' in {ref.file} has shape {list(ref.shape)}, "
                        "not rows and columns",
                        "the file is not what config.json describes",
                    )
                found[name] = FoundLinear(path, block, tap.name, (ref.shape[0], ref.shape[1]))
    return found


def _check_surplus(checkpoint: Checkpoint, family: Family) -> None:
    """Blocks that config.json does not count would be carried along as they are, unused."""
    prefix = f"{family.blocks}."
    below = [name.removeprefix(prefix) for name in checkpoint.refs if name.startswith(prefix)]
    indices = {name.partition(".")[0] for name in below}
    stored = max((int(index) for index in indices if index.isdecimal()), default=-1) + 1
    declared = int(checkpoint.config["num_hidden_layers"])
    if stored > declared:
        raise DamagedError(
            f"{checkpoint.path} holds {stored} blocks, its config.json says {declared}",
            "config.json and weights belong to different models",
        )


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
