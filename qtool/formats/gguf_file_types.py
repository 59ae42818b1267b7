"""The file types of GGUF as a literal table: base type, and rules for parts of a model.

A rule is a type and the tests that must all hold; the first rule that holds decides, and where
none does, the base type stays. `gguf_mixes.py` interprets them.

Source: src/llama-quant.cpp and llama.h of llama.cpp b11549.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qtool.errors import UsageError
from qtool.registry import nearest

Slot = Literal[
    "attn_v",  # also fused query, key and value, and the values' part of latent attention
    "attn_k",
    "attn_q",
    "attn_output",
    "ffn_down",
    "ffn_gate",
    "ffn_up",
    "token_embd",
    "output",
]
Test = Literal[
    "first 2",  # of the tensors of this kind
    "first 4",
    "first eighth",  # of the blocks
    "first sixteenth",
    "middle",  # neither the first nor the last eighth
    "more bits",  # the first and the last eighth, and every third between them
    "shared by 4",  # at least four query heads share a key and value head
    "4 experts",  # at least
    "8 experts",  # exactly
    "importance",
    "no importance",
]
Rule = tuple[str] | tuple[str, Test] | tuple[str, Test, Test]
Rules = Mapping[Slot, tuple[Rule, ...]]


@dataclass(frozen=True)
class FileType:
    """One mix.

    Args:
        name: as llama-quantize writes it.
        number: `general.file_type`.
        base: type of every tensor that no rule speaks of.
        rules: exceptions, by part of the model.
        head: type of the output head, or of the embeddings where they serve as head.
        writable: whether qtool has grids for all its types; the others are known to estimate sizes.
        needs_importance: some of its tensors are garbage without importance.
        below_three_bits: these count expert tensors one by one and have no rules for 70B models,
            eight experts or Falcon beyond their own.
    """

    name: str
    number: int
    base: str
    rules: Rules = field(default_factory=dict)
    head: str = "Q6_K"
    writable: bool = True
    needs_importance: bool = False
    below_three_bits: bool = False


_RAISED: tuple[Rule, ...] = (("Q6_K", "more bits"),)
_IQ4: Rules = {
    "attn_v": (("Q5_K", "shared by 4"),),
    "ffn_down": (("Q5_K", "no importance", "first eighth"),),
}


def _small(start: str, output: str | None, embeddings: str) -> Rules:
    """Return the rules of a file type below three bits.

    Args:
        start: type of values and of the first down projections.
        output: type of the attention's output, None for the base type.
        embeddings: type of the token embeddings.
    """
    exception: tuple[Rule, ...] = ((output,),) if output else ()
    return {
        "attn_v": (("Q4_K", "shared by 4"), ("Q4_K", "4 experts"), (start,)),
        "attn_k": (("Q4_K", "8 experts"),),
        "attn_output": (("Q5_K", "8 experts"), *exception),
        "ffn_down": ((start, "first eighth"),),
        "token_embd": ((embeddings,),),
    }


def _below(name: str, number: int, base: str, rules: Rules) -> FileType:
    return FileType(
        name,
        number,
        base,
        rules,
        head="Q5_K",
        writable=False,
        needs_importance=True,
        below_three_bits=True,
    )


_ROWS = (
    FileType("F32", 0, "F32", head="F32"),
    FileType("F16", 1, "F16", head="F16"),
    FileType("BF16", 32, "BF16", head="BF16"),
    FileType("Q8_0", 7, "Q8_0", head="Q8_0"),
    FileType("Q6_K", 18, "Q6_K"),
    FileType("Q5_K_M", 17, "Q5_K", {"attn_v": _RAISED, "ffn_down": _RAISED}),
    FileType("Q5_K_S", 16, "Q5_K"),
    FileType("Q5_0", 8, "Q5_0", {"ffn_down": (("Q5_1", "importance", "first eighth"),)}),
    FileType("Q5_1", 9, "Q5_1"),
    FileType("Q4_K_M", 15, "Q4_K", {"attn_v": _RAISED, "ffn_down": _RAISED}),
    FileType(
        "Q4_K_S",
        14,
        "Q4_K",
        {"attn_v": (("Q5_K", "first 4"),), "ffn_down": (("Q5_K", "first eighth"),)},
    ),
    FileType("Q4_0", 2, "Q4_0", {"ffn_down": (("Q4_1", "importance", "first eighth"),)}),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("IQ4_XS", 30, "IQ4_XS", _IQ4),
    FileType("IQ4_NL", 25, "IQ4_NL", _IQ4),
    FileType(
        "Q3_K_L",
        13,
        "Q3_K",
        {"attn_v": (("Q5_K",),), "attn_output": (("Q5_K",),), "ffn_down": (("Q5_K",),)},
    ),
    FileType(
        "Q3_K_M",
        12,
        "Q3_K",
        {
            "attn_v": (("Q5_K", "first 2"), ("Q4_K",)),
            "attn_output": (("Q4_K",),),
            "ffn_down": (("Q5_K", "first sixteenth"), ("Q4_K",)),
        },
    ),
    FileType("Q3_K_S", 11, "Q3_K"),
    FileType(
        "Q2_K",
        10,
        "Q2_K",
        {
            "attn_v": (("Q4_K", "shared by 4"), ("Q3_K",)),
            "attn_output": (("Q3_K",),),
            "ffn_down": (("Q3_K",),),
        },
    ),
    FileType(
        "Q2_K_S",
        21,
        "Q2_K",
        {"attn_v": (("Q4_K", "shared by 4"),), "ffn_down": (("Q4_K", "first eighth"),)},
        needs_importance=True,
    ),
    FileType(
        "IQ3_M",
        27,
        "IQ3_S",
        {
            "attn_v": (("Q4_K",),),
            "attn_output": (("Q4_K",),),
            "ffn_down": (("Q4_K", "first eighth"), ("Q4_K", "8 experts", "more bits")),
        },
        writable=False,
    ),
    FileType("IQ3_S", 26, "IQ3_S", {"attn_v": (("Q4_K", "shared by 4"),)}, writable=False),
    FileType(
        "IQ3_XS",
        22,
        "IQ3_S",
        {
            "attn_v": (("Q4_K", "shared by 4"),),
            "attn_k": (("IQ3_XXS",),),
            "attn_q": (("IQ3_XXS",),),
            "ffn_gate": (("IQ3_XXS", "middle"),),
            "ffn_up": (("IQ3_XXS", "middle"),),
        },
        writable=False,
        needs_importance=True,
    ),
    FileType(
        "IQ3_XXS",
        23,
        "IQ3_XXS",
        {
            "attn_v": (("Q4_K", "shared by 4"), ("IQ3_S", "no importance")),
            "attn_k": (("IQ2_S",),),
            "attn_q": (("IQ2_S",),),
            "attn_output": (("IQ3_S",),),
            "ffn_down": (("Q4_K", "no importance", "first eighth"), ("Q3_K", "no importance")),
            "token_embd": (("IQ3_S",),),
        },
        head="Q5_K",
        writable=False,
        needs_importance=True,
    ),
    _below("IQ2_M", 29, "IQ2_S", _small("IQ3_S", "IQ3_S", "IQ3_S")),
    _below("IQ2_S", 28, "IQ2_XS", _small("IQ3_S", "IQ3_S", "IQ3_S")),
    _below("IQ2_XS", 20, "IQ2_XS", _small("Q2_K", None, "Q2_K")),
    _below("IQ2_XXS", 19, "IQ2_XXS", _small("Q2_K", None, "Q2_K")),
    _below("IQ1_M", 31, "IQ1_M", _small("Q2_K", "IQ2_XXS", "Q2_K")),
    _below("IQ1_S", 24, "IQ1_S", _small("Q2_K", "IQ2_XXS", "Q2_K")),
    FileType("TQ1_0", 36, "TQ1_0", {"token_embd": (("Q4_K",),)}, writable=False),
    FileType("TQ2_0", 37, "TQ2_0", {"token_embd": (("Q4_K",),)}, writable=False),
)

FILE_TYPES = {row.name: row for row in _ROWS}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# File types whose attn_output is Q5_K where there are exactly eight experts; in the others it
# keeps the base type.
EIGHT_EXPERTS = frozenset(
    {
        *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS"),
        *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    }
)

# What Falcon, whose down projections bear fewer bits, has instead of a file type's rules.
FALCON: Mapping[str, Rules] = {
    "Q2_K": {"attn_output": ()},
    "IQ3_XXS": {"attn_output": ()},
    "IQ3_M": {"attn_output": ()},
    "Q3_K_M": {
        "attn_output": (),
        "ffn_down": (("Q5_K", "first sixteenth"), ("Q4_K", "more bits")),
    },
    "Q3_K_L": {"attn_output": (("Q4_K",),), "ffn_down": (("Q4_K",),)},
    "Q4_K_M": {"ffn_down": (("Q6_K", "first sixteenth"), ("Q5_K", "more bits"))},
    "Q4_K_S": {"ffn_down": ()},
}


def file_type_named(name: str) -> FileType:
    """Return the file type called `name`, in any case and with or without `gguf:` before it.

    Raises:
        UsageError: there is none.
    """
    plain = name.strip().removeprefix("gguf:").upper()
    plain = ALIASES.get(plain, plain)
    if plain not in FILE_TYPES:
        raise UsageError(f"unknown GGUF file type '{name}'", nearest(plain, list(FILE_TYPES)))
    return FILE_TYPES[plain]
