"""What people want to know of the figures: does it fit, and if not, what does.

Programs of three kinds are told apart. llama.cpp spreads whole blocks over cards, leaves the rest
in main memory, and keeps the input embeddings there unless they are the head as well. vLLM cuts
every matrix into as many pieces as there are cards. transformers puts whole blocks on cards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qtool.formats.gguf_tensors import block_of
from qtool.memory.cache import (
    CELL_STEP,
    CacheSettings,
    block_bytes,
    cache_bytes,
)
from qtool.memory.devices import Devices
from qtool.memory.file_sizes import FormatBytes
from qtool.memory.overhead import MIB, Engine, Part, Range, engine_of, is_latent, overhead, total
from qtool.memory.shape import ModelShape
from qtool.recipe.sizes import shown_size

DOUBT = 5  # a fifth of the weights and the cache of an unknown architecture

# Beside what is left in main memory, llama.cpp keeps buffers and itself there.
HOST_BYTES = 512 * MIB


@dataclass(frozen=True)
class Machine:
    """What there is to run on.

    Args:
        devices: graphics cards; None: none was named.
        ram: bytes of main memory; None: nothing was said of it.
    """

    devices: Devices | None = None
    ram: int | None = None

    @property
    def named(self) -> bool:
        """Whether there is anything to fit into."""
        return self.devices is not None or self.ram is not None

    @property
    def shown(self) -> str:
        """What it is, for people."""
        parts = [] if self.devices is None else [self.devices.name]
        if self.ram is not None:
            parts.append(f"{shown_size(self.ram)} of main memory")
        return " and ".join(parts) or "nothing"


@dataclass(frozen=True)
class Answer:
    """One format of a model on one machine.

    Args:
        format: the bytes of its weights.
        engine: what usually runs it.
        kv_bytes: of the cache.
        overhead: everything else, by name.
        fits: whether it runs on what was named, split if need be; None: nothing was.
        certain: whether it does even if every rule of thumb is at its highest.
        max_context: tokens of the longest context that fits, 0 if none does; None: as `fits`.
        blocks_on_devices: how many blocks the cards hold; None: there are no cards.
        ram_bytes: of main memory, where a model is split or there are no cards.
    """

    format: FormatBytes
    engine: Engine
    kv_bytes: int
    overhead: tuple[Part, ...]
    fits: bool | None
    certain: bool
    max_context: int | None
    blocks_on_devices: int | None
    ram_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes that it takes, rules of thumb at their likely value."""
        return self.format.weights_bytes + self.kv_bytes + total(self.overhead).likely

    @property
    def split(self) -> bool:
        """Whether some blocks run outside the cards."""
        held = self.blocks_on_devices
        return bool(self.fits) and held is not None and held < len(self.format.block_bytes)


