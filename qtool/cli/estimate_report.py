"""What `qtool estimate-memory` shows: one row per format, what fits, and what to do next."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.checkpoint.untrusted import printable
from qtool.errors import UsageError
from qtool.memory.answers import experts_away
from qtool.memory.cache import cache_parts
from qtool.memory.file_sizes import format_named
from qtool.memory.overhead import Part, Range, total
from qtool.memory.shape import ModelShape
from qtool.pipeline.estimate import Estimate, Row, best, longest, preferred, run_of, supported
from qtool.recipe.sizes import shown_size

GB, GIB = 1e9, 2**30
HUB = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/")
OTHERS_SHOWN = 4
FITS, TIGHT, NOT = "green", "yellow", "red dim"
FIRST_COLUMN = {"infer": "format", "quantize": "method", "qlora": "weights in"}


def shown(found: Estimate, *, solve: str | None, explain: str | None) -> RenderableType:
    """Return the page for a terminal; what came from a file is escaped."""
    head = Table.grid(padding=(0, 2))
    for label, fact in _facts(found):
        head.add_row(label, Text(fact))
    parts: list[RenderableType] = [head, Text()]
    if explain is not None:
        parts += [*explained(found, _row_named(found, explain)), Text()]
    else:
        parts += [_table(found), Text(_legend(found), style="dim"), Text()]
    parts += [Text(line) for line in _answers(found, solve)]
    # Never wrapped: it is there to be copied.
    parts.append(Text(f"next: {next_command(found)}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def _facts(found: Estimate) -> Iterable[tuple[str, str]]:
    model, settings = found.model, found.wanted.settings
    shape, devices, ram = model.shape, found.machine.devices, found.machine.ram
    counted = f"{shape.parameters / GB:.2f} B parameters"
    if shape.experts:
        counted += f", {shape.active_parameters / GB:.2f} B active"
    yield "model", f"{printable(shape.name)}, {counted}"
    if model.assumed:
        yield "", printable(model.assumed)
    if model.others:
        names = ", ".join(printable(name) for name in model.others[:OTHERS_SHOWN])
        yield "", f"others of that size: {names}"
    if devices is not None:
        kind = "of main memory" if devices.unified else "usable"
        yield "gpu", f"{devices.name}: {_both(devices.total)} {kind} ({devices.source})"
    if ram is not None:
        yield "ram", _both(ram)
    if found.wanted.phase == "infer":
        yield "context", _context_line(found)
    elif found.wanted.phase == "qlora":
        yield "texts", f"{settings.sequences} of {found.context} tokens; gradient checkpointing"
    else:
        yield "run", _run_line(found)


def _both(n_bytes: int) -> str:
    return f"{n_bytes / GB:.2f} GB ({n_bytes / GIB:.2f} GiB)"


def _context_line(found: Estimate) -> str:
    settings = found.wanted.settings
    count, context = settings.sequences, settings.context
    line = f"{context} tokens, cache {settings.key_type}: {found.kv_bytes / GB:.3g} GB"
    if count > 1:
        line = f"{count} sequences of {line}; llama-server -c {count * context} -np {count}"
    return line


def _run_line(found: Estimate) -> str:
    run = run_of(found.model, found.wanted, "rtn")
    where = "the GPU" if run.device == "cuda" else "the CPU"
    return (
        f"{run.windows} windows of {run.length} tokens, blocks run on {where} in "
        f"{8 * run.computed_bytes} bits"
    )


def _table(found: Estimate) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 1, 0, 0))
    table.add_column(FIRST_COLUMN[found.wanted.phase], overflow="fold")
    for title in _titles(found):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(printable(row.name), *_cells(found, row), style=_style(row))
    return table


def _titles(found: Estimate) -> list[str]:
    phase, named = found.wanted.phase, found.machine.named
    if phase == "quantize":
        on_card = any(row.memory is not None and row.memory.vram for row in found.rows)
        vram = ["vram GB", "low - high"] if on_card else []
        return ["writes GB", "ram GB", "low - high", *vram, *(["fits"] if named else [])]
    ends = ["fits", "max ctx"] if named else []
    if phase == "qlora":
        return ["weights", "training", "total GB", "low - high", *ends]
    return ["bits", "file GB", "weights", "cache", "other", "total GB", *ends]


def _cells(found: Estimate, row: Row) -> list[str]:
    ends = [_verdict(row)] if found.machine.named else []
    memory = row.memory
    if memory is not None:
        cells = [f"{row.file_bytes / GB:.2f}", *_likely_and_spread(memory.peak_ram)]
        return [*cells, *(_likely_and_spread(memory.peak_vram) if memory.vram else []), *ends]
    about = "" if row.exact else "~"
    other = f"~{row.overhead.likely / GB:.2f}"
    fixed = row.weights_bytes + row.kv_bytes
    if ends:
        ends.append(f"{row.max_context:,}" if row.max_context else "-")
    if found.wanted.phase == "qlora":
        spread = Range(
            *(fixed + x for x in (row.overhead.low, row.overhead.likely, row.overhead.high))
        )
        return [f"{fixed / GB:.2f}", other, *_likely_and_spread(spread), *ends]
    figures = [f"{about}{x / GB:.2f}" for x in (row.file_bytes, row.weights_bytes, row.kv_bytes)]
    total = f"~{row.total_bytes / GB:.2f}"
    if not row.exact:  # an unknown architecture: a range, never one figure
        low, high = fixed + row.overhead.low, fixed + row.overhead.high
        total = f"{low / GB:.1f} - {high / GB:.1f}"
    return [f"{row.bits_per_weight:.2f}", *figures, other, total, *ends]


def _likely_and_spread(size: Range) -> list[str]:
    return [f"~{size.likely / GB:.2f}", f"{max(size.low, 0) / GB:.1f} - {size.high / GB:.1f}"]


def _verdict(row: Row) -> str:
    answer = row.answer
    if row.fits and answer is not None and answer.split:
        return f"{answer.blocks_on_devices}/{len(row.found.block_bytes)} + ram"
    if row.fits:
        return "yes" if row.certain else "tight"
    if answer is None or answer.blocks_on_devices is None or answer.engine != "llama.cpp":
        return "no"
    return f"{answer.blocks_on_devices}/{len(row.found.block_bytes)}"


def _style(row: Row) -> str:
    if row.fits is None:
        return ""
    if not row.fits:
        return NOT
    split = row.answer is not None and row.answer.split
    return FITS if row.certain and not split else TIGHT


def _legend(found: Estimate) -> str:
    text = "GB are 10^9 bytes. ~ is a rule of thumb, the rest is exact"
    if found.wanted.phase == "infer":
        text += " (--explain FORMAT shows the arithmetic)."
    else:
        text += "."
    if found.machine.devices is not None and found.wanted.phase == "infer":
        text += " 20/80: blocks that the GPU holds."
    return text


def _answers(found: Estimate, solve: str | None) -> Iterable[str]:
    """Yield what follows from the rows, in words."""
    if not found.machine.named:
        yield "What fits? Add --gpu rtx4090 or --gpu 24GB."
        return
    top = best(found.rows)
    if found.wanted.phase != "infer":
        yield _fit_line(found, top)
        return
    if solve == "ctx":
        top = longest(found.rows) or top
    if top is None:
        smallest = found.rows[-1]
        yield (
            f"Nothing fits into {found.machine.shown}: {printable(smallest.name)} takes "
            f"{shown_size(smallest.total_bytes)}."
        )
        yield _instead(found, smallest)
        return
    certain = "" if top.certain else ", narrowly"
    split = ", split" if top.answer is not None and top.answer.split else ""
    context = f"contexts up to {top.max_context:,} tokens"
    if solve == "ctx":
        yield f"Largest context: {top.max_context:,} tokens with {printable(top.name)}{split}."
    else:
        yield f"Best that fits{certain}: {printable(top.name)}{split}, {context}."
    if split and top.answer is not None:
        held = top.answer.blocks_on_devices or 0
        yield (
            f"llama-server -ngl {held + 1 if held else 0}: {held} of "
            f"{len(top.found.block_bytes)} blocks on the GPU, "
            f"{shown_size(top.answer.ram_bytes)} in main memory."
        )
        away = experts_away(found.model.shape, top.answer, found.machine)
        if away is not None:
            yield f"Faster: llama-server -ncmoe {away}, which leaves only experts there."


def _fit_line(found: Estimate, top: Row | None) -> str:
    if top is None:
        return f"It does not fit into {found.machine.shown}."
    narrow = "" if top.certain else ", narrowly"
    return f"It fits into {found.machine.shown}{narrow}."


def _instead(found: Estimate, smallest: Row) -> str:
    """Return what to change where nothing fits."""
    if smallest.max_context:
        return f"With --ctx {smallest.max_context} it would."
    answer = smallest.answer
    if answer is not None and answer.engine == "llama.cpp" and found.machine.ram is None:
        need = shown_size(answer.ram_bytes)
        return f"With {need} of main memory it could be split: add --ram 64GB."
    return "Name smaller formats (--format gguf:IQ1_S), another machine, or a smaller model."


def next_command(found: Estimate) -> str:
    """Return the qtool command to run next, with the user's own model in it."""
    model, phase = found.model, found.wanted.phase
    name = printable(model.given if model.here else _hub_name(model.shape))
    if phase == "quantize":
        top = preferred(found.rows)
        return f"qtool quantize {name} -m {'rtn' if top is None else top.name}"
    if model.stored is not None:
        return f"qtool eval {name} --ref ORIGINAL"
    if phase == "qlora" or not found.machine.named:
        return _again(found, "24GB")
    if not supported(model.shape):
        return f"qtool inspect {name}"
    top = best([row for row in found.rows if _flags(row.name)])
    return _again(found) if top is None else f"qtool quantize {name} {_flags(top.name)}"


