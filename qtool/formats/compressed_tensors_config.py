"""The `quantization_config` of compressed-tensors: schemes, and which modules they are for.

A scheme targets class names (`Linear`), module names, or regular expressions behind `re:`; a module
takes the most specific one that matches, in that order reversed.

Specification: https://github.com/neuralmagic/compressed-tensors (quantization/quant_config.py)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.integer_modules import REPAIR, integer_grid, setting
from qtool.formats.module_patterns import matches, pattern_of
from qtool.formats.protocol import QuantizedModule
from qtool.grids.integer import Granularity, IntegerGrid
from qtool.grids.protocol import Grid

# The package packs 2 and 3 bits too, but vLLM's releases read only these, and the place of a 3-bit
# value depends on the package's version.
BITS = (4, 8)
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "group")
VARIANT = "pack-quantized"
SUPPORTED = f"qtool reads {VARIANT} weights of 4 and 8 bits per group, channel or tensor"
VERSION = "0.20.0"  # of the package whose layout this is


@dataclass(frozen=True)
class Scheme:
    """What modules of one config group have in common."""

    bits: int
    symmetric: bool
    granularity: Granularity
    group_size: int | None  # None unless per group

    def grid(self, scale_dtype: torch.dtype) -> IntegerGrid:
        """Return the grid of a module whose scales are stored as `scale_dtype`."""
        grid = IntegerGrid(
            bits=self.bits,
            symmetric=self.symmetric,
            granularity=self.granularity,
            scale_dtype=scale_dtype,
        )
        return grid if self.group_size is None else replace(grid, group_size=self.group_size)

    def entry(self, targets: list[str]) -> dict[str, Any]:
        """Return the config group that applies this scheme to `targets`."""
        return {
            "targets": targets,
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.symmetric,
                "strategy": self.granularity,
                "group_size": self.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": VARIANT,
        }


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


def read_schemes(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """Return target -> scheme of a readable configuration, in the order it states them.

    Raises:
        UnsupportedError: another variant (float, int or fp4 weights, quantized activations or
            cache, rotations, sparsity), or a scheme that qtool cannot read.
        DamagedError: a config group that is not made as it should be.
    """
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise UnsupportedError(f"the model has a {key}, which qtool cannot read", SUPPORTED)
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping):
        raise DamagedError(
            f"config.json: sparsity_config is {printable(sparsity)}, not an object", REPAIR
        )
    if str(sparsity.get("format", "dense")) != "dense":
        raise UnsupportedError("the model is sparse, which qtool cannot read", SUPPORTED)
    status = str(config.get("quantization_status") or "compressed").lower()
    if status != "compressed":
        raise UnsupportedError(f"the model is '{status}', not compressed", SUPPORTED)
    entries = config.get("config_groups")
    if not isinstance(entries, Mapping) or not entries:
        raise DamagedError("config.json: quantization_config has no config_groups", REPAIR)
    schemes: dict[str, Scheme] = {}
    for key, entry in entries.items():
        scheme = _read_group(key, entry, str(config.get("format")))
        targets = entry.get("targets") or []
        if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
            raise DamagedError(
                f"config.json: config group '{printable(key)}' has the targets "
                f"{printable(targets)}, not a list of names",
                REPAIR,
            )
        schemes |= dict.fromkeys(targets, scheme)
    return schemes


def find_scheme(schemes: Mapping[str, Scheme], name: str) -> Scheme:
    """Return the scheme of module `name`: by its name, else by pattern, else by class.

    Raises:
        DamagedError: no config group targets the module.
    """
    if name in schemes:
        return schemes[name]
    for target in sorted(target for target in schemes if target.startswith("re:")):
        if matches(target.removeprefix("re:"), name):
            return schemes[target]
    if "Linear" in schemes:
        return schemes["Linear"]
    raise DamagedError(f"{name} is stored packed, but no config group targets it", REPAIR)


def _read_group(key: str, entry: Any, declared: str) -> Scheme:
    """The scheme of one config group; `declared` is the format of the whole configuration."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("weights"), Mapping):
        raise DamagedError(f"config.json: config group '{key}' has no scheme for weights", REPAIR)
    variant = str(entry.get("format") or declared)
    if variant != VARIANT:
        raise UnsupportedError(
            f"the model is stored in the compressed-tensors variant '{variant}', which qtool "
            "cannot read",
            SUPPORTED,
        )
    for part in ("input_activations", "output_activations"):
        if entry.get(part):
            raise UnsupportedError(f"config group '{key}' quantizes {part}", SUPPORTED)
    weights = entry["weights"]
    bits, kind = setting(weights, "num_bits"), str(weights.get("type", "int"))
    if kind != "int" or bits not in BITS:
        raise UnsupportedError(f"config group '{key}' has weights of {kind}{bits}", SUPPORTED)
    if str(weights.get("actorder")).lower() in {"group", "dynamic"}:
        raise UnsupportedError(f"config group '{key}' has groups in activation order", SUPPORTED)
    granularity, size = _read_strategy(key, weights)
    return Scheme(bits, bool(weights.get("symmetric", True)), granularity, size)


def _read_strategy(key: str, weights: Mapping[str, Any]) -> tuple[Granularity, int | None]:
    """Granularity and group size; a strategy that is not stated follows from the group size."""
    stated = weights.get("group_size")
    size = None if stated is None else setting(weights, "group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(weights.get("strategy") or implied).lower()
    for granularity in GRANULARITIES:
        if granularity == strategy:
            break
    else:
        raise UnsupportedError(f"config group '{key}' has the strategy '{strategy}'", SUPPORTED)
    if granularity != "group":
        return granularity, None
    if size is None or size <= 0:
        raise DamagedError(f"config.json: config group '{key}' has no positive group_size", REPAIR)
    return granularity, size
