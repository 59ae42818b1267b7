"""What the headers of an AWQ checkpoint say of its modules; nothing here imports torch.

Layout: see awq.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.packed_layouts import (
    REPAIR,
    SCALES,
    WORD_BITS,
    PackedIntegers,
    expect,
    grouping,
    packed_modules,
    setting,
    stored_matrix,
)
from qtool.formats.protocol import TensorLayout

BITS = 4
WORD_COLUMNS = WORD_BITS // BITS


def read_awq(
    config: Mapping[str, Any], tensors: Mapping[str, TensorLayout]
) -> dict[str, PackedIntegers]:
    """Return how every module that has a `qweight` is packed; all are asymmetric.

    Arguments as those of every format's `grids`.

    Raises:
        UnsupportedError: a version other than GEMM, other than 4 bits, or no zero points.
        DamagedError: shapes and configuration contradict each other.
    """
    size = _group_size(config)
    granularity, group_size = grouping(size)
    modules: dict[str, PackedIntegers] = {}
    for name in packed_modules(tensors, "qweight"):
        columns, words = stored_matrix(tensors, f"{name}.qweight")
        if size > 0 and columns % size:
            raise DamagedError(
                f"tensor {name}.qweight has {columns} rows, not a multiple of the group size "
                f"{size}",
                REPAIR,
            )
        count = columns // size if size > 0 else 1
        expect(tensors, f"{name}.qzeros", ("I32",), (count, words))
        shape = (count, words * WORD_COLUMNS)
        dtype = expect(tensors, f"{name}.scales", SCALES, shape)
        modules[name] = PackedIntegers(
            bits=BITS,
            symmetric=False,
            granularity=granularity,
            group_size=group_size,
            scales=dtype,
        )
    return modules


def _group_size(config: Mapping[str, Any]) -> int:
    """The group size of a readable configuration; its keys have two spellings."""
    variant = config.get("version") or config.get("checkpoint_format") or config.get("format")
    declared = str(variant or "gemm").lower()
    bits = setting(config, "bits", "w_bit")
    if declared != "gemm" or bits != BITS or not config.get("zero_point", True):
        zeros = "" if config.get("zero_point", True) else " without zero points"
        raise UnsupportedError(
            f"the model is stored in the awq variant '{printable(declared)}', {bits} bits{zeros}, "
            "which qtool cannot read",
            "it reads version gemm, 4 bits, with zero points",
        )
    return setting(config, "group_size", "q_group_size")
