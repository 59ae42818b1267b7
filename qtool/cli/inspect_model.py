"""`qtool inspect`: what a model is, from its configuration and headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.checkpoint.locate import locate
from qtool.checkpoint.untrusted import printable
from qtool.errors import UsageError
from qtool.pipeline.inspect_gguf import compare_gguf, inspect_gguf
from qtool.pipeline.inspection import inspect_model
from qtool.pipeline.tokenizer_files import compare_models

HASH_CHARACTERS = 12
GROUP_SIZES = (128, 64, 32, 16)  # the default first


def run_inspect(
    model: str,
    *,
    tensors: bool = False,
    diff: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Inspect a model, and compare it with another one if `diff` names one.

    Raises:
        UsageError: no such path, or not a model.
        DamagedError: a file is missing, truncated, malformed or absurd.
        UnsupportedError: weights that qtool does not read.
        HubError: the hub, the network or authentication.
    """
    checkpoint = locate(model, revision, offline, headers_only=True, gguf=True)
    describe = inspect_gguf if checkpoint.gguf else inspect_model
    result = describe(checkpoint, list_tensors=tensors)
    if diff is not None:
        other = locate(diff, None, offline, headers_only=True, gguf=True)
        if bool(checkpoint.gguf) != bool(other.gguf):
            raise UsageError(
                "a GGUF file and a directory hold their tokenizers in ways that do not compare",
                "give --diff a model of the same kind",
            )
        compare = compare_gguf if checkpoint.gguf else compare_models
        result["diff"] = compare(checkpoint, other)
    return result


def render_inspection(result: Mapping[str, Any]) -> RenderableType:
    """Return the tables for a terminal; everything that came from a file is escaped."""
    parts: list[RenderableType] = [_overview(result), Text(), _dtypes(result["tensors"])]
    listed = result["tensors"].get("list")
    if listed is not None:
        parts += [Text(), _tensor_table(listed)]
    if "diff" in result:
        parts += [Text(), _diff_table(result["diff"])]
    parts += [Text(f"warning: {printable(w['message'])}") for w in result["warnings"]]
    # Never wrapped: it is there to be copied.
    parts += [Text(), Text(next_command(result), no_wrap=True, overflow="ignore")]
    return Group(*parts)


def next_command(result: Mapping[str, Any]) -> str:
    """Return the last line: what to run next on this model, or why there is nothing to run."""
    support, model = result["support"], printable(result["model"]["id"])
    if "quantize" in support["commands"]:
        group = _group_flag(result["architecture"])
        return f"next: qtool quantize {model} --method awq --bits 4{group}"
    if result.get("gguf", {}).get("statistics"):
        return f"next: qtool quantize MODEL --statistics {model}"
    if "eval" in support["commands"]:
        return f"next: qtool eval {model} --ref ORIGINAL"
    return f"qtool can only inspect this model: {printable(support['reason'])}"


def _group_flag(shape: Mapping[str, Any]) -> str:
    """Return --group-size where the default one does not divide the rows of the model."""
    sizes = [shape["hidden_size"], shape["intermediate_size"]]
    if type(shape["attention_heads"]) is int and type(shape["head_dim"]) is int:
        sizes.append(shape["attention_heads"] * shape["head_dim"])
    rows = [size for size in sizes if type(size) is int]
    fitting = [size for size in GROUP_SIZES if all(row % size == 0 for row in rows)]
    if fitting[:1] == [GROUP_SIZES[0]]:
        return ""
    return f" --group-size {fitting[0] if fitting else -1}"