def _again(found: Estimate, gpu: str = "") -> str:
    """Return this command for a graphics card into which the smallest row fits."""
    model, length = found.model, found.wanted.length
    short = printable(model.given if model.here or not model.assumed else model.shape.name)
    needed = found.rows[-1].total_bytes if found.rows else GIB
    context = "" if length is None or found.wanted.phase != "infer" else f" --ctx {length}"
    return f"qtool estimate-memory {short} --gpu {gpu or f'{int(needed // GB) + 1}GB'}{context}"


def _hub_name(shape: ModelShape) -> str:
    """Return where the catalogue's model lies on the hub."""
    found = HUB.match(shape.source)
    return "MODEL" if found is None else found[1]


def _flags(name: str) -> str:
    """Return the flags of qtool quantize that make a format; none for those it does not write."""
    kind, _, rest = name.partition(":")
    if kind == "gguf":
        return f"-f {name}"
    if kind not in {"gptq", "awq", "compressed-tensors"}:
        return ""
    bits, _, group = rest.removesuffix(":asym").partition(":")
    return f"-f {kind} -b {bits}" + ("" if group == "128" else f" -g {group}")


# --- one row, term by term ---------------------------------------------------------------------


def _row_named(found: Estimate, name: str) -> Row:
    wanted = {name.lower()}
    if len(found.rows) == 1:
        return found.rows[0]
    if found.wanted.phase == "infer":
        wanted.add(format_named(name).lower())
    for row in found.rows:
        if row.name.lower() in wanted:
            return row
    raise UsageError(f"there is no row '{name}' to explain", "name it with --format, too")


