"""What qtool knows of a model family: one literal each, and nothing computed.

This module and the literals import neither torch nor transformers, so that `inspect` and the plan
can look a family up at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qtool.errors import UnsupportedError
from qtool.registry import Registry


@dataclass(frozen=True)
class Tap:
    """The linears of a block that read one input, in the order in which they run.

    Args:
        name: for pairs and reports.
        linears: paths below the block.
        corrected: whether error propagation aims these linears at the float model's output. The
            products it needs grow with the square of the input's width; the MLP's wide inner
            input costs more of them than all other taps together and gains least.
    """

    name: str
    linears: tuple[str, ...]
    corrected: bool = True


@dataclass(frozen=True)
class ScalePair:
    """Where the inverse of a scale on a tap's input can be folded without changing the block.

    Args:
        tap: the tap whose input is scaled.
        previous: the norm or linear whose output that input is, up to elementwise factors.
        kind: "norm" (its weight is divided) or "linear" (its rows and bias are).
        part: which rows of a linear: "all"; "value", the last of a fused q/k/v; "up", the second
            half of a fused gate/up.
        through_heads: the linear's rows are key-value heads, repeated to the tap's heads.
    """

    tap: str
    previous: str
    kind: Literal["norm", "linear"]
    part: Literal["all", "value", "up"] = "all"
    through_heads: bool = False


@dataclass(frozen=True)
class GgufKey:
    """A number of config.json and the name under which llama.cpp reads it.

    Args:
        name: below the architecture's own, such as "embedding_scale".
        config: key in config.json.
        whole: whether it counts something.
        default: what transformers takes where the key is missing: a number, or the key whose
            value is taken; None where it has to be there.
        optional: without a value there is no such step, neither in transformers nor in llama.cpp.
    """

    name: str
    config: str
    whole: bool = False
    default: float | str | None = None
    optional: bool = False


COMMON_KEYS = (
    GgufKey("block_count", "num_hidden_layers", whole=True),
    GgufKey("context_length", "max_position_embeddings", whole=True),
    GgufKey("embedding_length", "hidden_size", whole=True),
    GgufKey("feed_forward_length", "intermediate_size", whole=True),
    GgufKey("attention.head_count", "num_attention_heads", whole=True),
    GgufKey(
        "attention.head_count_kv", "num_key_value_heads", whole=True, default="num_attention_heads"
    ),
    GgufKey("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
)


@dataclass(frozen=True)
class GgufWindow:
    """Which blocks attend through a sliding window, and whether llama.cpp lets them.

    Args:
        applied: llama.cpp computes with the window; otherwise texts beyond it differ.
        period: without a list in config.json every period-th block attends to everything;
            0 if none does.
        default: width that transformers takes where config.json has none.
        switched: the window counts only with `use_sliding_window`, from `max_window_layers` on.
        marked: llama.cpp wants a 0 where there is no window.
        required: llama.cpp takes the family to have a window always.
    """

    applied: bool
    period: int = 0
    default: int | None = None
    switched: bool = False
    marked: bool = False
    required: bool = False


@dataclass(frozen=True)
class GgufConversion:
    """How llama.cpp names, stores and runs a family: its converter and src/models at b11549.

    Args:
        model_class: of transformers, for the way back.
        tensors: weights of one block without ".weight", all of them required.
        biases: those whose bias llama.cpp adds where there is one.
        biased: what makes transformers expect biases: (key of config.json, its linears).
        interleaved: linears whose rows llama.cpp wants with the two halves of each head
            interleaved, as it rotates neighbours: (linear, key that counts its heads).
        keys: numbers of the family beside COMMON_KEYS.
        rope_types: the scalings of positions that llama.cpp computes as transformers does.
        rope_aliases: other names of them: (in config.json, meant).
        activation: key of config.json and the only value that llama.cpp computes.
        fixed: settings that llama.cpp has no name for: (key, the values it stands for), the first
            being what a missing key means.
        window: of attention, if the family has one.
        head: whether output.weight is "optional", "always" there (a copy of tied embeddings), or
            "never" read.
        tied: what transformers takes for `tie_word_embeddings` where config.json has none.
        head_dim: what transformers takes where config.json has none; None: hidden size / heads.
        square: llama.cpp wants heads that fill the hidden size exactly.
        query_scalar_blocks: for families with `query_pre_attn_scalar`, of which llama.cpp reads
            nothing: models of that many blocks scale queries by hidden size / heads, others by
            the size of a head.
        partial_rotary: llama.cpp rotates only `rope.dimension_count` values of a head.
        original_context: what transformers takes for `original_max_position_embeddings` where
            config.json has none, if the family always has one.
        rope_theta: base where config.json has none.
        local_rope_theta: base of blocks with a window where config.json has none; None: as others.
    """

    model_class: str
    tensors: tuple[str, ...]
    biases: tuple[str, ...] = ()
    biased: tuple[tuple[str, tuple[str, ...]], ...] = ()
    interleaved: tuple[tuple[str, str], ...] = ()
    keys: tuple[GgufKey, ...] = ()
    rope_types: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")
    rope_aliases: tuple[tuple[str, str], ...] = (("su", "longrope"),)
    activation: tuple[str, str] = ("hidden_act", "silu")
    fixed: tuple[tuple[str, tuple[object, ...]], ...] = ()
    window: GgufWindow | None = None
    head: Literal["optional", "always", "never"] = "optional"
    tied: bool = False
    head_dim: int | None = None
    square: bool = False
    query_scalar_blocks: int | None = None
    partial_rotary: bool = False
    original_context: int | None = None
    rope_theta: float = 10000.0
    local_rope_theta: float | None = None


@dataclass(frozen=True)
class Family:
    """One architecture as the engine sees it.

    Args:
        name: for messages.
        model_type: of config.json.
        taps: of one block, in execution order.
        pairs: scale pairs of one block.
        gguf_architecture: llama.cpp's name.
        gguf: what llama.cpp needs beside that name.
        norm_offset: what a norm adds to its stored weight before multiplying (Gemma: 1).
        blocks: path of the list of decoder blocks.
        head: path of the output projection.
    """

    name: str
    model_type: str
    taps: tuple[Tap, ...]
    pairs: tuple[ScalePair, ...]
    gguf_architecture: str
    gguf: GgufConversion
    norm_offset: float = 0.0
    blocks: str = "model.layers"
    head: str = "lm_head"

    def tap(self, name: str) -> Tap:
        """Return the tap of that name."""
        return next(tap for tap in self.taps if tap.name == name)


_PLACE = "qtool.model.families."
FAMILIES: Registry[Family] = Registry(
    "model family",
    {
        "llama": _PLACE + "llama:FAMILY",
        "mistral": _PLACE + "mistral:FAMILY",
        "qwen2": _PLACE + "qwen2:FAMILY",
        "qwen3": _PLACE + "qwen3:FAMILY",
        "gemma2": _PLACE + "gemma2:FAMILY",
        "gemma3_text": _PLACE + "gemma3:FAMILY",
        "phi3": _PLACE + "phi3:FAMILY",
        "olmo2": _PLACE + "olmo2:FAMILY",
        "granite": _PLACE + "granite:FAMILY",
    },
    error=UnsupportedError,
)

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a model from its config.json.

    Raises:
        UnsupportedError: mixture of experts, or a model type without a family.
    """
    model_type = str(config.get("model_type", ""))
    supported = f"supported: {', '.join(FAMILIES)}"
    experts = [key for key in _EXPERT_KEYS if config.get(key)]
    if model_type not in FAMILIES and experts:
        raise UnsupportedError(
            f"model type '{model_type}' is a mixture of experts ({experts[0]} = "
            f"{config[experts[0]]}), which qtool does not quantize yet",
            f"{supported} (dense models)",
        )
    if model_type not in FAMILIES:
        raise UnsupportedError(f"model type '{model_type}' is not supported", supported)
    return FAMILIES[model_type]