def _overview(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _facts(result):
        table.add_row(label, Text(printable(value)))
    return table


def _facts(result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield the lines of the overview, leaving out what the model does not say."""
    shape, parameters, model = result["architecture"], result["parameters"], result["model"]
    yield "model", str(model["id"]) + (f" @ {model['revision']}" if model["revision"] else "")
    container = result.get("gguf")
    if container is None:
        named, kind = shape["name"] or "not named", shape["model_type"] or "no config"
        yield "architecture", f"{named} ({kind})"
    else:
        yield from _container_facts(container, shape["model_type"], result["tensors"]["files"])
    if container is not None and container["statistics"]:
        return
    yield "parameters", _parameters(parameters)
    if shape["layers"] is not None:
        yield (
            "shape",
            f"{shape['layers']} layers, hidden {shape['hidden_size']}, intermediate "
            f"{_spread(shape['intermediate_size'])}, vocabulary {shape['vocabulary']}",
        )
        yield (
            "attention",
            f"{_spread(shape['attention_heads'])} heads of {shape['head_dim']}, "
            f"{_spread(shape['key_value_heads'])} key-value heads, "
            f"context {shape['context_length']}",
        )
    if shape["experts"]:
        yield "experts", f"{shape['experts']}, {shape['experts_per_token']} per token"
    tied = {True: "tied", False: "separate from the output head", None: "none found"}
    yield "embeddings", tied[shape["tied_embeddings"]]
    for group in shape["fused_groups"]:
        yield "one input", f"{group['name']} ({group['stored']}, {group['count']} times)"
    yield from _tokenizer_facts(result["tokenizer"])
    if result["quantization"] is None:
        yield "quantization", "none"
    else:
        yield from _quantization_facts(result["quantization"])


def _container_facts(
    container: Mapping[str, Any], architecture: str | None, files: int
) -> Iterable[tuple[str, str]]:
    if container["title"]:
        yield "title", container["title"]
    if architecture:
        yield "architecture", architecture
    parts = f", in {files} parts" if files > 1 else ""
    yield "file", f"GGUF {container['version']}, {container['file_type'] or 'no file type'}{parts}"
    statistics = container["statistics"]
    if statistics:
        datasets = ", ".join(statistics["datasets"]) or "a text that is not named"
        yield (
            "statistics",
            f"{statistics['entries']} linears over {statistics['chunks']} chunks of "
            f"{statistics['chunk_size']} tokens",
        )
        yield "measured on", datasets


def _spread(value: object) -> str:
    """Return a size, or the range of sizes where every layer has its own."""
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        least, most = min(value), max(value)
        return str(least) if least == most else f"{least} to {most}"
    return str(value)


def _parameters(parameters: Mapping[str, int]) -> str:
    total, active = parameters["total"], parameters["active"]
    shown = f"{total:,} ({_short(total)})"
    return shown if active == total else f"{shown}, active per token {active:,} ({_short(active)})"


def _short(count: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def _tokenizer_facts(tokenizer: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if tokenizer.get("tokens"):
        named = "/".join(filter(None, (tokenizer["class"], tokenizer["pre"])))
        digest = tokenizer["sha256"][:HASH_CHARACTERS]
        yield "tokenizer", f"{named}, {tokenizer['tokens']:,} tokens, sha256 {digest}"
    elif tokenizer["sha256"]:
        names = ", ".join(file["name"] for file in tokenizer["files"])
        yield "tokenizer", f"{names}, sha256 {tokenizer['sha256'][:HASH_CHARACTERS]}"
    else:
        yield "tokenizer", "none"
    template = tokenizer["chat_template"]
    yield (
        "chat template",
        f"sha256 {template['sha256'][:HASH_CHARACTERS]}" if template else "none",
    )


def _quantization_facts(quantization: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    group = quantization["group_size"]
    spread = {None: "", 0: "", -1: ", one scale per row"}.get(group, f", group size {group}")
    sign = {True: ", symmetric", False: ", asymmetric", None: ""}[quantization["symmetric"]]
    bits = " and ".join(quantization["bits_by_modules"]) or quantization["bits"]
    method = quantization["method"]
    if method == "gguf" and quantization["variant"]:
        method = f"{method} {quantization['variant']}"
    yield "quantization", f"{method}, {bits} bits{spread}{sign}"
    if quantization["bits_per_weight"] is not None:
        yield (
            "bits per weight",
            f"{quantization['bits_per_weight']:.3f} in {quantization['modules']} quantized "
            f"linears, {quantization['file_bits_per_weight']:.3f} over the whole file",
        )
    yield "loads in", ", ".join(quantization["loads_in"]) or "not known"


def _dtypes(tensors: Mapping[str, Any]) -> Table:
    table = Table("dtype", "tensors", "parameters", "bytes", box=None, pad_edge=False)
    of_blocks = any("bits_per_weight" in row for row in tensors["by_dtype"])
    if of_blocks:
        table.add_column("bits")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in tensors["by_dtype"]:
        figures = [f"{row[key]:,}" for key in ("tensors", "parameters", "bytes")]
        bits = [f"{row['bits_per_weight']:.4g}"] if of_blocks else []
        table.add_row(row["dtype"], *figures, *bits)
    total = f"{tensors['bits_per_weight']:.3f} bits per weight"
    table.add_row("all", f"{tensors['count']:,}", total, f"{tensors['bytes']:,}")
    return table


def _tensor_table(listed: Iterable[Mapping[str, Any]]) -> Table:
    table = Table("tensor", "dtype", "shape", "bytes", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    table.columns[3].justify = "right"
    for row in listed:
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        table.add_row(Text(printable(row["name"])), row["dtype"], shape, f"{row['bytes']:,}")
    return table


def _diff_table(diff: Mapping[str, Any]) -> Table:
    table = Table("difference", "this model", "", box=None, pad_edge=False)
    table.columns[2].header = Text(printable(diff["other"]))
    for name in ("tokenizer", "chat_template"):
        pair = diff[name]
        left, right = (str(pair[side])[:HASH_CHARACTERS] for side in ("left", "right"))
        shown = ("same", "same") if pair["same"] else (left, right)
        table.add_row(name.replace("_", " "), *shown)
    for name in ("special_tokens", "config"):
        for row in diff[name]:
            values = (Text(printable(value)) for value in (row["left"], row["right"]))
            table.add_row(Text(printable(row["key"])), *values)
        if not diff[name]:
            table.add_row(name.replace("_", " "), "same", "same")
    return table
