"""What an already quantized checkpoint holds, told from its configuration and headers.

The formats themselves know this too, but they need torch. Here it is only counting: how many
weights the packed words stand for, with how many bits, scales included.

Shapes: K = in_features, N = out_features, G = groups along K, g = group size.
Layouts: docs of GPTQModel, AutoAWQ, compressed-tensors and bitsandbytes.
"""

from __future__ import annotations

import math
import struct
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.checkpoint.header import DTYPE_BYTES, TensorRef
from qtool.checkpoint.untrusted import open_regular

WORD_BITS = 32
MXFP4_GROUP = 32

# Method -> engines known to load it. Formats that qtool writes say so themselves, in `loads_in`;
# inspect cannot ask them without importing torch, so a test holds both tables together.
ENGINES = {
    "gptq": ("GPTQModel", "vLLM", "transformers"),
    "awq": ("vLLM", "GPTQModel", "transformers"),
    "compressed-tensors": ("vLLM", "transformers"),
    "bitsandbytes": ("transformers", "vLLM"),
    "fp8": ("vLLM", "transformers"),
    "fbgemm_fp8": ("vLLM", "transformers"),
    "mxfp4": ("vLLM", "transformers"),
    "gguf": ("llama.cpp", "Ollama", "LM Studio"),
}

# The last part of a tensor's name, after its module, where it describes a quantized weight.
COMPANIONS = frozenset(
    {
        "qzeros",
        "scales",
        "g_idx",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
        "weight_scale_inv",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "activation_scale",
        "k_scale",
        "v_scale",
        "SCB",
        "weight_format",
    }
)
PACKED = frozenset({"qweight", "weight_packed", "blocks"})
NARROW_DTYPES = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True)
class PackedModule:
    """One quantized matrix as its headers tell it."""

    name: str
    weights: int  # how many weights it stands for
    n_bytes: int  # of everything stored for it but a bias
    bits: int
    group_size: int  # -1: one scale per row, 0: not told by the headers


