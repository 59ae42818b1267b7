"""Which type every tensor of a GGUF file gets: the file types as one table, and its interpreter.

A file type such as Q4_K_M is a mix: a base type, and rules that give some tensors of some blocks
more bits. The choices are those of llama-quantize, so that a name means what its readers expect.

Source: src/llama-quant.cpp of llama.cpp b11549. Left out are MXFP4_MOE and the exceptions for the
GLM5-next architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qtool.errors import UnsupportedError, UsageError
from qtool.formats.gguf_file_types import (
    EIGHT_EXPERTS,
    FALCON,
    FILE_TYPES,
    FileType,
    Rules,
    Slot,
    Test,
    file_type_named,
)
from qtool.formats.gguf_tensors import (
    TensorShape,
    block_of,
    is_quantized,
    kept_type,
    matches,
    slot_of,
)
from qtool.ggml_types import FLOAT_TYPES, GGML_TYPES
from qtool.registry import nearest

__all__ = [
    "FILE_TYPES",
    "ChosenType",
    "FileType",
    "ModelFacts",
    "TensorShape",
    "bits_per_weight",
    "fallback_warning",
    "file_type_named",
    "n_bytes",
    "needs_importance",
    "tensor_types",
]

COUNTED = frozenset({"attn_v", "ffn_down", "ffn_gate", "ffn_up"})

# Type whose blocks do not fit in a row -> type with shorter blocks. Whatever fits neither: F16.
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# Tensors of these types are garbage without importance (Q2_K only in a Q2_K_S file).
NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
# (architecture, blocks) that llama.cpp takes for a model of 70 billion parameters.
SEVENTY_BILLION = frozenset(
    {("llama", 80), ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}
)


@dataclass(frozen=True)
class ModelFacts:
    """What of a model the rules ask for.

    Args:
        architecture: `general.architecture`.
        blocks: all of them, those for predicting further tokens included.
        heads: of attention, in the first block.
        key_value_heads: in the first block.
        experts: 0 in a dense model.
    """

    architecture: str
    blocks: int
    heads: int
    key_value_heads: int
    experts: int = 0

    @property
    def sharing(self) -> int:
        """Query heads per key and value head, 0 where there is none."""
        return self.heads // self.key_value_heads if self.key_value_heads else 0

    @property
    def seventy_billion(self) -> bool:
        """Whether llama.cpp calls the model's size 70B."""
        if self.architecture == "llama" and (
            self.heads == self.key_value_heads or self.experts == 8
        ):
            return False
        return (self.architecture, self.blocks) in SEVENTY_BILLION


@dataclass(frozen=True)
class ChosenType:
    """The type of one tensor.

    Args:
        type: what is stored.
        wanted: what the rules asked for before the row length was looked at.
        fallback: whether the two differ because blocks of `wanted` do not fit in a row.
        reason: which rule chose it, for reports.
    """

    type: str
    wanted: str
    fallback: bool
    reason: str


@dataclass
class _Visit:
    """What was asked for, and what is counted while tensors are visited in llama.cpp's order."""

    facts: ModelFacts
    file_type: FileType
    importance: bool
    overrides: Sequence[tuple[str, str]]
    output_type: str | None
    embed_type: str | None
    pure: bool
    tied: bool
    value_tensors: int
    seen: dict[Slot, int] = field(default_factory=dict)


def tensor_types(
    file_type: str,
    tensors: Sequence[TensorShape],
    facts: ModelFacts,
    *,
    importance: bool,
    overrides: Sequence[tuple[str, str]] = (),
    output_type: str | None = None,
    embed_type: str | None = None,
    pure: bool = False,
    kept: str = "F32",
) -> dict[str, ChosenType]:
    """Choose the type of every tensor.

    In this order: never quantized; `embed_type` and `output_type`; the first override that
    matches; `pure`; the rules of the file type. Rows that the type's blocks do not divide then get
    a type with shorter blocks. Unlike llama-quantize, overrides also apply to float file types.

    Args:
        file_type: name in `FILE_TYPES`.
        tensors: all tensors of the file.
        facts: of the model.
        importance: whether importance of input columns is known.
        overrides: (pattern, type); a glob over the name with or without `.weight`, or over its
            last parts, or, after `re:`, a regular expression searched anywhere in the name.
        output_type: of the output head, or of the embeddings where they are shared.
        embed_type: of the token embeddings.
        pure: the base type everywhere.
        kept: float type of matrices that are never quantized and not always F32.

    Raises:
        UsageError: an unknown type, a bad pattern, or a demanded type that does not fit.
        UnsupportedError: an expert model whose tensor names do not say their block.
    """
    rules = [(pattern, _tensor_type_named(name)) for pattern, name in overrides]
    _check_patterns(pattern for pattern, _ in rules)
    slots = [slot_of(tensor.name) for tensor in tensors]
    visit = _Visit(
        facts,
        file_type_named(file_type),
        importance,
        overrides=rules,
        output_type=_tensor_type_named(output_type) if output_type else None,
        embed_type=_tensor_type_named(embed_type) if embed_type else None,
        pure=pure,
        tied="output" not in slots,
        value_tensors=slots.count("attn_v"),
    )
    chosen = {}
    for tensor in sorted(tensors, key=lambda tensor: (block_of(tensor.name), tensor.name)):
        if is_quantized(tensor):
            chosen[tensor.name] = _chosen(visit, tensor)
        else:
            stored = kept_type(tensor, kept)
            chosen[tensor.name] = ChosenType(stored, stored, False, "never quantized")
    return chosen


