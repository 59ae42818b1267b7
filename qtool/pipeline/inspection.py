"""Describe a model from its configuration and headers: no weights, no torch.

What the files say is reported as they say it; where configuration and headers disagree there is
a warning, because that is what somebody inspects a model for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import CONFIG_FILE, Checkpoint
from qtool.checkpoint.untrusted import shown_path
from qtool.errors import QtoolError
from qtool.memory.expected_tensors import check_tensors
from qtool.model.config_check import check_config
from qtool.model.family import FAMILIES, family_of
from qtool.pipeline.packed_headers import (
    PackedModule,
    describe_quantization,
    is_companion,
    logical_weights,
    packed_modules,
    split_name,
)
from qtool.pipeline.tokenizer_files import describe_tokenizer

# Formats that qtool unpacks. Their registry imports torch, so a test holds this to it.
READABLE_METHODS = frozenset({"gptq", "awq", "compressed-tensors"})

# Name in the result -> keys of config.json, the first one present counts.
HYPER_PARAMETERS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "attention_heads": ("num_attention_heads", "n_head"),
    "key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocabulary": ("vocab_size",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_topk"),
}

# Linears that share an input and that engines run as one: stored as one, or as several.
FUSED_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
OTHER_FUSED = ("query_key_value", "c_attn", "Wqkv", "qkv")
HEAD_NAMES = ("lm_head.weight", "output.weight", "embed_out.weight")
EMBEDDING_NAME = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$")
LAYER_NAME = re.compile(r"(^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")
EXPERT_NAME = re.compile(r"\.experts\.")
# Stored by old versions of transformers, computed by new ones: no parameters.
BUFFER_NAME = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


def inspect_model(checkpoint: Checkpoint, *, list_tensors: bool = False) -> dict[str, Any]:
    """Describe a checkpoint: parameters, architecture, tensors, quantization, tokenizer, support.

    Args:
        checkpoint: as found; its weights are not read.
        list_tensors: add every tensor's name, dtype, shape, file and bytes.

    Raises:
        DamagedError: a tokenizer file is not readable JSON.
    """
    modules = packed_modules(checkpoint.refs, checkpoint.config)
    architecture = _architecture(checkpoint)
    counts = _parameter_counts(checkpoint.refs, modules, tied=architecture["tied_embeddings"])
    total = sum(counts.values())
    active = active_parameters(counts, architecture, EXPERT_NAME)
    bits_per_weight = 8 * checkpoint.total_bytes / total if total else 0.0
    quantization = describe_quantization(modules, checkpoint.config, bits_per_weight)
    support = _support(checkpoint.config, quantization)
    warnings = _warnings(checkpoint, architecture, modules)
    if fault := _fault(checkpoint) if len(support["commands"]) > 1 else "":
        warnings.append({"code": "unusable", "message": fault})
    return {
        "model": {
            "id": checkpoint.source,
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "path": str(checkpoint.path),
            "parameters": total,
        },
        "parameters": {"total": total, "active": active},
        "architecture": architecture,
        "tensors": _tensors(checkpoint, counts, bits_per_weight, list_tensors=list_tensors),
        "quantization": quantization,
        "tokenizer": describe_tokenizer(checkpoint),
        "support": support,
        "warnings": warnings,
    }


def _setting(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Return the first of `keys` that is set, at the top or in the text part of the config."""
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        for key in keys:
            if source.get(key) is not None:
                return source[key]
    return None