def packed_modules(
    refs: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> dict[str, PackedModule]:
    """Find every quantized matrix of a checkpoint; empty for a float one."""
    declared = config.get("quantization_config")
    declared = declared if isinstance(declared, dict) else {}
    parts: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    for name, ref in refs.items():
        module, part = split_name(name)
        parts[module][part] = ref
    modules = (_module(name, tensors, declared) for name, tensors in parts.items())
    return {module.name: module for module in modules if module is not None}


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name into its module and what it is to the module."""
    head, found, tail = name.partition(".weight.")  # bitsandbytes: X.weight.absmax
    if found:
        return head, f"weight.{tail}"
    if name.endswith(("_blocks", "_scales")):  # mxfp4 experts: X_blocks, X_scales
        return name[: -len("_blocks")], name[-len("blocks") :]
    module, _, part = name.rpartition(".")
    return module, part


def is_companion(part: str) -> bool:
    """Tell scales, zeros and the like from parameters of the model."""
    return part in COMPANIONS or part.startswith("weight.")


def logical_weights(ref: TensorRef, module: PackedModule | None) -> int:
    """Return how many parameters of the model a stored tensor stands for."""
    part = split_name(ref.name)[1]
    if module is None:
        return ref.n_elements
    if part in PACKED or part == "weight":
        return module.weights
    return 0 if is_companion(part) else ref.n_elements


def _module(
    name: str, tensors: Mapping[str, TensorRef], declared: Mapping[str, Any]
) -> PackedModule | None:
    """Tell a quantized module by what lies beside its weight."""
    stored = [ref for part, ref in tensors.items() if _belongs(part)]
    n_bytes = sum(ref.n_bytes for ref in stored)
    if "qweight" in tensors:
        weights, bits, group = _gptq_or_awq(tensors, declared)
    elif "weight_packed" in tensors:
        weights, bits, group = _compressed(tensors, declared)
    elif "blocks" in tensors and "scales" in tensors:
        weights, bits, group = 2 * tensors["blocks"].n_elements, 4, MXFP4_GROUP
    elif "weight" not in tensors or tensors["weight"].dtype not in NARROW_DTYPES:
        return None
    elif any(part.startswith("weight.quant_state") for part in tensors):
        absmax = tensors.get("weight.absmax")
        weights, bits = 2 * tensors["weight"].n_elements, 4
        group = weights // absmax.n_elements if absmax and absmax.n_elements else 0
    elif any(map(is_companion, tensors)):
        weights, bits, group = tensors["weight"].n_elements, 8, _scale_group(tensors)
    else:
        return None
    return PackedModule(name, weights, n_bytes, bits, group)


def _belongs(part: str) -> bool:
    return part in PACKED or part == "weight" or is_companion(part)


def _gptq_or_awq(
    tensors: Mapping[str, TensorRef], declared: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Return weights, bits and group size of a module with qweight.

    GPTQ packs along K, AWQ along N; scales [G, N] and, for GPTQ, g_idx [K] tell the true sizes.
    """
    words = tensors["qweight"]
    scales = tensors.get("scales")
    bits = _small_int(declared.get("bits"), _small_int(declared.get("w_bit"), 4))
    if scales is None or len(scales.shape) != 2 or len(words.shape) != 2:
        return words.n_elements * WORD_BITS // bits, bits, 0
    groups, columns = scales.shape
    if words.shape[1] == columns:  # GPTQ
        g_idx = tensors.get("g_idx")
        rows = g_idx.n_elements if g_idx is not None else words.shape[0] * WORD_BITS // bits
        bits = _whole(words.shape[0] * WORD_BITS, rows, bits)
    else:  # AWQ
        rows = words.shape[0]
        bits = _whole(words.shape[1] * WORD_BITS, columns, bits)
    return rows * columns, bits, -1 if groups == 1 else _whole(rows, groups, 0)


def _compressed(
    tensors: Mapping[str, TensorRef], declared: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Return weights, bits and group size of a module with weight_packed [N, words]."""
    words = tensors["weight_packed"]
    bits = _declared_bits(declared)
    if len(words.shape) != 2:
        return words.n_bytes * 8 // bits, bits, 0
    rows, row_words = words.shape
    unit = DTYPE_BYTES[words.dtype] * 8
    columns = row_words * (unit // bits)
    true_shape = _stored_shape(tensors.get("weight_shape"))
    if true_shape is not None and true_shape[0] == rows:
        # Rows are padded to whole words, so only the stored shape tells where they end.
        for candidate in (bits, 2, 3, 4, 8):
            if math.ceil(true_shape[1] / max(1, unit // candidate)) == row_words:
                bits, columns = candidate, true_shape[1]
                break
    return rows * columns, bits, _scale_group(tensors, columns)


def _stored_shape(ref: TensorRef | None) -> tuple[int, int] | None:
    """Read the two numbers of a weight_shape tensor where its file is on this machine."""
    if ref is None or ref.dtype not in {"I64", "I32"} or ref.shape != (2,):
        return None
    if not ref.file.exists():  # on the hub: only its header is here
        return None
    try:
        with open_regular(ref.file)[0] as file:
            file.seek(ref.start)
            rows, columns = struct.unpack(
                "<2q" if ref.dtype == "I64" else "<2i", file.read(ref.n_bytes)
            )
    except struct.error:
        return None
    return (rows, columns) if 0 < rows < 2**32 and 0 < columns < 2**32 else None


def _scale_group(tensors: Mapping[str, TensorRef], columns: int = 0) -> int:
    scale = tensors.get("weight_scale")
    if scale is None or len(scale.shape) != 2:
        return 0 if scale is None else -1
    weight = tensors.get("weight")
    columns = columns or (weight.shape[1] if weight and len(weight.shape) == 2 else 0)
    return -1 if scale.shape[1] <= 1 else _whole(columns, scale.shape[1], 0)


def _whole(numerator: int, denominator: int, otherwise: int) -> int:
    """Divide where that leaves nothing over."""
    if denominator and numerator and numerator % denominator == 0:
        return numerator // denominator
    return otherwise


def _small_int(value: object, otherwise: int) -> int:
    return value if type(value) is int and 1 <= value <= 16 else otherwise


def _declared_bits(declared: Mapping[str, Any]) -> int:
    """Return the bits of compressed-tensors' first group."""
    weights = first_group(declared).get("weights")
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    return _small_int(bits, 4)


def first_group(declared: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the first of compressed-tensors' config_groups, empty if there is none."""
    groups = declared.get("config_groups")
    entries = list(groups.values()) if isinstance(groups, dict) else []
    return entries[0] if entries and isinstance(entries[0], dict) else {}


def describe_quantization(
    modules: Mapping[str, PackedModule], config: Mapping[str, Any], total_bits: float
) -> dict[str, Any] | None:
    """Return inspect's `quantization`, None for a float model.

    Args:
        modules: from `packed_modules`.
        config: config.json.
        total_bits: bits per weight over the whole file.
    """
    declared = config.get("quantization_config")
    declared = declared if isinstance(declared, dict) else {}
    if not declared and not modules:
        return None
    method = str(declared.get("quant_method", "undeclared"))
    if method == "undeclared" and "config_groups" in declared:
        method = "compressed-tensors"
    group = first_group(declared).get("weights")
    scheme = group if isinstance(group, dict) else declared
    bits = Counter(module.bits for module in modules.values())
    sizes = Counter(module.group_size for module in modules.values())
    weights = sum(module.weights for module in modules.values())
    n_bytes = sum(module.n_bytes for module in modules.values())
    return {
        "method": method,
        "variant": declared.get("checkpoint_format")
        or declared.get("format")
        or declared.get("version"),
        "bits": bits.most_common(1)[0][0] if bits else declared.get("bits"),
        "bits_by_modules": {str(value): count for value, count in sorted(bits.items())},
        "group_size": sizes.most_common(1)[0][0] if sizes else declared.get("group_size"),
        "symmetric": _symmetric(declared, scheme),
        "act_order": declared.get("desc_act", scheme.get("actorder")),
        "modules": len(modules),
        "bits_per_weight": 8 * n_bytes / weights if weights else None,
        "file_bits_per_weight": total_bits,
        "loads_in": list(ENGINES.get(method, ())),
    }


def _symmetric(declared: Mapping[str, Any], scheme: Mapping[str, Any]) -> bool | None:
    for source, key, flip in (
        (scheme, "symmetric", False),
        (declared, "sym", False),
        (declared, "zero_point", True),
    ):
        value = source.get(key)
        if isinstance(value, bool):
            return value != flip
    return None