class Estimator:
    """Answers for one model; figures that formats share are computed once.

    Args:
        shape: of the model.
        settings: of its cache.
        machine: what it is to run on.
    """

    def __init__(self, shape: ModelShape, settings: CacheSettings, machine: Machine) -> None:
        self.shape = shape
        self.settings = settings
        self.machine = machine
        self._blocks: dict[int, tuple[int, ...]] = {}
        self._parts: dict[tuple[int, Engine], tuple[Part, ...]] = {}

    def answer(self, found: FormatBytes) -> Answer:
        """Return what becomes of the model in one format."""
        engine, context = engine_of(found.name), self.settings.context
        held, ram = self._placed(found, context, high=False)
        fits = longest = None
        if self.machine.named:
            fits = self._fits(found, context, high=False)
            # What the cards hold alone is not to be split for the sake of a longer context.
            alone = self.machine.devices is not None and held == len(found.block_bytes)
            room = self._on_devices if alone else self._fits
            longest = largest(lambda tokens: room(found, tokens, high=False), self.shape.context)
        return Answer(
            format=found,
            engine=engine,
            kv_bytes=self._cache(found, context),
            overhead=(*self._overhead(engine, context), *self._guessed(found, context)),
            fits=fits,
            certain=bool(fits) and self._fits(found, context, high=True),
            max_context=longest,
            blocks_on_devices=None if self.machine.devices is None else held,
            ram_bytes=ram,
        )

    def _at(self, context: int) -> CacheSettings:
        return replace(self.settings, context=context)

    def _cache(self, found: FormatBytes, context: int) -> int:
        n_bytes = cache_bytes(self.shape, self._at(context))
        devices = self.machine.devices
        if devices is not None and engine_of(found.name) == "vllm" and is_latent(self.shape):
            return n_bytes * devices.count  # every card needs all latents
        return n_bytes

    def _overhead(self, engine: Engine, context: int) -> tuple[Part, ...]:
        key = (context, engine)
        if key not in self._parts:
            devices = self.machine.devices
            # Without anything named, one card is what people mean.
            count = int(not self.machine.named) if devices is None else devices.count
            self._parts[key] = overhead(self.shape, self._at(context), engine, devices=count)
        return self._parts[key]

    def _guessed(self, found: FormatBytes, context: int) -> tuple[Part, ...]:
        """Return the doubt about tensors of an architecture that is not known."""
        if self.shape.exact and found.exact:
            return ()
        doubt = (found.weights_bytes + self._cache(found, context)) // DOUBT
        size = Range(-doubt, 0, doubt)
        return (Part("unknown architecture", size, False, "weights and cache, give or take 20 %"),)

    def _on_devices(self, found: FormatBytes, context: int, *, high: bool) -> bool:
        held, _ = self._placed(found, context, high=high)
        return self.machine.devices is not None and held == len(found.block_bytes)

    def _fits(self, found: FormatBytes, context: int, *, high: bool) -> bool:
        if self._on_devices(found, context, high=high):
            return True
        _, ram = self._placed(found, context, high=high)
        return self.machine.ram is not None and self._splits(found) and ram <= self.machine.ram

    def _splits(self, found: FormatBytes) -> bool:
        """Return whether what runs the format can leave blocks in main memory."""
        return self.machine.devices is None or engine_of(found.name) == "llama.cpp"

    def _placed(self, found: FormatBytes, context: int, *, high: bool) -> tuple[int, int]:
        """Return how many blocks the cards hold, and the bytes that main memory needs then."""
        devices, engine = self.machine.devices, engine_of(found.name)
        parts = (*self._overhead(engine, context), *self._guessed(found, context))
        blocks = [
            weights + cache
            for weights, cache in zip(found.block_bytes, self._block_caches(context), strict=False)
        ]
        blocks += found.block_bytes[len(blocks) :]
        if devices is None:
            whole = found.weights_bytes + found.host_bytes + self._cache(found, context)
            return 0, whole + _figure(parts, high=high)
        held = self._held(found, devices, blocks, context, high=high)
        left = sum(blocks[: len(blocks) - held])
        host = HOST_BYTES + found.host_bytes if engine == "llama.cpp" else HOST_BYTES
        return held, left + host

    def _held(
        self,
        found: FormatBytes,
        devices: Devices,
        blocks: Sequence[int],
        context: int,
        *,
        high: bool,
    ) -> int:
        engine = engine_of(found.name)
        parts = (*self._overhead(engine, context), *self._guessed(found, context))
        if engine == "vllm" and devices.count > 1:
            whole = found.weights_bytes + self._cache(found, context) + _figure(parts, high=high)
            return len(blocks) if whole <= devices.total else 0
        each = sum(_size(p, high=high) for p in parts if p.per_device) // devices.count
        once = sum(_size(p, high=high) for p in parts if not p.per_device)
        outside = found.weights_bytes - sum(found.block_bytes)
        return blocks_held(blocks, devices, outside + once, each)

    def _block_caches(self, context: int) -> tuple[int, ...]:
        if context not in self._blocks:
            settings = self._at(context)
            self._blocks[context] = tuple(block_bytes(b, settings) for b in self.shape.cache)
        return self._blocks[context]


def _figure(parts: Sequence[Part], *, high: bool) -> int:
    return sum(_size(part, high=high) for part in parts)


def _size(part: Part, *, high: bool) -> int:
    return part.size.high if high else part.size.likely


def blocks_held(blocks: Sequence[int], devices: Devices, once: int, each: int) -> int:
    """Return how many blocks, the last ones first, the cards hold.

    Args:
        blocks: bytes of each, its cache included.
        devices: the cards, filled one after the other with whole blocks.
        once: bytes that one of them needs beside: the head, and what is computed in.
        each: bytes that every one of them needs.
    """
    waiting = list(blocks)
    for number in range(devices.count):
        room = devices.n_bytes - each - (once if number == 0 else 0)
        if room < 0 and number == 0:
            return 0
        while waiting and waiting[-1] <= room:
            room -= waiting.pop()
    return len(blocks) - len(waiting)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest multiple of 256 up to `most` that fits, `most` if that does; else 0."""
    if fits(most):
        return most
    low, high = 0, -(-most // CELL_STEP)  # the lower one fits, the upper does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CELL_STEP) else (low, middle)
    return low * CELL_STEP


def experts_away(shape: ModelShape, answer: Answer, machine: Machine) -> int | None:
    """Return of how many blocks the experts have to stay in main memory for the rest to fit.

    A token meets few of them, so that they may lie there; None where there are none, or where the
    rest does not fit either. Experts count by their part of a block's weights.
    """
    if not shape.experts or machine.devices is None or answer.engine != "llama.cpp":
        return None
    whole, experts = [0] * len(answer.format.block_bytes), [0] * len(answer.format.block_bytes)
    for tensor in shape.tensors:
        place = block_of(tensor.name)
        if 0 <= place < len(whole):
            whole[place] += tensor.weights
            experts[place] += tensor.weights if tensor.role == "expert" else 0
    excess = answer.total_bytes - machine.devices.total
    for number, n_bytes in enumerate(answer.format.block_bytes):
        if excess <= 0:
            return number
        excess -= n_bytes * experts[number] // max(whole[number], 1)
    return len(whole) if excess <= 0 else None
