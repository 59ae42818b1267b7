"""Describe a GGUF file from its header: no weights, no torch, no gguf package.

The result has the keys that a directory gets, and `gguf` for what only such a file has. What the
file calls itself is reported, and so is what it really holds: types per tensor are often not the
ones that its name promises.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import printable
from qtool.ggml_types import FLOAT_TYPES, GGML_TYPES
from qtool.model.family import FAMILIES
from qtool.pipeline.gguf_warnings import file_type_name, find_warnings
from qtool.pipeline.inspection import active_parameters
from qtool.pipeline.packed_headers import ENGINES
from qtool.pipeline.tokenizer_files import differences, pair

# Name in the result -> key after `{architecture}.`.
HYPER_PARAMETERS = {
    "layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "attention_heads": "attention.head_count",
    "key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocabulary": "vocab_size",
    "context_length": "context_length",
    "experts": "expert_count",
    "experts_per_token": "expert_used_count",
}
SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
}
# What the hash of a vocabulary covers: all that decides which ids a text becomes.
VOCABULARY_KEYS = ("model", "pre", "tokens", "token_type", "scores", "merges")
# Linears that share an input, as stored -> what they are together.
FUSED_PARTS = {
    "attn_q+attn_k+attn_v": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate+ffn_up": ("ffn_gate", "ffn_up"),
    "ffn_gate_exps+ffn_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
BLOCK_WEIGHT = re.compile(r"blk\.\d+\.(\w+)\.weight")
EXPERT_WEIGHT = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.")
# Computed from the configuration by everybody else: no parameters.
BUFFER_NAMES = frozenset({"rope_freqs.weight", "rope_factors_long.weight"}) | {
    "rope_factors_short.weight"
}
STATISTICS = "imatrix"
NOMINAL_BITS = re.compile(r"(?:I?Q|TQ|MXFP|NVFP)(\d)")


def inspect_gguf(checkpoint: Checkpoint, *, list_tensors: bool = False) -> dict[str, Any]:
    """Describe a GGUF file, in parts or not, with the keys of `inspect_model` and `gguf`.

    Args:
        checkpoint: as found; its weights are not read.
        list_tensors: add every tensor's name, type, shape, file and bytes.
    """
    metadata = checkpoint.gguf[0].metadata
    architecture = _architecture(checkpoint.refs, metadata)
    statistics = _statistics(checkpoint.refs, metadata)
    counts = {
        name: 0 if statistics or name in BUFFER_NAMES else ref.n_elements
        for name, ref in checkpoint.refs.items()
    }
    total = sum(counts.values())
    bits_per_weight = 8 * checkpoint.total_bytes / total if total else 0.0
    return {
        "model": {
            "id": checkpoint.source,
            "name": checkpoint.name,
            "revision": None,
            "path": str(checkpoint.gguf[0].path),
            "parameters": total,
        },
        "parameters": {
            "total": total,
            "active": active_parameters(counts, architecture, EXPERT_WEIGHT),
        },
        "architecture": architecture,
        "tensors": _tensors(checkpoint, counts, bits_per_weight, list_tensors=list_tensors),
        "quantization": _quantization(checkpoint.refs, metadata, bits_per_weight),
        "tokenizer": _tokenizer(metadata),
        "support": _support(checkpoint.refs, metadata),
        "warnings": find_warnings(checkpoint, architecture, bits_per_weight),
        "gguf": _container(checkpoint) | {"statistics": statistics},
    }


def compare_gguf(left: Checkpoint, right: Checkpoint) -> dict[str, Any]:
    """Return how two GGUF files differ in vocabulary, chat template, special tokens and keys."""
    ours, theirs = (side.gguf[0].metadata for side in (left, right))
    first, second = _tokenizer(ours), _tokenizer(theirs)
    templates = [
        side["chat_template"] and side["chat_template"]["sha256"] for side in (first, second)
    ]
    return {
        "other": right.source,
        "tokenizer": pair(first["sha256"], second["sha256"]),
        "chat_template": pair(*templates),
        "special_tokens": differences(first["special"], second["special"]),
        "config": differences(_settings(ours), _settings(theirs)),
    }


def _settings(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """Return the keys that a person can compare: no vocabulary, template or parts."""
    passed_over = ("tokenizer.", "split.")
    return {key: _content(metadata, key) for key in metadata if not key.startswith(passed_over)}


def _content(metadata: Mapping[str, Value], key: str) -> Any:
    """Return a value as Python has it, a list for an array, None where the key is missing."""
    value = metadata.get(key)
    if value is None:
        return None
    return list(value.content) if isinstance(value.content, tuple) else value.content


def _name(metadata: Mapping[str, Value], key: str) -> str | None:
    content = _content(metadata, key)
    return content if isinstance(content, str) else None


def _items(metadata: Mapping[str, Value], key: str) -> tuple[Any, ...]:
    value = metadata.get(key)
    return value.content if value is not None and isinstance(value.content, tuple) else ()


def _architecture(refs: Mapping[str, TensorRef], metadata: Mapping[str, Value]) -> dict[str, Any]:
    architecture = _name(metadata, "general.architecture")
    found: dict[str, Any] = {"name": None, "model_type": architecture}
    for name, key in HYPER_PARAMETERS.items():
        found[name] = _content(metadata, f"{architecture}.{key}")
    found["key_value_heads"] = found["key_value_heads"] or found["attention_heads"]
    hidden, heads = found["hidden_size"], found["attention_heads"]
    if found["head_dim"] is None and type(hidden) is int and type(heads) is int and heads > 0:
        found["head_dim"] = hidden // heads
    if found["vocabulary"] is None:
        found["vocabulary"] = len(_items(metadata, "tokenizer.ggml.tokens")) or None
    file_type = file_type_name(metadata)
    found["dtype"] = file_type if file_type in FLOAT_TYPES else None
    tied = "token_embd.weight" in refs and "output.weight" not in refs
    found["tied_embeddings"] = tied if "token_embd.weight" in refs else None
    found["fused_groups"] = _fused_groups(refs)
    return found


def _fused_groups(refs: Mapping[str, TensorRef]) -> list[dict[str, Any]]:
    """Count linears that share an input, by how they are stored."""
    leaves = Counter(match[1] for match in map(BLOCK_WEIGHT.fullmatch, refs) if match)
    groups = []
    if leaves["attn_qkv"]:
        groups.append({"name": "attn_qkv", "stored": "fused", "count": leaves["attn_qkv"]})
    for name, parts in FUSED_PARTS.items():
        together = min(leaves[part] for part in parts)
        if together:
            groups.append({"name": name, "stored": "separate", "count": together})
    return groups


def _tensors(
    checkpoint: Checkpoint,
    counts: Mapping[str, int],
    bits_per_weight: float,
    *,
    list_tensors: bool,
) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for name, ref in checkpoint.refs.items():
        row = rows.setdefault(
            ref.dtype,
            {
                "dtype": ref.dtype,
                "tensors": 0,
                "parameters": 0,
                "bytes": 0,
                "bits_per_weight": GGML_TYPES[ref.dtype].bits_per_weight,
            },
        )
        row["tensors"] += 1
        row["parameters"] += counts[name]
        row["bytes"] += ref.n_bytes
    found: dict[str, Any] = {
        "count": len(checkpoint.refs),
        "files": len(checkpoint.gguf),
        "bytes": checkpoint.total_bytes,
        "bits_per_weight": bits_per_weight,
        "by_dtype": sorted(rows.values(), key=lambda row: -row["bytes"]),
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
            for name, ref in checkpoint.refs.items()
        ]
    return found


def _quantization(
    refs: Mapping[str, TensorRef], metadata: Mapping[str, Value], total_bits: float
) -> dict[str, Any] | None:
    """Return what `describe_quantization` does for directories; None for a float file."""
    quantized = {
        name: (ref, match)
        for name, ref in refs.items()
        if (match := NOMINAL_BITS.match(ref.dtype)) is not None
    }
    if not quantized:
        return None
    modules: Counter[int] = Counter()
    weights: Counter[int] = Counter()
    for ref, match in quantized.values():
        modules[int(match[1])] += 1
        weights[int(match[1])] += ref.n_elements
    n_bytes = sum(ref.n_bytes for ref, _ in quantized.values())
    return {
        "method": "gguf",
        "variant": file_type_name(metadata),
        "bits": weights.most_common(1)[0][0],
        "bits_by_modules": {str(bits): count for bits, count in sorted(modules.items())},
        "group_size": None,
        "symmetric": None,
        "act_order": None,
        "modules": len(quantized),
        "bits_per_weight": 8 * n_bytes / sum(weights.values()),
        "file_bits_per_weight": total_bits,
        "loads_in": list(ENGINES["gguf"]),
    }


def _tokenizer(metadata: Mapping[str, Value]) -> dict[str, Any]:
    tokens = _items(metadata, "tokenizer.ggml.tokens")
    special: dict[str, Any] = {}
    for name, key in SPECIAL_IDS.items():
        number = _content(metadata, f"tokenizer.ggml.{key}")
        if type(number) is int:
            special[f"{name}_id"] = number
            if 0 <= number < len(tokens):
                special[name] = printable(tokens[number])
    template = _name(metadata, "tokenizer.chat_template")
    return {
        "class": _name(metadata, "tokenizer.ggml.model"),
        "sha256": _vocabulary_hash(metadata) if tokens else None,
        "files": [],
        "chat_template": None
        if template is None
        else {
            "sha256": hashlib.sha256(template.encode()).hexdigest(),
            "characters": len(template),
        },
        "special": special,
        "pre": _name(metadata, "tokenizer.ggml.pre"),
        "tokens": len(tokens),
    }


def _vocabulary_hash(metadata: Mapping[str, Value]) -> str:
    """Return a hash of all that decides which ids a text becomes."""
    digest = hashlib.sha256()
    for key in VOCABULARY_KEYS:
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            continue
        items = value.content if isinstance(value.content, tuple) else (value.content,)
        digest.update(f"{key} {value.kind} {len(items)}\n".encode())
        if value.kind == "string":
            texts = [str(item).encode("utf-8", "surrogateescape") for item in items]
            digest.update(" ".join(str(len(raw)) for raw in texts).encode())
            digest.update(b"".join(texts))
        else:
            digest.update(repr(items).encode())
    return digest.hexdigest()


def _support(refs: Mapping[str, TensorRef], metadata: Mapping[str, Value]) -> dict[str, Any]:
    """Say what qtool can do with the file, and why not more."""
    architecture = _name(metadata, "general.architecture")
    general = _name(metadata, "general.type")
    known = sorted({FAMILIES[name].gguf_architecture for name in FAMILIES})
    family = architecture in known
    commands, reason = ["inspect"], None
    if general == STATISTICS:
        reason = "it holds calibration statistics: use it as quantize --statistics FILE"
    elif general not in {None, "model"}:
        reason = f"it is of type '{printable(general)}', not a language model"
    elif not refs:
        reason = "it holds a vocabulary, but no weights"
    elif architecture is None:
        reason = "it has no general.architecture"
    elif family:
        commands += ["export", "eval"]
        reason = "it is a GGUF file: to quantize, use the directory that it was made from"
    else:
        commands += ["eval"]
        reason = (
            f"architecture '{printable(architecture)}' has no family; supported: {', '.join(known)}"
        )
    return {"family": family, "commands": commands, "reason": reason}


def _container(checkpoint: Checkpoint) -> dict[str, Any]:
    first = checkpoint.gguf[0]
    return {
        "version": first.version,
        "alignment": first.alignment,
        "file_type": file_type_name(first.metadata),
        "type": _name(first.metadata, "general.type"),
        "title": _name(first.metadata, "general.name"),
        "metadata": [
            {
                "key": key,
                "kind": value.kind,
                "value": None if value.array else value.content,
                "items": len(_items(first.metadata, key)) if value.array else None,
            }
            for key, value in first.metadata.items()
        ],
    }


def _statistics(
    refs: Mapping[str, TensorRef], metadata: Mapping[str, Value]
) -> dict[str, Any] | None:
    """Describe an importance matrix; None for everything else."""
    if _name(metadata, "general.type") != STATISTICS:
        return None
    return {
        "entries": sum(name.endswith(".in_sum2") for name in refs),
        "datasets": list(map(printable, _items(metadata, "imatrix.datasets"))),
        "chunks": _content(metadata, "imatrix.chunk_count"),
        "chunk_size": _content(metadata, "imatrix.chunk_size"),
    }
