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
class Family:
    """One architecture as the engine sees it.

    Args:
        name: for messages.
        model_type: of config.json.
        taps: of one block, in execution order.
        pairs: scale pairs of one block.
        gguf_architecture: llama.cpp's name.
        norm_offset: what a norm adds to its stored weight before multiplying (Gemma: 1).
        blocks: path of the list of decoder blocks.
        head: path of the output projection.
    """

    name: str
    model_type: str
    taps: tuple[Tap, ...]
    pairs: tuple[ScalePair, ...]
    gguf_architecture: str
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