def needs_importance(file_type: str, name: str, chosen: ChosenType) -> bool:
    """Return whether a tensor of this type is garbage without importance."""
    if slot_of(name) in {"output", "token_embd"}:
        return False
    in_small_file = chosen.type == "Q2_K" and file_type_named(file_type).name == "Q2_K_S"
    return chosen.type in NEED_IMPORTANCE or in_small_file


def n_bytes(chosen: Mapping[str, ChosenType], tensors: Iterable[TensorShape]) -> int:
    """Return the bytes of all tensors, without what aligns them in a file."""
    return sum(GGML_TYPES[chosen[tensor.name].type].n_bytes(tensor.shape) for tensor in tensors)


def bits_per_weight(chosen: Mapping[str, ChosenType], tensors: Sequence[TensorShape]) -> float:
    """Return the mean over all weights, vectors and kept tensors included."""
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return 8 * n_bytes(chosen, tensors) / weights if weights else 0.0


def fallback_warning(
    chosen: Mapping[str, ChosenType], tensors: Sequence[TensorShape]
) -> str | None:
    """Return one line on how many tensors fell back and what that costs, None if none did."""
    fallen = [chosen[tensor.name] for tensor in tensors if chosen[tensor.name].fallback]
    if not fallen:
        return None
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    wanted = sum(
        math.prod(tensor.shape) * GGML_TYPES[chosen[tensor.name].wanted].bits_per_weight
        for tensor in tensors
    )
    blocks = sorted({GGML_TYPES[choice.wanted].block for choice in fallen}, reverse=True)
    changes = dict.fromkeys(f"{choice.wanted} -> {choice.type}" for choice in fallen)
    return (
        f"{len(fallen)} of {sum(map(is_quantized, tensors))} tensors have rows that "
        f"{' or '.join(map(str, blocks))} does not divide and fall back ({', '.join(changes)}): "
        f"{bits_per_weight(chosen, tensors):.2f} bits per weight instead of {wanted / weights:.2f}"
    )


def _chosen(visit: _Visit, tensor: TensorShape) -> ChosenType:
    """Return the type of a tensor that may be quantized; demands come before rules."""
    name, kind, slot = tensor.name, visit.file_type, slot_of(tensor.name)
    override = next((rule for rule in visit.overrides if matches(rule[0], name)), None)
    # Of the tables that `embed_type` speaks of, the second is large: an override may name it.
    named = override is not None and name == "per_layer_token_embd.weight"
    if slot == "token_embd" and visit.embed_type and not named:
        return _demanded(tensor, visit.embed_type, "the type asked for embeddings")
    if slot == "output" and visit.output_type:
        return _demanded(tensor, visit.output_type, "the type asked for the output head")
    if override is not None:
        return _fitted(tensor, override[1], f"override '{override[0]}'")
    if visit.pure or kind.base in FLOAT_TYPES:
        return _fitted(tensor, kind.base, f"{kind.name} throughout")
    if slot == "output" or (slot == "token_embd" and visit.tied):
        return _head(visit, tensor)
    return _fitted(tensor, _from_rules(visit, tensor, slot), f"{kind.name}: {slot or 'base type'}")


