"""What configuration and headers of compressed-tensors say of its modules; no torch.

Layout: see compressed_tensors.py. Specification: compressed_tensors_config.py names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.checkpoint.untrusted import printable
from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.module_patterns import matches
from qtool.formats.packed_layouts import (
    REPAIR,
    SCALES,
    Granularity,
    PackedIntegers,
    expect,
    packed_modules,
    setting,
    stored,
    stored_matrix,
    words_for,
)
from qtool.formats.protocol import TensorLayout

# The package packs 2 and 3 bits too, but vLLM's releases read only these, and the place of a 3-bit
# value depends on the package's version.
BITS = (4, 8)
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel", "group")
VARIANT = "pack-quantized"
SUPPORTED = f"qtool reads {VARIANT} weights of 4 and 8 bits per group, channel or tensor"


@dataclass(frozen=True)
class Scheme:
    """What modules of one config group have in common."""

    bits: int
    symmetric: bool
    granularity: Granularity
    group_size: int | None  # None unless per group

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


def read_compressed_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorLayout]
) -> dict[str, PackedIntegers]:
    """Return how every module that has a `weight_packed` is packed.

    Arguments as those of every format's `grids`.

    Raises:
        UnsupportedError: a variant other than pack-quantized 4- and 8-bit integers.
        DamagedError: shapes and configuration contradict each other.
    """
    schemes = read_schemes(config)
    modules: dict[str, PackedIntegers] = {}
    for name in packed_modules(tensors, "weight_packed"):
        if f"{name}.weight_g_idx" in tensors:
            raise UnsupportedError(f"{name} has groups in activation order", SUPPORTED)
        rows, words = stored_matrix(tensors, f"{name}.weight_packed")
        scheme = find_scheme(schemes, name)
        count = 1
        if scheme.group_size is not None:
            count = _group_count(name, tensors)
            held = words_for(count * scheme.group_size, scheme.bits)
            if held != words:
                raise DamagedError(
                    f"tensor {name}.weight_packed has {words} words in a row; {count} groups "
                    f"of {scheme.group_size} {scheme.bits}-bit weights need {held}",
                    REPAIR,
                )
        shape = (1,) if scheme.granularity == "tensor" else (rows, count)
        dtype = expect(tensors, f"{name}.weight_scale", SCALES, shape)
        expect(tensors, f"{name}.weight_shape", ("I64", "I32"), (2,))
        _expect_zeros(name, tensors, scheme, rows, count)
        modules[name] = PackedIntegers(
            bits=scheme.bits,
            symmetric=scheme.symmetric,
            granularity=scheme.granularity,
            group_size=scheme.group_size,
            scales=dtype,
        )
    return modules


def zero_layout(granularity: Granularity, bits: int, rows: int, count: int) -> TensorLayout:
    """Return the layout of `count` zero points a row: packed, but for the one of a whole tensor."""
    if granularity == "tensor":
        return TensorLayout("I8", (1,))
    return TensorLayout("I32", (words_for(rows, bits), count))


def _expect_zeros(
    name: str, tensors: Mapping[str, TensorLayout], scheme: Scheme, rows: int, count: int
) -> None:
    """Hold the header of zero points to the scheme; symmetric weights may have middle ones.

    Such ones, which say nothing, may also be bytes as the scales are laid out.
    """
    full = f"{name}.weight_zero_point"
    if scheme.symmetric and full not in tensors:
        return
    zeros = zero_layout(scheme.granularity, scheme.bits, rows, count)
    if scheme.symmetric and stored(tensors, full).dtype == "I8":
        zeros = TensorLayout("I8", stored(tensors, f"{name}.weight_scale").shape)
    expect(tensors, full, (zeros.dtype,), zeros.shape)


def _group_count(name: str, tensors: Mapping[str, TensorLayout]) -> int:
    """G as the scales' header states it; `expect` sees to the rest of that header."""
    shape = stored(tensors, f"{name}.weight_scale").shape
    return shape[-1] if shape else 0


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
        raise UnsupportedError(f"the model is '{printable(status)}', not compressed", SUPPORTED)
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
    key = printable(key)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("weights"), Mapping):
        raise DamagedError(f"config.json: config group '{key}' has no scheme for weights", REPAIR)
    variant = str(entry.get("format") or declared)
    if variant != VARIANT:
        raise UnsupportedError(
            f"the model is stored in the compressed-tensors variant '{printable(variant)}', which "
            "qtool cannot read",
            SUPPORTED,
        )
    for part in ("input_activations", "output_activations"):
        if entry.get(part):
            raise UnsupportedError(f"config group '{key}' quantizes {part}", SUPPORTED)
    weights = entry["weights"]
    bits, kind = setting(weights, "num_bits"), printable(weights.get("type", "int"))
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
    strategy = printable(weights.get("strategy") or implied).lower()
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
