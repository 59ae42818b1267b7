"""What `qtool quantize` itself takes: peak memory and disk, from sizes alone, before it runs.

The engine holds one block, the moments of the inputs of one tap (with a transform of all), hidden
states of all calibration windows, and the activations with which batches wait inside a block. This
module adds the same terms up, moment by moment, and takes the largest sum. No weight is read and
no torch is imported; `tests/unit/pipeline/test_quantize_memory.py` holds it to real runs.

Shapes: C = inputs of a tap, R = outputs of its linears together, T = calibration tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qtool.memory.overhead import MIB, Part, Range, total
from qtool.memory.shape import ModelShape
from qtool.pipeline.run_sizes import METHODS, WIDE, Block, Kind, Run, Tap, largest_block

NOT_CORRECTED = "mlp_out"  # Tap.corrected is false for it in every family

# As in qtool.model.streaming and qtool.device.
INTERMEDIATE_BYTES: Mapping[Kind, int] = {"cpu": 24 * MIB, "cuda": 512 * MIB}
ROWS_AT_ONCE = 16384
LARGEST_IN_HEAP = 32 * MIB  # glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64-bit systems
HELD_PART = 4
ON_DEVICE_PART = 8

# Resident bytes of the program without a model: what Python, PyTorch and for calibrated runs the
# model classes of transformers hold of their own, and pages of their libraries' files. Linux counts
# whole pieces of a file that it has cached, and larger ones where it was written lately: a new
# environment counts 215 MB of files in the run that counts 121 MB after the cache was dropped.
# Measured with PyTorch 2.13 for CPUs and transformers 5.23 on Linux.
PROGRAM = {
    False: Range(150 * MIB, 172 * MIB, 205 * MIB),
    True: Range(245 * MIB, 265 * MIB, 295 * MIB),
}
LIBRARIES = {
    False: Range(80 * MIB, 92 * MIB, 175 * MIB),
    True: Range(90 * MIB, 115 * MIB, 215 * MIB),
}
PROGRAM_CUDA = Range(1536 * MIB, 2560 * MIB, 4096 * MIB)
TOKENIZER_BYTES_PER_TOKEN = 1700  # of the vocabulary: the tables of the tokenizers library
COPIES = 16 * MIB  # chunks in which tensors are copied


@dataclass(frozen=True)
class QuantizeMemory:
    """What a run takes at its worst.

    Args:
        method: of the run.
        moment: which moment that is.
        ram: parts of main memory in that moment.
        vram: parts of the card's memory in its worst moment; empty on the CPU.
        disk: bytes of hidden states that fit in no memory.
        in_step: whether all batches go through a block together.
    """

    method: str
    moment: str
    ram: tuple[Part, ...]
    vram: tuple[Part, ...]
    disk: int
    in_step: bool

    @property
    def peak_ram(self) -> Range:
        """Bytes of main memory."""
        return total(self.ram)

    @property
    def peak_vram(self) -> Range:
        """Bytes of the card."""
        return total(self.vram)


def quantize_memory(shape: ModelShape, run: Run) -> QuantizeMemory:
    """Return the peak memory of a run of the engine."""
    block = largest_block(shape)
    program = _program(shape, run)
    if not run.calibrated:
        return _without_data(shape, block, run, program)
    return _calibrated(shape, block, run, program)


def _program(shape: ModelShape, run: Run) -> tuple[Part, ...]:
    if run.device == "cuda":
        parts = [_part("Python and its libraries", PROGRAM_CUDA, "measured")]
    else:
        own, files = PROGRAM[run.calibrated], LIBRARIES[run.calibrated]
        parts = [
            _part("Python and what it imports", own, "measured; transformers if calibrated"),
            _part("pages of libraries' files", files, "measured; more in a new environment"),
        ]
    if run.calibrated:
        tables = TOKENIZER_BYTES_PER_TOKEN * shape.vocabulary
        spread = Range(tables // 2, tables, tables * 2)
        why = f"{shape.vocabulary} tokens x {TOKENIZER_BYTES_PER_TOKEN}"
        parts.append(_part("tokenizer", spread, why))
    return tuple(parts)


def _part(name: str, size: Range | int, why: str) -> Part:
    exact = isinstance(size, int)
    return Part(name, Range.known(size) if isinstance(size, int) else size, exact, why)


def _without_data(
    shape: ModelShape, block: Block, run: Run, program: tuple[Part, ...]
) -> QuantizeMemory:
    """Return what rounding tap after tap takes; nothing runs through the model."""
    del shape
    linears = sum(tap.weight for tap in block.taps.values()) // WIDE
    stored = _part("linears of one block", run.stored_bytes * linears, f"{linears} weights")
    widest = max((tap.weight for tap in block.taps.values()), default=0)
    work = _part("rounding of the largest tap", _about(3 * widest), "3 float32 copies")
    copies = _part("chunks of other tensors", COPIES, "copied 16 MiB at a time")
    on_card = run.device == "cuda"
    ram = (*program, stored, copies) if on_card else (*program, stored, work, copies)
    vram = (work,) if on_card else ()
    return QuantizeMemory(run.method, "rounding a tap", ram, vram, 0, in_step=True)


def _about(n_bytes: int) -> Range:
    """Return a figure whose copies the allocator may keep or share."""
    return Range(n_bytes * 4 // 5, n_bytes, n_bytes * 5 // 4)


def _calibrated(
    shape: ModelShape, block: Block, run: Run, program: tuple[Part, ...]
) -> QuantizeMemory:
    hidden, in_host, on_disk = _hidden_states(shape, run)
    in_step = _in_step(shape, block, run)
    weights = _weights(block, run)
    moments = list(_moments(shape, block, run, in_step=in_step))
    moments.append(("the embeddings", (_embeddings(shape, run),)))
    if run.device == "cpu":
        held = (*program, *weights, hidden)
        sums = {name: (*held, *parts) for name, parts in moments}
        worst = max(sums, key=lambda name: total(sums[name]).likely)
        return QuantizeMemory(run.method, worst, sums[worst], (), on_disk, in_step)
    stored, placed = weights[0], weights[1:]
    embedded = _part(
        "embeddings as stored",
        shape.vocabulary * shape.hidden * run.stored_bytes,
        f"{shape.vocabulary} x {shape.hidden} x {run.stored_bytes}",
    )
    waiting = _part("hidden states that the card has no room for", in_host, "")
    larger = max(stored, embedded, key=lambda part: part.size.likely)
    sums = {name: (*placed, hidden, *parts) for name, parts in moments}
    worst = max(sums, key=lambda name: total(sums[name]).likely)
    ram = (*program, larger, waiting)
    return QuantizeMemory(run.method, worst, ram, sums[worst], on_disk, in_step)


def _hidden_states(shape: ModelShape, run: Run) -> tuple[Part, int, int]:
    """Return hidden states where blocks run, and bytes of those in main memory and on disk."""
    streams = 2 if run.propagated else 1
    each = run.tokens * shape.hidden * run.computed_bytes
    here, waiting, on_disk = each, 0, 0
    room = run.free_ram // HELD_PART
    if run.device == "cuda":
        here = min(each, run.free_vram // ON_DEVICE_PART)
        waiting = min(each - here, room)
        on_disk = each - here - waiting
    else:
        here = min(each, room)
        on_disk = each - here
    why = f"{streams} x {run.tokens} tokens x {shape.hidden} x {run.computed_bytes}"
    return _part("hidden states", streams * here, why), streams * waiting, streams * on_disk


def _in_step(shape: ModelShape, block: Block, run: Run) -> bool:
    """Return whether held activations fit, by the rule of qtool.model.streaming."""
    free = run.free_ram if run.device == "cpu" else run.free_vram
    per_token = (4 * shape.hidden + 2 * block.inner) * run.computed_bytes
    return run.tokens * per_token <= free // HELD_PART


def _weights(block: Block, run: Run) -> tuple[Part, ...]:
    """Return the block as stored first, then its copies where blocks run."""
    stored = _part(
        "one block as stored",
        block.parameters * run.stored_bytes,
        f"{block.parameters} x {run.stored_bytes}",
    )
    shared = run.device == "cpu" and run.stored_bytes == run.computed_bytes
    parts = [stored]
    copies = 1 if shared else 2  # the float block, and the one that is being quantized
    name = "the block that is being quantized" if shared else "the block twice, to run it"
    size = copies * block.parameters * run.computed_bytes
    parts.append(_part(name, size, f"{copies} x {block.parameters} x {run.computed_bytes}"))
    if run.transforms:
        scaled = block.parameters * (run.stored_bytes if run.device == "cpu" else 0)
        parts.append(_part("scaled weights", scaled, f"{block.parameters} x {run.stored_bytes}"))
    return tuple(parts)


def _embeddings(shape: ModelShape, run: Run) -> Part:
    table = shape.vocabulary * shape.hidden
    same = run.device == "cpu" and run.stored_bytes == run.computed_bytes
    each = run.computed_bytes + (0 if same or run.device == "cuda" else run.stored_bytes)
    return _part("embeddings", table * each, f"{shape.vocabulary} x {shape.hidden} x {each}")


def _moments(
    shape: ModelShape, block: Block, run: Run, *, in_step: bool
) -> Iterable[tuple[str, tuple[Part, ...]]]:
    """Yield what comes on top in each moment that may be the worst."""
    batch = _batch_tokens(block, run)
    forward = _part(
        "intermediates of a batch",
        _about(3 * batch * block.inner * run.computed_bytes),
        f"3 x {batch} tokens x {block.inner} x {run.computed_bytes}",
    )
    kept = _kept_inputs(block, run, in_step=in_step)
    if run.transforms:
        squares = sum(tap.square for tap in block.taps.values())
        seen = _part("moments of all taps", squares, "the sum of 4 x C^2")
        widest = max((tap.columns for tap in block.taps.values()), default=0)
        rows = _part("inputs in float32", _wide_rows(widest, batch, run, 1), "one batch")
        yield "statistics of the float block", (seen, kept, forward, rows)
        yield "the search for scales", (seen, kept, _search(block))
    for name, tap in block.taps.items():
        held = _held(shape, block, run, name, batch, in_step=in_step)
        crossed = run.propagated and name != NOT_CORRECTED
        sums = _part("moments of the tap", (2 if crossed else 1) * tap.square, "4 x C^2 each")
        copies = 2 if crossed else 1
        rows = _part("inputs in float32", _wide_rows(tap.columns, batch, run, copies), "one batch")
        lost = _lost(block, run, in_step=in_step)
        yield f"summing {name}", (held, kept, forward, lost, sums, rows)
        yield f"rounding {name}", (held, kept, forward, lost, sums, _rounding(tap, run))


def _batch_tokens(block: Block, run: Run) -> int:
    """Return the tokens that run through a block at once, as `windows_per_batch` chooses them."""
    per_window = run.length * max(block.inner, 1) * run.computed_bytes
    windows = max(1, min(run.windows, INTERMEDIATE_BYTES[run.device] // per_window))
    return windows * run.length


def _wide_rows(columns: int, batch: int, run: Run, copies: int) -> int:
    rows = min(batch, ROWS_AT_ONCE)
    # oneDNN copies what it multiplies once more, in 16 bits.
    extra = columns * rows * 2 if run.device == "cpu" and run.computed_bytes == 2 else 0
    return copies * WIDE * columns * rows + extra


def _kept_inputs(block: Block, run: Run, *, in_step: bool) -> Part:
    """Return the float block's inputs that a transform keeps for the twin."""
    if not (run.transforms and run.propagated and in_step):
        return _part("inputs of the float block", 0, "not kept")
    columns = sum(tap.columns for name, tap in block.taps.items() if name != NOT_CORRECTED)
    size = run.tokens * columns * run.computed_bytes
    why = f"{run.tokens} tokens x {columns} x {run.computed_bytes}"
    return _part("inputs of the float block", size, why)