def _from_rules(visit: _Visit, tensor: TensorShape, slot: Slot | None) -> str:
    """Return the type that the file type's rules give a tensor, and count the tensor."""
    kind, facts = visit.file_type, visit.facts
    if slot is None:
        return kind.base
    place = visit.seen.get(slot, 0)
    total = visit.value_tensors if slot == "attn_v" else facts.blocks
    if slot in COUNTED:
        visit.seen[slot] = place + 1
        # Experts of one block may be several tensors, so their place is the block itself.
        if slot != "attn_v" and facts.experts > 1 and not kind.below_three_bits:
            place = block_of(tensor.name)
            if not 0 <= place < total:
                raise UnsupportedError(
                    f"{tensor.name}: no block of an expert model with {total} blocks",
                    "check the names of the model's tensors",
                )
    rules = kind.rules
    if not kind.below_three_bits:
        rules = {**rules, **(FALCON.get(kind.name, {}) if facts.architecture == "falcon" else {})}
        if facts.experts == 8:
            rules = {**rules, **_eight_experts(kind, facts)}
    holds = _tests(visit, place, total)
    first = (rule[0] for rule in rules.get(slot, ()) if all(holds[test] for test in rule[1:]))
    wanted = next(first, kind.base)
    grows = slot == "attn_v" and facts.seventy_billion and not kind.below_three_bits
    return "Q5_K" if grows and wanted in {"Q3_K", "Q4_K"} else wanted


def _tests(visit: _Visit, place: int, total: int) -> dict[Test, bool]:
    """Return what holds for the tensor that is number `place` of `total` of its kind."""
    eighth, facts = total // 8, visit.facts
    last = place >= 7 * total // 8
    return {
        "first 2": place < 2,
        "first 4": place < 4,
        "first eighth": place < eighth,
        "first sixteenth": place < total // 16,
        "middle": eighth <= place and not last,
        "more bits": place < eighth or last or (place - eighth) % 3 == 2,
        "shared by 4": facts.sharing >= 4,
        "4 experts": facts.experts >= 4,
        "8 experts": facts.experts == 8,
        "importance": visit.importance,
        "no importance": not visit.importance,
    }


def _eight_experts(kind: FileType, facts: ModelFacts) -> Rules:
    """Return the rules that replace a file type's where there are exactly eight experts."""
    attention: Rules = {"attn_v": (("Q8_0",),), "attn_k": (("Q8_0",),)}
    if facts.architecture == "falcon":
        return attention
    raised = (("Q5_K",),) if kind.name in EIGHT_EXPERTS else ()
    return {**attention, "attn_output": raised}


def _head(visit: _Visit, tensor: TensorShape) -> ChosenType:
    """Return the type of the output head, Q8_0 where the base type does not fit.

    Like llama-quantize, this does not count that exception as a fallback.
    """
    if visit.output_type:  # embeddings that serve as head
        return _fitted(tensor, visit.output_type, "the type asked for the output head")
    kind, columns = visit.file_type, tensor.shape[-1]
    reason = f"{kind.name}: output head"
    spared = visit.facts.architecture == "falcon" or not GGML_TYPES[kind.base].fits(columns)
    if spared and GGML_TYPES["Q8_0"].fits(columns):
        return ChosenType("Q8_0", kind.head, fallback=False, reason=reason)
    return _fitted(tensor, "Q8_0" if spared else kind.head, reason)


def _demanded(tensor: TensorShape, name: str, reason: str) -> ChosenType:
    """Return a type that was asked for by name; it must fit."""
    kind = GGML_TYPES[name]
    if not kind.fits(tensor.shape[-1]):
        raise UsageError(
            f"{tensor.name}: rows of {tensor.shape[-1]} weights are not whole {name} blocks",
            f"choose a type whose blocks of weights divide {tensor.shape[-1]}, such as "
            f"{_shorter(name, tensor.shape[-1])}",
        )
    return ChosenType(name, name, fallback=False, reason=reason)


def _fitted(tensor: TensorShape, wanted: str, reason: str) -> ChosenType:
    """Return `wanted`, or what takes its place where its blocks do not divide the rows."""
    columns = tensor.shape[-1]
    if GGML_TYPES[wanted].fits(columns):
        return ChosenType(wanted, wanted, fallback=False, reason=reason)
    why = f"{reason}; {GGML_TYPES[wanted].block} does not divide rows of {columns}"
    return ChosenType(_shorter(wanted, columns), wanted, fallback=True, reason=why)


def _shorter(name: str, columns: int) -> str:
    substitute = FALLBACKS.get(name, name)
    return substitute if GGML_TYPES[substitute].fits(columns) else "F16"


def _tensor_type_named(name: str) -> str:
    upper = name.upper()
    if upper not in GGML_TYPES:
        raise UsageError(f"unknown tensor type '{name}'", nearest(upper, list(GGML_TYPES)))
    return upper


def _check_patterns(patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if not pattern.startswith("re:"):
            continue
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(
                f"'{pattern}' is not a regular expression ({error})",
                "check its brackets, or leave `re:` out for a glob",
            ) from error
