"""Estimate memory: one row for every format of a model, for running, tuning or quantizing it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qtool.errors import UsageError
from qtool.memory.answers import Answer, Estimator, Machine, largest
from qtool.memory.cache import CacheSettings, cache_bytes
from qtool.memory.file_sizes import FormatBytes, weight_bytes
from qtool.memory.fine_tuning import FORMAT, LENGTH, qlora_parts
from qtool.memory.overhead import Part, Range, total
from qtool.memory.shape import ModelShape
from qtool.model.family import FAMILIES
from qtool.pipeline.found_model import FoundModel
from qtool.pipeline.quantize_memory import QuantizeMemory, quantize_memory
from qtool.pipeline.run_sizes import METHODS, Run, free_main_memory, multiplies_bfloat16

# Shown where no --format is given: what people download and make, from large to small.
USUAL_FORMATS = (
    "bf16",
    "fp8",
    "int8",
    "gguf:Q8_0",
    "gguf:Q6_K",
    "gguf:Q5_K_M",
    "gguf:Q4_K_M",
    "gguf:IQ4_XS",
    "gptq:4:128",
    "awq:4:128",
    "nf4-dq",
    "gguf:Q3_K_M",
    "gguf:IQ3_XXS",
    "gguf:Q2_K",
)
USUAL_CONTEXT = 8192
# Method of qtool quantize -> the format that it writes by default.
WRITTEN = {
    "rtn": "compressed-tensors:4:128",
    "awq": "awq:4:128",
    "gptq": "gptq:4:128",
    "awq+gptq": "gptq:4:128",
}
PREFERRED = ("awq", "gptq", "awq+gptq", "rtn")
WINDOWS, WINDOW_LENGTH = 128, 2048  # the recipe's defaults
FLOAT32 = 4


@dataclass(frozen=True)
class Wanted:
    """What is asked about a model.

    Args:
        phase: infer, quantize or qlora.
        formats: names; none: the usual ones. For `quantize`, methods.
        settings: of the cache, with the context that holds where none was given.
        machine: what it is to fit into.
        length: the context as given; None: it was not.
        windows: of calibration, for `quantize`.
        window_length: tokens of one.
    """

    phase: str
    formats: tuple[str, ...]
    settings: CacheSettings
    machine: Machine = field(default_factory=Machine)
    length: int | None = None
    windows: int | None = None
    window_length: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; `total_bytes` is weights, cache and the likely overhead.

    Args:
        name: of the format, or of the method.
        bits_per_weight: of the file.
        file_bytes: of the published file, or of what is written.
        weights_bytes: what lies in the memory of the GPU.
        kv_bytes: of the cache.
        parts: of the overhead.
        exact: whether weights and cache are.
        fits: None: nothing was named to fit into.
        certain: whether it fits with every rule of thumb at its highest.
        max_context: None: as `fits`.
        found: where the weights' bytes come from.
        answer: how an engine would hold it.
        memory: of a run of qtool quantize.
    """

    name: str
    bits_per_weight: float
    file_bytes: int
    weights_bytes: int
    kv_bytes: int
    parts: tuple[Part, ...]
    exact: bool
    fits: bool | None
    certain: bool
    max_context: int | None
    found: FormatBytes
    answer: Answer | None = None
    memory: QuantizeMemory | None = None

    @property
    def overhead(self) -> Range:
        """What is neither weights nor cache."""
        return total(self.parts)

    @property
    def total_bytes(self) -> int:
        """Weights, cache and the likely overhead."""
        return self.weights_bytes + self.kv_bytes + self.overhead.likely


@dataclass(frozen=True)
class Estimate:
    """A model, what was asked about it, and the rows, largest first."""

    model: FoundModel
    wanted: Wanted
    rows: tuple[Row, ...]
    kv_bytes: int
    warnings: tuple[tuple[str, str], ...] = field(default=())

    @property
    def machine(self) -> Machine:
        """What it is to fit into."""
        return self.wanted.machine

    @property
    def context(self) -> int:
        """Tokens of a sequence, or of a training text."""
        if self.wanted.phase == "qlora":
            return self.wanted.length or LENGTH
        return self.wanted.settings.context


