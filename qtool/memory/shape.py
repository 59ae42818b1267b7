"""What of a model decides how much memory it takes: its tensors and what its blocks remember.

A shape comes from a config.json, from the headers of a file, or from the catalogue; everything
else in this package is arithmetic on it. Names are llama.cpp's, shapes rows before columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["embedding", "head", "linear", "expert", "router", "norm", "bias", "other"]


@dataclass(frozen=True)
class TensorSpec:
    """One weight.

    Args:
        name: llama.cpp's, such as `blk.0.attn_q.weight`.
        shape: rows before columns; experts lie together in one tensor [experts, rows, columns].
        role: what it is for; formats treat roles differently.
        linears: rows of each linear that checkpoints store on its own where this tensor holds
            several of them.
        computed: only GGUF files hold it: made from settings, or a copy of the embedding.
        stored: the checkpoint's name and dtype of it, where its headers were read.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    linears: tuple[int, ...] = ()
    computed: bool = False
    stored: tuple[str, str] | None = None

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BlockCache:
    """What one block keeps of the text so far.

    Args:
        keys: numbers kept for each token as keys (or as the latent of MLA, which has no values).
        values: numbers kept for each token as values.
        window: tokens that are kept at most; None: all.
        state: numbers kept for each sequence whatever its length, always in 32 bits.
        shared: whether the block reads another one's cache and keeps nothing.
    """

    keys: int = 0
    values: int = 0
    window: int | None = None
    state: int = 0
    shared: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Args:
        name: for people, such as `Llama-3.1-8B`.
        architecture: llama.cpp's name, such as `llama`; what the config says where it has none.
        blocks: decoder blocks.
        hidden: width of the residual stream.
        heads: attention heads of a block.
        key_value_heads: those of keys and values.
        head_size: numbers of a head's key.
        vocabulary: rows of the embedding.
        context: the longest that the model was made for.
        tensors: all weights, as a GGUF holds them; a tied head does not appear.
        cache: of each block.
        tied: whether the embedding is the head as well.
        experts: of a block; 0 in a dense model.
        experts_used: for one token.
        exact: whether the architecture is known; otherwise figures are a labelled range.
        header_bytes: of the keys of the model's GGUF file, the tokenizer above all, where its own
            or published files tell; None: estimated.
        source: where the figures come from.
        extra_blocks: stored after the others, to predict further tokens.
        recipe: year of the llama.cpp that the model's published files are from.
    """

    name: str
    architecture: str
    blocks: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    context: int
    tensors: tuple[TensorSpec, ...] = field(repr=False)
    cache: tuple[BlockCache, ...] = field(repr=False)
    tied: bool = False
    experts: int = 0
    experts_used: int = 0
    exact: bool = True
    header_bytes: int | None = None
    source: str = ""
    extra_blocks: int = 0
    recipe: int = 2026

    @property
    def parameters(self) -> int:
        """All weights of the checkpoint."""
        return sum(tensor.weights for tensor in self.tensors if not tensor.computed)

    @property
    def active_parameters(self) -> int:
        """Weights that one token meets."""
        if not self.experts:
            return self.parameters
        used = self.experts_used
        return sum(
            t.weights * used // self.experts if t.role == "expert" else t.weights
            for t in self.tensors
            if not t.computed
        )
