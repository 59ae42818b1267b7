"""The `quantization_config` of compressed-tensors: schemes, and which modules they are for.

A scheme targets class names (`Linear`), module names, or regular expressions behind `re:`; a module
takes the most specific one that matches, in that order reversed.

Specification: https://github.com/neuralmagic/compressed-tensors (quantization/quant_config.py)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from qtool.formats.compressed_tensors_layout import VARIANT, Scheme
from qtool.formats.integer_modules import integer_grid
from qtool.formats.module_patterns import pattern_of
from qtool.formats.protocol import QuantizedModule
from qtool.grids.protocol import Grid

VERSION = "0.20.0"  # of the package whose layout this is


def scheme_of(grid: Grid) -> Scheme:
    """Return the scheme that describes `grid`."""
    integers = integer_grid(grid)
    size = integers.group_size if integers.granularity == "group" else None
    return Scheme(integers.bits, integers.symmetric, integers.granularity, size)


def write_config(modules: list[QuantizedModule], kept: list[str]) -> dict[str, Any]:
    """Return `quantization_config`: the most common scheme for `Linear`, patterns for the rest."""
    own = {module.name: scheme_of(module.grid) for module in modules}
    base = Counter(own.values()).most_common(1)[0][0]
    targets: dict[Scheme, list[str]] = {base: ["Linear"]}
    for name, scheme in own.items():
        if scheme != base:
            targets.setdefault(scheme, []).append(f"re:{pattern_of(name)}")
    # A tied output head has no tensor of its own, yet readers would expect it packed.
    ignored = list(kept) if "lm_head" in kept else [*kept, "lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": VARIANT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {
            f"group_{i}": scheme.entry(names) for i, (scheme, names) in enumerate(targets.items())
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
        "version": VERSION,
    }
