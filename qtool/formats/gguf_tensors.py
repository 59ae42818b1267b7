"""What a tensor of a GGUF file is, judged by name and shape: its part, its block, its fate.

Source: src/llama-quant.cpp of llama.cpp b11549 for what is quantized, and its converter
(convert_hf_to_gguf) for what is always F32.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qtool.formats.gguf_file_types import Slot

# Name of a slot <- what a tensor's name contains; the first that it contains decides.
SLOTS: tuple[tuple[str, Slot], ...] = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
EMBEDDINGS = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})

# What is stored as floats although it is a matrix: small, or too sensitive.
NEVER_QUANTIZED = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel"),
    *("per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "attn_rel_b.weight"),
    *("indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight"),
    *("time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight"),
    *("time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight"),
    *("time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight"),
    *("time_mix_g1.weight", "time_mix_g2.weight", "time_mix_lerp_fused.weight"),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight"),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos"),
    *(".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd"),
)
NEVER_QUANTIZED_NAMES = frozenset({"position_embd.weight", "token_types.weight"})
# Of these, what the converter stores as F32 whatever the checkpoint holds.
ALWAYS_F32 = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d"),
    *("shortconv.conv.weight", "time_mix_first.weight", "time_mix_w1.weight"),
    *("time_mix_w2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight"),
    *("time_mix_lerp_fused.weight", "altup_correct_coef", "altup_predict_coef", "position_embd"),
    "token_types.weight",
)


@dataclass(frozen=True)
class TensorShape:
    """One tensor: its llama.cpp name and its shape, (..., rows, columns)."""

    name: str
    shape: tuple[int, ...]


def slot_of(name: str) -> Slot | None:
    """Return what part of a model a tensor is, as far as rules distinguish parts."""
    if name == "output.weight":
        return "output"
    if name in EMBEDDINGS:
        return "token_embd"
    return next((slot for part, slot in SLOTS if part in name), None)


def is_quantized(tensor: TensorShape) -> bool:
    """Return whether a tensor may be quantized at all."""
    return (
        not _is_vector(tensor.shape)
        and tensor.name.endswith("weight")
        and tensor.name not in NEVER_QUANTIZED_NAMES
        and not any(part in tensor.name for part in NEVER_QUANTIZED)
    )


def matches(pattern: str, name: str) -> bool:
    """Return whether an override's pattern matches a tensor's name."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    names = (name, name.removesuffix(".weight"))
    return any(fnmatchcase(n, p) for n in names for p in (pattern, f"*.{pattern}"))


def kept_type(tensor: TensorShape, kept: str) -> str:
    """Return the float type of a tensor that is never quantized.

    Args:
        tensor: for which `is_quantized` is false.
        kept: what matrices are stored as, except those that are always F32.
    """
    name = tensor.name
    always = (
        _is_vector(tensor.shape)
        or not name.endswith(".weight")
        or any(part in name for part in ALWAYS_F32)
    )
    return "F32" if always else kept


def _is_vector(shape: tuple[int, ...]) -> bool:
    """Return whether only one dimension is left when leading ones are dropped."""
    return math.prod(shape[:-1]) == 1


def block_of(name: str) -> int:
    """Return the number of the block that a tensor belongs to, -1 for none."""
    found = re.match(r"blk\.(\d{1,9})\.", name)
    return int(found[1]) if found else -1
