"""What a model remembers of the text: the exact bytes of its keys, values and states.

The arithmetic is llama.cpp's (b11549), whose log lines `KV buffer size` and `RS buffer size` it
equals: cells come in multiples of 256, blocks with a sliding window hold the window and the tokens
that are computed at once, constant states are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtool.errors import UsageError
from qtool.ggml_types import GGML_TYPES
from qtool.memory.shape import BlockCache, ModelShape
from qtool.registry import nearest

CELL_STEP = 256  # llama.cpp rounds contexts and windows up to it
MICRO_BATCH = 512  # tokens that llama.cpp computes at once by default
STATE_BYTES = 4  # states are float32 whatever the cache's type
LONGEST_CONTEXT = 1 << 32

# Name of a cache type -> numbers that are stored together, and their bytes.
CACHE_TYPES: Mapping[str, tuple[int, int]] = {
    **{
        name.lower(): (GGML_TYPES[name].block, GGML_TYPES[name].block_bytes)
        for name in ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
    },
    "fp8": (1, 1),  # vLLM's fp8_e4m3 and fp8_e5m2
}
SYNONYMS = {"fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "auto": "f16", "fp16": "f16", "fp32": "f32"}


@dataclass(frozen=True)
class CacheSettings:
    """How much text is remembered, and how.

    Args:
        context: tokens of each sequence. llama.cpp's `-c` is what all slots share: context times
            sequences.
        sequences: texts that are held at the same time.
        key_type: name in `CACHE_TYPES`.
        value_type: likewise.
        unified: whether sequences share one pool of cells (`--kv-unified`); otherwise each has its
            own. It matters to sliding windows only.
        micro_batch: `-ub` of llama.cpp.
        whole_windows: blocks with a sliding window hold the whole context (`--swa-full`).
    """

    context: int
    sequences: int = 1
    key_type: str = "f16"
    value_type: str = "f16"
    unified: bool = False
    micro_batch: int = MICRO_BATCH
    whole_windows: bool = False


@dataclass(frozen=True)
class CachePart:
    """Blocks that hold the same.

    Args:
        label: such as `8 blocks, all tokens`.
        cells: tokens that each block holds, of all sequences; 0 for states.
        token_bytes: bytes of one token in one of the blocks; of one sequence for states.
        blocks: how many of them.
        n_bytes: of all of them.
    """

    label: str
    cells: int
    token_bytes: int
    blocks: int
    n_bytes: int


def cache_type_named(name: str) -> str:
    """Return the name under which `CACHE_TYPES` knows a cache type.

    Raises:
        UsageError: there is none.
    """
    lower = name.lower()
    lower = SYNONYMS.get(lower, lower)
    if lower not in CACHE_TYPES:
        raise UsageError(f"unknown cache type '{name}'", nearest(lower, list(CACHE_TYPES)))
    return lower


def check_context(context: int) -> None:
    """Refuse a context that no model has.

    Raises:
        UsageError: not from 1 to 2^32 tokens.
    """
    if not 0 < context <= LONGEST_CONTEXT:
        raise UsageError(f"a context of {context} tokens is absurd", "give one such as --ctx 8192")


def padded(tokens: int) -> int:
    """Return the cells in which llama.cpp holds that many tokens."""
    return -(-tokens // CELL_STEP) * CELL_STEP


def cells_of(block: BlockCache, settings: CacheSettings) -> int:
    """Return how many tokens a block holds, of all sequences together."""
    each, sequences = padded(settings.context), settings.sequences
    if block.window is None or settings.whole_windows:
        return each * sequences
    ahead = min(settings.micro_batch, each * sequences)
    if settings.unified:
        return padded(min(each * sequences, block.window * sequences + ahead))
    return padded(min(each, block.window + ahead)) * sequences


def token_bytes(block: BlockCache, settings: CacheSettings) -> int:
    """Return the bytes that one token takes in a block.

    Raises:
        UsageError: the cache type's blocks do not divide what a token keeps.
    """
    return _row(block.keys, settings.key_type) + _row(block.values, settings.value_type)


def _row(numbers: int, kind: str) -> int:
    together, n_bytes = CACHE_TYPES[kind]
    if numbers % together:
        raise UsageError(
            f"a {kind} cache holds {together} numbers together, which do not divide the {numbers} "
            "that the model keeps of a token",
            "use --kv-dtype f16 or bf16",
        )
    return numbers // together * n_bytes


def block_bytes(block: BlockCache, settings: CacheSettings) -> int:
    """Return the bytes that a block keeps of all sequences."""
    if block.shared:
        return 0
    state = block.state * STATE_BYTES * settings.sequences
    if not block.keys and not block.values:
        return state
    return cells_of(block, settings) * token_bytes(block, settings) + state


def cache_bytes(shape: ModelShape, settings: CacheSettings) -> int:
    """Return the bytes of all blocks' keys, values and states."""
    kinds: dict[BlockCache, int] = {}
    for block in shape.cache:
        kinds[block] = kinds.get(block, 0) + 1
    return sum(count * block_bytes(block, settings) for block, count in kinds.items())


def cache_parts(shape: ModelShape, settings: CacheSettings) -> tuple[CachePart, ...]:
    """Return the same as a sum of its parts, for people who want to see it."""
    kinds: dict[BlockCache, int] = {}
    for block in shape.cache:
        kinds[block] = kinds.get(block, 0) + 1
    parts = []
    for block, count in kinds.items():
        if block.shared:
            parts.append(CachePart("share another block's", 0, 0, count, 0))
            continue
        if block.keys or block.values:
            cells, each = cells_of(block, settings), token_bytes(block, settings)
            held = "all tokens" if block.window is None else f"a window of {block.window} tokens"
            parts.append(CachePart(held, cells, each, count, cells * each * count))
        if block.state:
            each = block.state * STATE_BYTES
            states = each * settings.sequences * count
            parts.append(CachePart("a state in float32", 0, each, count, states))
    return tuple(parts)