def estimate(model: FoundModel, wanted: Wanted) -> Estimate:
    """Return a row for every format, largest first.

    Raises:
        UsageError: an unknown format, or a cache type that does not divide the model's heads.
    """
    make = {"infer": _running, "quantize": _quantizing, "qlora": _tuning}[wanted.phase]
    rows = {row.name: row for row in make(model, wanted)}
    kv_bytes = cache_bytes(model.shape, wanted.settings) if wanted.phase == "infer" else 0
    return Estimate(
        model,
        wanted,
        tuple(sorted(rows.values(), key=lambda row: -row.total_bytes)),
        kv_bytes,
        tuple(_warnings(model, wanted)),
    )


def usual_context(shape: ModelShape) -> int:
    """Return the context that is taken where none is given."""
    return min(USUAL_CONTEXT, shape.context)


def supported(shape: ModelShape) -> bool:
    """Return whether qtool quantizes models of this architecture."""
    return any(FAMILIES[name].gguf_architecture == shape.architecture for name in FAMILIES)


def _running(model: FoundModel, wanted: Wanted) -> Iterable[Row]:
    estimator = Estimator(model.shape, wanted.settings, wanted.machine)
    if wanted.formats:
        found = [_named(model, name) for name in wanted.formats]
    elif model.stored is not None:
        found = [model.stored]
    else:
        found = [weight_bytes(model.shape, name) for name in USUAL_FORMATS]
    for stored in found:
        answer = estimator.answer(stored)
        yield Row(
            name=stored.name,
            bits_per_weight=stored.bits_per_weight,
            file_bytes=stored.file_bytes,
            weights_bytes=stored.weights_bytes,
            kv_bytes=answer.kv_bytes,
            parts=answer.overhead,
            exact=stored.exact and model.shape.exact,
            fits=answer.fits,
            certain=answer.certain,
            max_context=answer.max_context,
            found=stored,
            answer=answer,
        )


def _named(model: FoundModel, name: str) -> FormatBytes:
    stored = model.stored
    if stored is not None and name.lower() in {stored.name.lower(), "stored"}:
        return stored
    return weight_bytes(model.shape, name)


def _tuning(model: FoundModel, wanted: Wanted) -> Iterable[Row]:
    """Yield the one row of --phase qlora: a range, nothing about a trainer is known."""
    if wanted.formats:
        raise UsageError("--phase qlora is about NF4 weights", "leave --format away")
    shape, batch = model.shape, wanted.settings.sequences
    found = weight_bytes(shape, FORMAT)
    length = wanted.length or LENGTH
    room = None if wanted.machine.devices is None else wanted.machine.devices.total

    def needed(tokens: int, *, high: bool = False) -> int:
        size = total(qlora_parts(shape, tokens, batch))
        return found.weights_bytes + (size.high if high else size.likely)

    longest = None
    if room is not None:
        longest = largest(lambda tokens: needed(tokens) <= room, shape.context)
    yield Row(
        name=f"qlora {FORMAT}",
        bits_per_weight=found.bits_per_weight,
        file_bytes=found.file_bytes,
        weights_bytes=found.weights_bytes,
        kv_bytes=0,
        parts=qlora_parts(shape, length, batch),
        exact=False,
        fits=None if room is None else needed(length) <= room,
        certain=room is not None and needed(length, high=True) <= room,
        max_context=longest,
        found=found,
    )


