"""Bytes of a model in every format, with the arithmetic: nothing is counted per parameter.

Embeddings, output head, norms and routers count as what they really are in each format. Tensors are
exact for known architectures; what stands before them in a file is exact where the model's files,
or published ones, tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from qtool.errors import UsageError
from qtool.formats.gguf_file_types import ALIASES, FILE_TYPES
from qtool.formats.gguf_mixes import file_type_named
from qtool.formats.gguf_tensors import block_of
from qtool.ggml_types import FLOAT_TYPES, GGML_TYPES
from qtool.memory.directory_sizes import (
    ENTRY_BYTES,
    Linear,
    Scheme,
    awq,
    compressed,
    fp8,
    fp8_block,
    gptq,
    int8,
    is_linear,
    kept_bytes,
    linears_of,
    nf4,
    safetensors_bytes,
    scheme_bytes,
)
from qtool.memory.gguf_sizes import (
    ALIGNMENT,
    MXFP4,
    PREAMBLE,
    VERSION_BYTES,
    StoredType,
    entries_bytes,
    keys_estimate,
    stored_types,
)
from qtool.memory.shape import ModelShape
from qtool.registry import nearest

GGUF = "gguf:"
FLOATS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
SCHEMES: Mapping[str, Scheme] = {
    "fp8": fp8(),
    "fp8-block": fp8_block(),
    "int8": int8(),
    "nf4": nf4(double=False),
    "nf4-dq": nf4(double=True),
}
# Other names of formats.
SYNONYMS = {
    "f32": "fp32",
    "float32": "fp32",
    "f16": "fp16",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int4": "gptq:4:128",
    "w4a16": "compressed-tensors:4",
    "w8a16": "compressed-tensors:8:-1",
    "bitsandbytes": "nf4",
    "bnb": "nf4",
    "nf4-double": "nf4-dq",
    "fp8_block": "fp8-block",
}
PACKED = ("gptq", "awq", "compressed-tensors")
BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": (4, 8)}
PARTS = re.compile(r"(gptq|awq|compressed-tensors)(?::(\d{1,2}))?(?::(-?\d{1,6}))?(:asym)?")
LARGEST_GROUP = 1 << 16


@dataclass(frozen=True)
class Part:
    """One term of the sum.

    Args:
        label: what it is.
        n_bytes: of it.
        arithmetic: how they come about.
        exact: whether nothing in it is estimated.
    """

    label: str
    n_bytes: int
    arithmetic: str
    exact: bool = True


@dataclass(frozen=True)
class FormatBytes:
    """A model in one format.

    Args:
        name: of the format, in full.
        bits_per_weight: of all tensors, mean over all weights.
        file_bytes: of the files with weights, headers included.
        weights_bytes: of what lies on a GPU that holds all blocks. llama.cpp leaves embeddings that
            are not the head in RAM, others load everything.
        parts: their sum is `file_bytes`.
        exact: whether the bytes of the tensors are; the header's part says so for itself.
        block_bytes: of every block's tensors, those of further blocks for prediction last.
        host_bytes: of what stays in RAM.
    """

    name: str
    bits_per_weight: float
    file_bytes: int
    weights_bytes: int
    parts: tuple[Part, ...]
    exact: bool
    block_bytes: tuple[int, ...] = field(default=(), repr=False)
    host_bytes: int = 0


def weight_bytes(
    shape: ModelShape, fmt: str, *, importance: bool | None = None, recipe: int | None = None
) -> FormatBytes:
    """Return the bytes of a model in a format.

    Args:
        shape: of the model.
        fmt: such as `bf16`, `gptq:4:128`, `nf4-dq` or `gguf:Q4_K_M`.
        importance: whether a GGUF file is made with an importance matrix; None: if it needs one.
        recipe: year of the llama.cpp that makes a GGUF file; None: what the shape says.

    Raises:
        UsageError: an unknown format, a year without GGUF, or bits that the format does not have.
    """
    name = format_named(fmt)
    if name.startswith(GGUF):
        return _gguf(shape, name, importance=importance, recipe=recipe)
    if name in FLOATS:
        return _directory(shape, name, None, FLOATS[name])
    return _directory(shape, name, _scheme(name), "")


def format_named(text: str) -> str:
    """Return the full name of a format: `gguf:Q4_K_M` for `q4_k_m`, `gptq:4:128` for `gptq`.

    Raises:
        UsageError: there is none.
    """
    plain = text.strip()
    lower = plain.lower()
    lower = SYNONYMS.get(lower, lower)
    if lower in FLOATS or lower in SCHEMES:
        return lower
    match = PARTS.fullmatch(lower)
    if match is not None:
        return _packed_name(match, text)
    upper = plain.upper().removeprefix(GGUF.upper())
    if upper == MXFP4:
        return f"{GGUF}{MXFP4}"
    if lower.startswith(GGUF) or upper in FILE_TYPES or upper in ALIASES:
        return f"{GGUF}{file_type_named(upper).name}"
    known = [*FLOATS, *SCHEMES, *PACKED, *(f"{GGUF}{x}" for x in FILE_TYPES)]
    raise UsageError(f"unknown format '{text}'", nearest(lower, known))


def _packed_name(match: re.Match[str], text: str) -> str:
    kind, bits, group = match[1], int(match[2] or 4), int(match[3] or 128)
    if bits not in BITS[kind]:
        widths = ", ".join(map(str, BITS[kind]))
        raise UsageError(f"'{text}': {kind} has no {bits} bits", f"it has {widths}")
    if not (group == -1 or 0 < group <= LARGEST_GROUP) or (match[4] and "compressed" not in kind):
        raise UsageError(f"'{text}' is no format", "write it like gptq:4:128 or gptq:4:-1")
    return f"{kind}:{bits}:{group}{match[4] or ''}"


def _scheme(name: str) -> Scheme:
    if name in SCHEMES:
        return SCHEMES[name]
    kind, bits, group = name.removesuffix(":asym").split(":")
    if kind == "gptq":
        return gptq(int(bits), int(group))
    if kind == "awq":
        return awq(int(bits), int(group))
    return compressed(int(bits), int(group), symmetric=not name.endswith(":asym"))


# --- GGUF -------------------------------------------------------------------------------------


def _gguf(
    shape: ModelShape, name: str, *, importance: bool | None, recipe: int | None
) -> FormatBytes:
    file_type = name.removeprefix(GGUF)
    if importance is None:
        importance = file_type != MXFP4 and FILE_TYPES[file_type].needs_importance
    year = shape.recipe if recipe is None else recipe
    stored = stored_types(shape, file_type, importance=importance, recipe=year)
    return stored_bytes(shape, name, stored)


def stored_bytes(shape: ModelShape, name: str, stored: Sequence[StoredType]) -> FormatBytes:
    """Return the bytes of a GGUF file whose tensors have these types."""
    body = sum(x.padded for x in stored)
    head = header_part(shape, stored)
    host = 0
    if not shape.tied:
        host = sum(x.n_bytes for x in stored if x.tensor.name == "token_embd.weight")
    host += sum(x.n_bytes for x in stored if x.tensor.name == "per_layer_token_embd.weight")
    total = sum(x.n_bytes for x in stored)
    weights = sum(x.tensor.weights for x in stored)
    return FormatBytes(
        name=name,
        bits_per_weight=8 * total / weights,
        file_bytes=head.n_bytes + body,
        weights_bytes=total - host,
        parts=(*_type_parts(stored), _padding(body - total), head),
        exact=shape.exact,
        block_bytes=_by_block(
            ((x.tensor.name, x.n_bytes) for x in stored), shape.blocks + shape.extra_blocks
        ),
        host_bytes=host,
    )


def existing_gguf(
    shape: ModelShape, stored: Sequence[StoredType], file_bytes: int, name: str = "gguf"
) -> FormatBytes:
    """Return the bytes of a GGUF file that is there, exact.

    Args:
        shape: from `shape_of_gguf`.
        stored: likewise.
        file_bytes: of the file, or of all its parts.
        name: of the format.
    """
    planned = stored_bytes(shape, name, stored)
    total = sum(x.n_bytes for x in stored)
    rest = Part("headers and padding", file_bytes - total, "what the files have beside tensors")
    parts = (*_type_parts(stored), rest)
    return replace(planned, file_bytes=file_bytes, parts=parts, exact=True)


def header_part(shape: ModelShape, stored: Sequence[StoredType]) -> Part:
    """Return what stands before the tensors: keys, tokenizer, and an entry for every tensor."""
    known = shape.header_bytes is not None
    keys = shape.header_bytes if shape.header_bytes is not None else keys_estimate(shape.vocabulary)
    if known and all(x.type in FLOAT_TYPES for x in stored):
        keys -= VERSION_BYTES  # only quantized files have that key
    entries = entries_bytes(stored)
    n_bytes = -(-(PREAMBLE + keys + entries) // ALIGNMENT) * ALIGNMENT
    text = (
        f"{PREAMBLE} + {'' if known else 'about '}{keys:,} (keys, tokenizer of "
        f"{shape.vocabulary:,} tokens) + {entries:,} (entries of {len(stored)} tensors), to a "
        f"multiple of {ALIGNMENT}"
    )
    return Part("header", n_bytes, text, exact=known)


def _padding(n_bytes: int) -> Part:
    return Part("padding", n_bytes, f"every tensor to a multiple of {ALIGNMENT} bytes")


def _type_parts(stored: Iterable[StoredType]) -> list[Part]:
    weights: dict[tuple[str, str], int] = {}
    for x in stored:
        key = (_group(x.tensor.role), x.type)
        weights[key] = weights.get(key, 0) + x.tensor.weights
    parts = []
    for (group, name), count in weights.items():
        kind = GGML_TYPES[name]
        n_bytes = count // kind.block * kind.block_bytes
        per = (
            f"{kind.block_bytes} bytes / {kind.block} weights"
            if kind.block > 1
            else (f"{kind.block_bytes} bytes")
        )
        parts.append(Part(f"{group} {name}", n_bytes, f"{count:,} weights x {per}"))
    return parts


GROUPS = {
    "embedding": "embedding",
    "head": "output head",
    "linear": "linears",
    "expert": "experts",
}


def _group(role: str) -> str:
    return GROUPS.get(role, "norms, biases, routers")


# --- safetensors ------------------------------------------------------------------------------


def _directory(shape: ModelShape, name: str, scheme: Scheme | None, dtype: str) -> FormatBytes:
    """Return the bytes of a directory: quantized by a scheme, or all in one float type."""
    tensors = [t for t in shape.tensors if not t.computed]
    sizes: list[tuple[str, int]] = []
    groups: dict[str, tuple[int, int]] = {}
    quantized: list[Linear] = list(linears_of(shape)) if scheme else []
    for linear in quantized:
        assert scheme is not None
        sizes.append((linear.name, scheme_bytes(linear, scheme)))
        _add(groups, "experts" if linear.count > 1 else "linears", linear.weights, sizes[-1][1])
    for tensor in tensors:
        if scheme is None or not is_linear(tensor):
            sizes.append((tensor.name, kept_bytes(tensor, dtype)))
            _add(groups, f"{_group(tensor.role)} ", tensor.weights, sizes[-1][1])
    total = sum(n_bytes for _, n_bytes in sizes)
    weights = sum(t.weights for t in tensors)
    header = _directory_header(shape, quantized, scheme, dtype, total)
    parts = [
        Part(
            f"{group.strip()} {'kept' if scheme and group.endswith(' ') else name}",
            n_bytes,
            f"{count:,} weights x {8 * n_bytes / count:.4g} bits"
            + (f" ({scheme.formula})" if scheme and not group.endswith(" ") else ""),
        )
        for group, (count, n_bytes) in groups.items()
    ]
    return FormatBytes(
        name=name,
        bits_per_weight=8 * total / weights,
        file_bytes=total + header.n_bytes,
        weights_bytes=total,
        parts=(*parts, header),
        exact=shape.exact,
        block_bytes=_by_block(sizes, shape.blocks + shape.extra_blocks),
    )


def _add(groups: dict[str, tuple[int, int]], name: str, weights: int, n_bytes: int) -> None:
    before = groups.get(name, (0, 0))
    groups[name] = (before[0] + weights, before[1] + n_bytes)


def _directory_header(
    shape: ModelShape, quantized: Sequence[Linear], scheme: Scheme | None, dtype: str, total: int
) -> Part:
    """Return headers and index: exact where the checkpoint's names are known."""
    tensors = [t for t in shape.tensors if not t.computed]
    if not tensors or any(t.stored is None for t in tensors):
        # An expert, and every piece of a quantized linear, has an entry of its own.
        pieces = {x.name: len(scheme.pieces(x)) * x.count for x in quantized} if scheme else {}
        count = sum(pieces.get(t.name, t.shape[0] if t.role == "expert" else 1) for t in tensors)
        text = f"about {count:,} tensors x {ENTRY_BYTES} bytes"
        return Part("headers and index", count * ENTRY_BYTES, text, exact=False)
    by_name = {linear.name: linear for linear in quantized}
    stored: list[tuple[str, str, tuple[int, ...]]] = []
    for tensor in tensors:
        assert tensor.stored is not None
        linear = by_name.get(tensor.name)
        if linear is None or scheme is None:
            stored.append((tensor.stored[0], dtype or tensor.stored[1], tensor.shape))
        else:
            stored += [(f"{linear.stored}.{x[0]}", x[1], x[2]) for x in scheme.pieces(linear)]
    n_bytes = safetensors_bytes(stored) - total
    return Part("headers and index", n_bytes, f"entries of {len(stored):,} tensors")


_block_of = lru_cache(maxsize=1 << 14)(block_of)


def _by_block(sizes: Iterable[tuple[str, int]], count: int) -> tuple[int, ...]:
    found = [0] * count
    for name, n_bytes in sizes:
        block = _block_of(name)
        if 0 <= block < count:
            found[block] += n_bytes
    return tuple(found)