def _held(
    shape: ModelShape, block: Block, run: Run, tap: str, batch: int, *, in_step: bool
) -> Part:
    """Return the activations with which batches wait in front of a tap."""
    inside = {
        "attn_in": shape.hidden,
        "attn_out": shape.hidden + block.attended,
        "mlp_in": 2 * shape.hidden,
        "mlp_out": 2 * shape.hidden + block.inner,
    }
    numbers = inside[tap]
    if run.propagated and not run.transforms:  # a transform kept the inputs instead
        numbers += inside[tap] if tap != NOT_CORRECTED else inside["mlp_in"]
    tokens = run.tokens if in_step else batch
    why = f"{tokens} tokens x {numbers} x {run.computed_bytes}"
    return _part("activations that wait", tokens * numbers * run.computed_bytes, why)


def _lost(block: Block, run: Run, *, in_step: bool) -> Part:
    """Return what is freed in pieces that glibc keeps: holes which larger tensors do not fit in.

    Activations of attention leave such holes, and so do matrices below the 32 MiB from which on
    every tensor is a mapping of its own.
    """
    streams = 2 if run.propagated and not run.transforms else 1
    held = run.tokens * block.attended * run.computed_bytes * streams if in_step else 0
    small = [tap.square for tap in block.taps.values() if tap.square < LARGEST_IN_HEAP]
    squares = 2 * max(small, default=0) + (sum(small) if run.transforms else 0)
    size = squares if run.device == "cpu" else 0
    spread = Range(0, held // 2 + size, held * 3 // 2 + 2 * size)
    return _part("freed memory in pieces", spread, "half of what attention held, as measured")


def _search(block: Block) -> Part:
    """Return what trying a scale takes: a tap's weights, and copies of its largest."""
    most = 0
    for tap in block.taps.values():
        largest = WIDE * tap.columns * max(tap.rows)
        most = max(most, tap.weight + 5 * largest)
    return _part("the search for scales", _about(most), "5 float32 copies of a linear")


def _rounding(tap: Tap, run: Run) -> Part:
    """Return what factoring the Hessian and rounding a tap's weights take."""
    # The Hessian becomes its factor and the inverse of that in place; triangular solves copy three
    # quarters. Then weights, values, products and errors of all linears, as measured.
    hessian = METHODS[run.method][1]
    if not (hessian or run.propagated):
        return _part("rounding", _about(3 * tap.weight), "3 float32 copies of the weights")
    copies = 11 if hessian else 8
    most = max(tap.square * 7 // 4 + tap.weight, tap.square + copies * tap.weight // 2)
    why = f"1.75 x 4 x C^2 and the weights in float32, or 4 x C^2 and {copies / 2:g} of them"
    return _part("factors and rounding", _about(most), why)