def _quantizing(model: FoundModel, wanted: Wanted) -> Iterable[Row]:
    """Yield a row for every method of qtool quantize: its peak where blocks run."""
    shape, machine = model.shape, wanted.machine
    for method in wanted.formats or tuple(METHODS):
        if method not in METHODS:
            raise UsageError(
                f"--phase quantize is about methods, and '{method}' is none",
                f"choose from: {', '.join(METHODS)}",
            )
        run = run_of(model, wanted, method)
        memory = quantize_memory(shape, run)
        parts = memory.vram or memory.ram
        known = [part for part in parts if part.exact]
        found = weight_bytes(shape, WRITTEN[method])
        yield Row(
            name=method,
            bits_per_weight=found.bits_per_weight,
            file_bytes=found.file_bytes + memory.disk,
            weights_bytes=total(tuple(known)).likely,
            kv_bytes=0,
            parts=tuple(part for part in parts if not part.exact),
            exact=False,
            fits=_run_fits(memory, machine, high=False),
            certain=bool(_run_fits(memory, machine, high=True)),
            max_context=None,
            found=found,
            memory=memory,
        )


def run_of(model: FoundModel, wanted: Wanted, method: str) -> Run:
    """Return how the engine would be run by a method, on what was named or on this machine."""
    devices, ram = wanted.machine.devices, wanted.machine.ram
    if devices is not None and devices.unified:
        ram, devices = devices.n_bytes, None  # blocks run on the processor there
    kept = next((t.stored[1] for t in model.shape.tensors if t.stored is not None), "BF16")
    stored_bytes = FLOAT32 if kept == "F32" else 2
    native = kept == "BF16" and multiplies_bfloat16()
    return Run(
        method=method,
        windows=wanted.windows or WINDOWS,
        length=wanted.window_length or WINDOW_LENGTH,
        stored_bytes=stored_bytes,
        computed_bytes=2 if stored_bytes == 2 and (devices is not None or native) else FLOAT32,
        device="cpu" if devices is None else "cuda",
        free_ram=free_main_memory() if ram is None else ram,
        free_vram=0 if devices is None else devices.n_bytes,
    )


def _run_fits(memory: QuantizeMemory, machine: Machine, *, high: bool) -> bool | None:
    """Return whether a run fits; it uses one card, however many there are."""
    if not machine.named:
        return None
    fits, devices, ram = True, machine.devices, machine.ram
    if devices is not None and devices.unified:
        ram, devices = devices.n_bytes, None
    for size, room in (
        (memory.peak_vram, None if devices is None else devices.n_bytes),
        (memory.peak_ram, ram),
    ):
        if room is not None:
            fits = fits and (size.high if high else size.likely) <= room
    return fits


def _warnings(model: FoundModel, wanted: Wanted) -> Iterable[tuple[str, str]]:
    shape, settings = model.shape, wanted.settings
    if not shape.exact:
        yield (
            "unknown_architecture",
            f"'{shape.architecture}' is not an architecture that qtool knows: its tensors are "
            "assumed to be the usual ones, and totals are a range",
        )
    if wanted.phase == "infer" and settings.context > shape.context:
        yield (
            "long_context",
            f"the model was made for contexts of {shape.context} tokens, not {settings.context}",
        )
    if wanted.phase == "quantize" and model.stored is not None:
        yield "quantized", "the model is quantized already: qtool quantize wants the float one"
    elif wanted.phase == "quantize" and not supported(shape):
        yield "unsupported", f"qtool quantize does not do the architecture {shape.architecture}"


def best(rows: Sequence[Row]) -> Row | None:
    """Return the row with the most bits per weight that fits; unsplit and certain ones first."""
    fitting = [row for row in rows if row.fits]

    def rank(row: Row) -> tuple[bool, bool, float]:
        split = row.answer is not None and row.answer.split
        return not split, row.certain, row.bits_per_weight

    return max(fitting, key=rank, default=None)


def longest(rows: Sequence[Row]) -> Row | None:
    """Return the row with the largest context that fits, that with the most bits among equals."""
    fitting = [row for row in rows if row.max_context]
    return max(fitting, key=lambda row: (row.max_context or 0, row.bits_per_weight), default=None)


def preferred(rows: Sequence[Row]) -> Row | None:
    """Return the first method that fits, in the order in which people choose them."""
    fitting = {row.name: row for row in rows if row.fits is not False}
    return next((fitting[name] for name in PREFERRED if name in fitting), None)