def _architecture(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    names = config.get("architectures")
    found: dict[str, Any] = {
        "name": names[0] if isinstance(names, list) and names else None,
        "model_type": config.get("model_type"),
    }
    for name, keys in HYPER_PARAMETERS.items():
        found[name] = _setting(config, keys)
    # What transformers derives where the configuration leaves it out.
    found["key_value_heads"] = found["key_value_heads"] or found["attention_heads"]
    hidden, heads = found["hidden_size"], found["attention_heads"]
    if found["head_dim"] is None and type(hidden) is int and type(heads) is int and heads > 0:
        found["head_dim"] = hidden // heads
    found["dtype"] = _setting(config, ("dtype", "torch_dtype"))
    found["tied_embeddings"] = _tied(checkpoint)
    found["fused_groups"] = _fused_groups(checkpoint.refs)
    return found


def _tied(checkpoint: Checkpoint) -> bool | None:
    """Tell whether input and output embeddings are one: None where there is neither."""
    declared = _setting(checkpoint.config, ("tie_word_embeddings",))
    if isinstance(declared, bool):
        return declared
    if not any(EMBEDDING_NAME.search(name) for name in checkpoint.refs):
        return None
    return not _has_head(checkpoint.refs)


def _has_head(refs: Mapping[str, TensorRef]) -> bool:
    """Tell whether an output projection is stored, quantized or not."""
    heads = {name.removesuffix(".weight") for name in HEAD_NAMES}
    return any(split_name(name)[0] in heads for name in refs)


def _fused_groups(refs: Mapping[str, TensorRef]) -> list[dict[str, Any]]:
    """Count linears that engines run as one, by how they are stored."""
    modules = {split_name(name)[0] for name in refs}
    leaves = Counter(module.rpartition(".")[2] for module in modules)
    groups = []
    for fused, parts in FUSED_PARTS.items():
        if leaves[fused]:
            groups.append({"name": fused, "stored": "fused", "count": leaves[fused]})
        together = min(leaves[part] for part in parts)
        if together:
            name = "+".join(parts)
            groups.append({"name": name, "stored": "separate", "count": together})
    groups += [
        {"name": name, "stored": "fused", "count": leaves[name]}
        for name in OTHER_FUSED
        if leaves[name]
    ]
    return groups


def _parameter_counts(
    refs: Mapping[str, TensorRef], modules: Mapping[str, PackedModule], *, tied: bool | None
) -> dict[str, int]:
    """Return tensor name -> parameters of the model that it stands for."""
    counts = {}
    for name, ref in refs.items():
        module = modules.get(split_name(name)[0])
        # A head stored although it is the embedding is the same parameters a second time.
        repeated = tied is True and name in HEAD_NAMES
        counts[name] = 0 if repeated or BUFFER_NAME.search(name) else logical_weights(ref, module)
    return counts


def active_parameters(
    counts: Mapping[str, int], architecture: Mapping[str, Any], experts_named: re.Pattern[str]
) -> int:
    """Return the parameters that one token passes through; names tell which are experts'."""
    total = sum(counts.values())
    experts, chosen = architecture["experts"], architecture["experts_per_token"]
    if type(experts) is not int or type(chosen) is not int or not 0 < chosen <= experts:
        return total
    in_experts = sum(count for name, count in counts.items() if experts_named.search(name))
    return total - in_experts + in_experts * chosen // experts


def _tensors(
    checkpoint: Checkpoint,
    counts: Mapping[str, int],
    bits_per_weight: float,
    *,
    list_tensors: bool,
) -> dict[str, Any]:
    refs = checkpoint.refs
    by_dtype: dict[str, dict[str, Any]] = {}
    for name, ref in refs.items():
        row = by_dtype.setdefault(
            ref.dtype, {"dtype": ref.dtype, "tensors": 0, "parameters": 0, "bytes": 0}
        )
        row["tensors"] += 1
        row["parameters"] += counts[name]
        row["bytes"] += ref.n_bytes
    found: dict[str, Any] = {
        "count": len(refs),
        "files": len({ref.file for ref in refs.values()}),
        "bytes": checkpoint.total_bytes,
        "bits_per_weight": bits_per_weight,
        "by_dtype": sorted(by_dtype.values(), key=lambda row: -row["bytes"]),
    }
    if list_tensors:
        found["list"] = [
            {
                "name": name,
                "dtype": ref.dtype,
                "shape": list(ref.shape),
                "parameters": counts[name],
                "bytes": ref.n_bytes,
                "file": ref.file.name,
            }
            for name, ref in refs.items()
        ]
    return found


def _support(config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """Say what qtool can do with the model, and why not more."""
    model_type = config.get("model_type")
    family = model_type in FAMILIES
    commands = ["inspect"]
    reason = None
    if not config:
        reason = "one file of weights without its config.json"
    elif not family:
        reason = f"model type '{model_type}' has no family; supported: {', '.join(FAMILIES)}"
    elif quantization is None:
        commands += ["calibrate", "quantize", "eval"]
    elif quantization["method"] in READABLE_METHODS:
        commands += ["eval"]
        reason = "it is already quantized: quantize the float model instead"
    else:
        reason = f"it is quantized as '{quantization['method']}', which qtool cannot read"
    return {"family": family, "commands": commands, "reason": reason}


def _fault(checkpoint: Checkpoint) -> str:
    """Return why every other command refuses a model of a family that is known, else nothing."""
    family = family_of(checkpoint.config)
    try:
        check_config(checkpoint.config, family, shown_path(checkpoint.path / CONFIG_FILE))
        check_tensors(checkpoint, family)
    except QtoolError as error:
        return error.message
    return ""


def _warnings(
    checkpoint: Checkpoint,
    architecture: Mapping[str, Any],
    modules: Mapping[str, PackedModule],
) -> list[dict[str, str]]:
    """List where configuration and headers contradict each other."""
    config, refs = checkpoint.config, checkpoint.refs
    found = []
    if config and modules and not config.get("quantization_config"):
        found.append(("undeclared_quantization", "packed tensors, but no quantization_config"))
    if config.get("quantization_config") and not modules:
        found.append(("not_quantized", "a quantization_config, but no packed tensors"))
    if architecture["tied_embeddings"] is True and _has_head(refs):
        found.append(("head_stored", "embeddings are tied, yet an output head is stored too"))
    if architecture["tied_embeddings"] is False and not _has_head(refs):
        found.append(("no_head", "embeddings are not tied, but no output head is stored"))
    found += _layer_warnings(refs, architecture["layers"])
    found += _embedding_warnings(refs, architecture)
    if not modules and any(is_companion(split_name(name)[1]) for name in refs):
        found.append(("stray_scales", "scales or zero points without packed weights"))
    return [{"code": code, "message": message} for code, message in found]


def _layer_warnings(refs: Mapping[str, TensorRef], declared: object) -> list[tuple[str, str]]:
    matches = [LAYER_NAME.search(name) for name in refs]
    stored = len({int(match[2]) for match in matches if match})
    if type(declared) is int and stored and stored != declared:
        return [("layers", f"config.json says {declared} layers, the weights have {stored}")]
    return []


def _embedding_warnings(
    refs: Mapping[str, TensorRef], architecture: Mapping[str, Any]
) -> list[tuple[str, str]]:
    expected = [architecture["vocabulary"], architecture["hidden_size"]]
    if None in expected:
        return []
    return [
        ("embedding", f"config.json says embeddings of {expected}, stored are {list(ref.shape)}")
        for name, ref in refs.items()
        if EMBEDDING_NAME.search(name) and list(ref.shape) != expected
    ]