def explained(found: Estimate, row: Row) -> Iterable[RenderableType]:
    """Return the sums behind a row: the file, the cache, and everything else."""
    yield Text(f"{printable(row.name)}, term by term", style="bold")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True)
    table.add_column("term", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("how", overflow="fold")
    if row.memory is None:
        _explain_file(table, row)
    if found.wanted.phase == "infer":
        _explain_cache(table, found, row)
    if row.memory is not None:
        _explain_parts(table, "main memory", row.memory.ram)
        if row.memory.vram:
            _explain_parts(table, "the GPU's memory", row.memory.vram)
        yield Text(f"the worst moment: {row.memory.moment}")
    else:
        _explain_parts(table, "total", row.parts, row.weights_bytes + row.kv_bytes)
    yield table


def _mark(exact: bool) -> str:
    return "exact" if exact else "rule"


def _explain_file(table: Table, row: Row) -> None:
    for part in row.found.parts:
        table.add_row(
            printable(part.label),
            f"{part.n_bytes:,}",
            _mark(part.exact),
            printable(part.arithmetic),
        )
    table.add_row("file", f"{row.file_bytes:,}", "", "the sum", style="bold")
    outside = row.file_bytes - row.weights_bytes - row.found.host_bytes
    how = f"without {outside:,} of headers and padding"
    if row.found.host_bytes:
        how += f" and {row.found.host_bytes:,} of embeddings, which stay in main memory"
    table.add_row("weights", f"{row.weights_bytes:,}", _mark(row.found.exact), how, style="bold")


def _explain_cache(table: Table, found: Estimate, row: Row) -> None:
    for part in cache_parts(found.model.shape, found.wanted.settings):
        how = f"{part.blocks} blocks"
        if part.cells:
            how += f" x {part.cells:,} cells x {part.token_bytes:,}"
        elif part.token_bytes:
            how += f" x {found.wanted.settings.sequences} sequences x {part.token_bytes:,}"
        table.add_row(f"cache: {part.label}", f"{part.n_bytes:,}", "exact", how)
    table.add_row("cache", f"{row.kv_bytes:,}", _mark(row.exact), "", style="bold")


def shown_range(size: Range) -> str:
    """Return a spread such as `120 MB to 600 MB`."""
    return f"{shown_size(max(size.low, 0))} to {shown_size(size.high)}"


def _explain_parts(table: Table, name: str, parts: tuple[Part, ...], fixed: int = 0) -> None:
    """Add parts of a sum and the sum itself; `fixed` was explained above."""
    for part in parts:
        if not part.size.high:
            continue
        spread = "" if part.exact else f"; {shown_range(part.size)}"
        figure = f"{part.size.likely:,}"
        table.add_row(part.name, figure, _mark(part.exact), printable(part.why) + spread)
    whole = total((*parts, Part("", Range.known(fixed), exact=True, why="")))
    how = "the sum" if not fixed else "weights, cache and the likely rest"
    table.add_row(name, f"{whole.likely:,}", "", f"{how}; {shown_range(whole)}", style="bold")
