"""What the headers of a GPTQ checkpoint say of its modules; nothing here imports torch.

Layout: see gptq.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.module_patterns import override_for
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
    words_for,
)
from qtool.formats.protocol import TensorLayout

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}


def read_gptq(
    config: Mapping[str, Any], tensors: Mapping[str, TensorLayout]
) -> dict[str, PackedIntegers]:
    """Return how every module that has a `qweight` is packed.

    Arguments as those of every format's `grids`.

    Raises:
        UnsupportedError: a layout other than versions 1 and 2 in 32-bit words.
        DamagedError: shapes and configuration contradict each other.
    """
    version = _version(config)
    return {
        name: _module(name, config, tensors, lowest_zero=2 - version)
        for name in packed_modules(tensors, "qweight")
    }


def _module(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorLayout],
    lowest_zero: int,
) -> PackedIntegers:
    own = {**config, **override_for(config.get("dynamic"), name)}
    bits, size = setting(own, "bits"), setting(own, "group_size")
    if bits not in BITS:
        raise UnsupportedError(
            f"{name}: {bits}-bit gptq modules are not supported",
            f"qtool reads {', '.join(map(str, BITS))} bits",
        )
    words, rows = stored_matrix(tensors, f"{name}.qweight")
    columns = words * WORD_BITS // bits
    if words * WORD_BITS % bits or columns % (size if size > 0 else 1):
        raise DamagedError(
            f"tensor {name}.qweight: {words} rows of words do not hold whole groups of {size} "
            f"{bits}-bit weights",
            REPAIR,
        )
    count = columns // size if size > 0 else 1
    expect(tensors, f"{name}.qzeros", ("I32",), (count, words_for(rows, bits)))
    dtype = expect(tensors, f"{name}.scales", SCALES, (count, rows))
    if f"{name}.g_idx" not in tensors and own.get("desc_act"):
        raise DamagedError(
            f"{name}: desc_act says that groups follow the activation order, but the tensor "
            f"{name}.g_idx, which says how, is missing",
            REPAIR,
        )
    if f"{name}.g_idx" in tensors:
        expect(tensors, f"{name}.g_idx", ("I32", "I64"), (columns,))
    granularity, group_size = grouping(size)
    return PackedIntegers(
        bits=bits,
        symmetric=bool(own.get("sym", True)),
        granularity=granularity,
        group_size=group_size,
        scales=dtype,
        lowest_zero=lowest_zero,
    )


def _version(config: Mapping[str, Any]) -> int:
    """The version of the layout, 1 or 2; files older than the key are version 1.

    Raises:
        UnsupportedError: another layout, such as marlin or gptq_p, or words of other than 32 bits.
    """
    declared = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if declared not in VERSIONS or config.get("is_marlin_format"):
        shown = "marlin" if config.get("is_marlin_format") else declared
        raise UnsupportedError(
            f"the model is stored in the gptq variant '{printable(shown)}', which qtool cannot "
            "read",
            f"variants it reads: {', '.join(VERSIONS)}",
        )
    words = str(config.get("pack_dtype") or "int32")
    if words != "int32":
        raise UnsupportedError(
            f"the model packs its weights into {printable(words)}, which qtool cannot read",
            "it reads pack_dtype int32",
        )
    return VERSIONS[declared]
