"""What the integer dialects share in reading headers; nothing here imports torch.

So a packed checkpoint is held to its configuration before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError
from qtool.formats.protocol import TensorLayout

WORD_BITS = 32
Granularity = Literal["tensor", "channel", "group"]  # what shares a scale; see grids.integer
SCALES = ("F16", "BF16", "F32")
REPAIR = "the file is truncated or was edited; download or quantize the model again"


@dataclass(frozen=True)
class PackedIntegers:
    """How one module is packed.

    Args:
        bits: of a weight.
        symmetric: no zero points, or all in the middle.
        granularity: what shares a scale.
        group_size: inputs that do; None unless per group.
        scales: dtype they are stored in, as safetensors writes it.
        lowest_zero: least zero point that can be stored.
    """

    bits: int
    symmetric: bool
    granularity: Granularity
    group_size: int | None
    scales: str
    lowest_zero: int = 0


def words_for(count: int, bits: int) -> int:
    """Return how many words hold `count` values of `bits` bits."""
    return -(-count * bits // WORD_BITS)


def grouping(size: int) -> tuple[Granularity, int | None]:
    """Return what a stored group size stands for; -1 means one scale per row.

    Raises:
        DamagedError: a group size that is neither -1 nor positive.
    """
    if size != -1 and size <= 0:
        raise DamagedError(f"config.json: a group size of {size} means nothing", REPAIR)
    return ("channel", None) if size == -1 else ("group", size)


def packed_modules(tensors: Mapping[str, TensorLayout], marker: str) -> list[str]:
    """Return the names of the modules that have a tensor called `<module>.<marker>`.

    Raises:
        DamagedError: there is none, although the configuration declares a quantized model.
    """
    suffix = f".{marker}"
    names = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    if not names:
        raise DamagedError(
            f"config.json declares a quantized model, but no tensor is called *{suffix}",
            "the configuration and the weights do not belong together; download the model again",
        )
    return names


def stored(tensors: Mapping[str, TensorLayout], name: str) -> TensorLayout:
    """Return the layout of tensor `name`.

    Raises:
        DamagedError: there is no such tensor.
    """
    if name not in tensors:
        raise DamagedError(f"tensor {name} is missing", REPAIR)
    return tensors[name]


def stored_matrix(tensors: Mapping[str, TensorLayout], name: str) -> tuple[int, int]:
    """Return rows and columns of the int32 matrix `name`.

    Raises:
        DamagedError: it is missing or something else.
    """
    layout = stored(tensors, name)
    if layout.dtype != "I32" or len(layout.shape) != 2:
        raise DamagedError(f"tensor {name} is {_shown(layout)}, not an I32 matrix", REPAIR)
    rows, columns = layout.shape
    return rows, columns


def expect(
    tensors: Mapping[str, TensorLayout], name: str, dtypes: Collection[str], shape: tuple[int, ...]
) -> str:
    """Return the dtype of tensor `name` after checking it.

    Raises:
        DamagedError: it is missing, or not of `shape` and one of `dtypes`.
    """
    layout = stored(tensors, name)
    if layout.dtype not in dtypes or layout.shape != shape:
        wanted = TensorLayout(" or ".join(dtypes), shape)
        raise DamagedError(
            f"tensor {name} is {_shown(layout)}; config.json says {_shown(wanted)}", REPAIR
        )
    return layout.dtype


def setting(config: Mapping[str, Any], *keys: str) -> int:
    """Return the whole number that `config` holds under the first of `keys` it has.

    Raises:
        DamagedError: none of them is there, or it is not a whole number.
    """
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise DamagedError(
                f"config.json: quantization_config.{key} is {printable(repr(value))}, "
                "not a whole number",
                REPAIR,
            )
    raise DamagedError(f"config.json: quantization_config has no '{keys[0]}'", REPAIR)


def _shown(layout: TensorLayout) -> str:
    return f"{layout.dtype} {list(layout.shape)}"
