"""Calibration data, recipes and statistics that no honest person wrote."""

import json
import os
import struct
from dataclasses import dataclass

from builders.gguf_containers import ByHand, array, key, string, tensor


@dataclass(frozen=True)
class Bad:
    """A hostile file beside a sound model: its name, how to make it, what a refusal says."""

    name: str
    make: object
    words: tuple[str, ...] = ()


def raw(content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda path: path.write_bytes(content)


def parquet(columns, **settings):
    def make(path):
        import pyarrow as pa
        from pyarrow import parquet as pq

        pq.write_table(pa.table(columns), path, **settings)

    return make


def mangled_parquet(change):
    def make(path):
        parquet({"text": ["some words"] * 100})(path)
        path.write_bytes(change(path.read_bytes()))

    return make


ROW = json.dumps({"text": "plain words " * 20}) + "\n"
DATA: dict[str, Bad] = {
    "empty text": Bad("a.txt", raw(""), ("empty",)),
    "spaces": Bad("a.txt", raw(" \n\t\n"), ("empty",)),
    "text not UTF-8": Bad("a.txt", raw(b"good \xff bad"), ("UTF-8", "5")),
    "text in UTF-16": Bad("a.txt", raw("words".encode("utf-16")), ("UTF-8", "0")),
    "text cut in a character": Bad("a.txt", raw(b"caf\xc3"), ("UTF-8", "3")),
    "overlong zero": Bad("a.txt", raw(b"x\xc0\x80"), ("UTF-8", "1")),
    "text too short": Bad("a.txt", raw("x"), ("token",)),
    "a text that is a directory": Bad("a.txt", lambda p: p.mkdir(), ("directory",)),
    "a text that is a pipe": Bad("a.txt", os.mkfifo, ("not a file",)),
    "a text that is a device": Bad("a.txt", lambda p: p.symlink_to("/dev/zero"), ("not a file",)),
    "a text that links to itself": Bad("a.txt", lambda p: p.symlink_to(p)),
    "a text of a terabyte": Bad(
        "a.txt", lambda p: (p.touch(), os.truncate(p, 1 << 40)), ("bytes",)
    ),
    "rows not JSON": Bad("a.jsonl", raw(ROW + "{oops\n"), (":2", "JSON")),
    "rows cut short": Bad("a.jsonl", raw(ROW + ROW[:20]), (":2", "JSON")),
    "rows not UTF-8": Bad("a.jsonl", raw(ROW.encode() + b'{"text":"\xe4"}\n'), (":2", "UTF-8")),
    "rows of lists": Bad("a.jsonl", raw("[1]\n"), (":1", "list")),
    "rows of numbers": Bad("a.jsonl", raw(ROW + "5\n"), (":2",)),
    "rows of null": Bad("a.jsonl", raw("null\n"), (":1",)),
    "rows without text": Bad("a.jsonl", raw('{"body": "x"}\n'), (":1", "text")),
    "text that is a number": Bad("a.jsonl", raw('{"text": 5}\n'), (":1",)),
    "text that is an object": Bad("a.jsonl", raw('{"text": {"a": 1}}\n'), (":1",)),
    "half a character": Bad("a.jsonl", raw('{"text": "\\ud800 words"}\n'), (":1", "surrogate")),
    "nested deeply": Bad("a.jsonl", raw('{"text":' + "[" * 100_000 + "\n"), (":1", "JSON")),
    "a number of 5000 digits": Bad("a.jsonl", raw('{"text":' + "9" * 5000 + "}\n"), (":1",)),
    "no line end for 70 MB": Bad("a.jsonl", raw('{"text":"' + "x" * (70 << 20)), (":1", "bytes")),
    "chats of numbers": Bad("a.jsonl", raw('{"messages": [1, 2]}\n'), (":1", "chat")),
    "chats without content": Bad("a.jsonl", raw('{"messages": [{"role": 1}]}\n'), (":1", "chat")),
    "chats of half characters": Bad(
        "a.jsonl",
        raw('{"messages": [{"role": "user", "content": "\\udc00"}]}\n'),
        (":1", "surrogate"),
    ),
    "an array for all rows": Bad("a.jsonl", raw(json.dumps([{"text": "x"}])), (":1", "list")),
    "empty rows": Bad("a.jsonl", raw('{"text": ""}\n' * 9), ("empty",)),
    "a parquet that is text": Bad("a.parquet", raw("text"), ("parquet",)),
    "an empty parquet": Bad("a.parquet", raw(""), ("parquet",)),
    "a parquet without rows": Bad("a.parquet", parquet({"text": []}), ("empty",)),
    "a parquet cut short": Bad("a.parquet", mangled_parquet(lambda b: b[:-20]), ("parquet",)),
    "a parquet without its head": Bad(
        "a.parquet", mangled_parquet(lambda b: b[20:]), ("a.parquet",)
    ),
    "a parquet of flipped bytes": Bad(
        "a.parquet", mangled_parquet(lambda b: bytes(x ^ (n % 7 == 3) for n, x in enumerate(b))), ()
    ),
    "a parquet with an absurd footer": Bad(
        "a.parquet", mangled_parquet(lambda b: b[:-8] + struct.pack("<I", 2**31) + b"PAR1"), ()
    ),
    "a parquet of other columns": Bad("a.parquet", parquet({"x": [1, 2]}), ("text",)),
    "a parquet of numbers": Bad("a.parquet", parquet({"text": [1, 2]}), ("text",)),
    "a parquet of bytes": Bad("a.parquet", parquet({"text": [b"\xff\xfe"]}), ("text",)),
    "a parquet of structs": Bad("a.parquet", parquet({"text": [{"a": [1]}]}), ("text",)),
    "a parquet bomb": Bad(
        "a.parquet",
        parquet({"text": ["x" * 1_000_000] * 1200}, compression="zstd"),
        ("characters",),
    ),
}

RECIPE = "version: 1\nmodel: {id: ./model}\n"
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [" + ",".join([f"*a{n - 1}"] * 9) + "]\n" for n in range(1, 12)
)
RECIPES: dict[str, Bad] = {
    "empty": Bad("r.yaml", raw(""), ("nothing",)),
    "a list": Bad("r.yaml", raw("- 1\n"), ("list",)),
    "a word": Bad("r.yaml", raw("hello"), ("str",)),
    "not YAML": Bad("r.yaml", raw("a: [1\nb: }"), ("YAML",)),
    "tabs": Bad("r.yaml", raw("version:\n\t- 1\n"), ("YAML",)),
    "not UTF-8": Bad(
        "r.yaml", raw(RECIPE.encode() + b"metadata: {name: \xff}\n"), ("UTF-8", "offset")
    ),
    "UTF-16": Bad("r.yaml", raw(RECIPE.encode("utf-16")), ("UTF-8",)),
    "a zero byte": Bad("r.yaml", raw(RECIPE + "\x00"), ("YAML",)),
    "two documents": Bad("r.yaml", raw(RECIPE + "---\n" + RECIPE), ("YAML",)),
    "a key twice": Bad("r.yaml", raw(RECIPE + "version: 1\n"), ("twice",)),
    "an object of Python": Bad(
        "r.yaml", raw(RECIPE + "output: !!python/object/apply:os.mkdir [MARKER]\n"), ("YAML",)
    ),
    "a module of Python": Bad(
        "r.yaml", raw(RECIPE + "output: !!python/name:os.system\n"), ("YAML",)
    ),
    "an unknown tag": Bad("r.yaml", raw(RECIPE + "output: !evil x\n"), ("YAML",)),
    "a billion laughs": Bad("r.yaml", raw(LAUGHS + RECIPE), ("alias",)),
    "laughs where a list belongs": Bad(
        "r.yaml", raw(LAUGHS.replace("a11: ", "gates: ") + RECIPE), ("alias",)
    ),
    "an alias of itself": Bad("r.yaml", raw("a: &a [*a]\n" + RECIPE), ()),
    "a merge of itself": Bad("r.yaml", raw("a: &a {<<: *a}\n" + RECIPE), ()),
    "nested lists": Bad("r.yaml", raw("a: " + "[" * 50_000), ("YAML",)),
    "nested mappings": Bad("r.yaml", raw("{a: " * 5_000), ("YAML",)),
    "nested by indent": Bad("r.yaml", raw("".join(" " * n + "a:\n" for n in range(2000))), ()),
    "20 MB": Bad("r.yaml", raw(RECIPE + "# " + "x" * (20 << 20)), ("bytes",)),
    "a number of 5000 digits": Bad("r.yaml", raw(RECIPE + "seed: " + "9" * 5000), ("r.yaml",)),
    "a huge number": Bad("r.yaml", raw(RECIPE + "seed: 99999999999999999999\n"), ("seed",)),
    "a sexagesimal number": Bad("r.yaml", raw(RECIPE + "seed: 1:20:30:40\n"), ()),
    "a negative seed": Bad("r.yaml", raw(RECIPE + "seed: -1\n"), ("seed",)),
    "a seed that is infinite": Bad("r.yaml", raw(RECIPE + "seed: .inf\n"), ("seed",)),
    "a seed that is NaN": Bad("r.yaml", raw(RECIPE + "seed: .nan\n"), ("seed",)),
    "bits of nonsense": Bad("r.yaml", raw(RECIPE + "quantize: {bits: 5}\n"), ("bits",)),
    "bits that are true": Bad("r.yaml", raw(RECIPE + "quantize: {bits: true}\n"), ("bits",)),
    "a group of a billion": Bad(
        "r.yaml",
        raw(RECIPE + "quantize: {method: rtn, group_size: 1000000000000}\n"),
        ("group size",),
    ),
    "a damping of NaN": Bad("r.yaml", raw(RECIPE + "quantize: {damp_percent: .nan}\n"), ("damp",)),
    "a window of 10**12": Bad(
        "r.yaml", raw(RECIPE + "calibration: {sequence_length: 1000000000000}\n"), ()
    ),
    "windows of 10**12": Bad("r.yaml", raw(RECIPE + "calibration: {windows: 1000000000000}\n"), ()),
    "an unknown key": Bad("r.yaml", raw(RECIPE + "evil: 1\n"), ("evil",)),
    "a key with escapes": Bad("r.yaml", raw(RECIPE + '"\\e[31mx": 1\n'), (r"\x1b",)),
    "a mapping as a key": Bad("r.yaml", raw(RECIPE + "{a: 1}: 2\n"), ("YAML",)),
    "a date": Bad("r.yaml", raw(RECIPE + "output: 2020-01-01\n"), ("output",)),
    "an impossible date": Bad("r.yaml", raw(RECIPE + "output: 2020-99-99\n"), ()),
    "binary": Bad("r.yaml", raw(RECIPE + "output: !!binary aGVsbG8=\n"), ("output",)),
    "broken binary": Bad("r.yaml", raw(RECIPE + "output: !!binary '%%%'\n"), ("output",)),
    "a set": Bad("r.yaml", raw(RECIPE + "gates: !!set {a, b}\n"), ()),
    "ordered pairs": Bad("r.yaml", raw(RECIPE + "gates: !!omap [1]\n"), ("YAML",)),
    "a pattern that is none": Bad(
        "r.yaml", raw(RECIPE + "rules: [{match: 're:(((', bits: 8}]\n"), ("match",)
    ),
    "a pattern that backtracks": Bad(
        "r.yaml",
        raw(RECIPE + "rules: [{match: 're:(([a-z_]+)*[.0-9]*)*!', keep: true}]\n"),
        ("seconds",),
    ),
    "an absurd repetition": Bad(
        "r.yaml", raw(RECIPE + "rules: [{match: 're:a{9999999999}', keep: true}]\n"), ()
    ),
    "a nested pattern": Bad(
        "r.yaml",
        raw(RECIPE + "rules: [{match: 're:" + "(" * 5000 + ")" * 5000 + "', keep: true}]\n"),
        (),
    ),
    "a rule that matches nothing": Bad(
        "r.yaml",
        raw(RECIPE + "quantize: {group_size: 32}\nrules: [{match: evil, keep: true}]\n"),
        ("evil",),
    ),
    "an unknown format": Bad("r.yaml", raw(RECIPE + "export: [{format: evil}]\n"), ("evil",)),
    "a group that does not fit": Bad(
        "r.yaml", raw(RECIPE + "quantize: {method: rtn, group_size: 48}\n"), ("group size 48",)
    ),
    "a model that is a list": Bad("r.yaml", raw("version: 1\nmodel: [1]\n"), ("model",)),
    "version 2": Bad("r.yaml", raw("version: 2\nmodel: {id: x}\n"), ("version",)),
    "a recipe that is a directory": Bad("r.yaml", lambda p: p.mkdir(), ("directory",)),
    "a recipe that is a pipe": Bad("r.yaml", os.mkfifo, ("not a file",)),
    "a recipe that is a device": Bad(
        "r.yaml", lambda p: p.symlink_to("/dev/zero"), ("not a file",)
    ),
    "a recipe that links to itself": Bad("r.yaml", lambda p: p.symlink_to(p), ()),
}


def sums(name="blk.0.attn_q.weight", columns=64, count=1, data=None):
    """A statistics file of one tensor."""
    values = [1.0] * columns if data is None else data
    payload = struct.pack(f"<{columns}f", *values)
    body = payload + bytes(-len(payload) % 32) + struct.pack("<f", count) + bytes(28)
    second = (4 * columns + 31) // 32 * 32
    entries = [
        tensor(f"{name}.in_sum2", [columns, 1], 0, 0),
        tensor(f"{name}.counts", [1, 1], 0, second),
    ]
    return ByHand([key("general.type", "string", string("imatrix"))], entries, body)


def legacy(entries, *, count=None, tail=b""):
    head = struct.pack("<i", len(entries) if count is None else count)
    return raw(head + b"".join(entries) + tail)


def entry(name="blk.0.attn_q.weight", calls=1, values=64, length=None, claimed=None):
    text = name.encode()
    return (
        struct.pack("<i", len(text) if length is None else length)
        + text
        + struct.pack("<ii", calls, values if claimed is None else claimed)
        + struct.pack(f"<{values}f", *[1.0] * values)
    )


STATISTICS: dict[str, Bad] = {
    "empty": Bad("s.gguf", raw(b"")),
    "text": Bad("s.gguf", raw("hello")),
    "the magic alone": Bad("s.gguf", raw(b"GGUF")),
    "a model": Bad("s.gguf", ByHand([key("general.architecture", "string", string("llama"))]).at),
    "counts missing": Bad(
        "s.gguf", ByHand([], [tensor("x.in_sum2", [8, 1], 0, 0)], bytes(32)).at, ("counts",)
    ),
    "halves": Bad(
        "s.gguf",
        ByHand(
            [], [tensor("x.in_sum2", [8, 1], 1, 0), tensor("x.counts", [1], 0, 32)], bytes(64)
        ).at,
        ("F32",),
    ),
    "an odd number": Bad(
        "s.gguf",
        ByHand(
            [], [tensor("x.in_sum2", [7, 1], 0, 0), tensor("x.counts", [2], 0, 32)], bytes(64)
        ).at,
        ("7",),
    ),
    "of another model": Bad("s.gguf", sums(columns=63).at),
    "of unknown tensors": Bad("s.gguf", sums("evil").at),
    "all NaN": Bad("s.gguf", sums(data=[float("nan")] * 64).at),
    "all infinite": Bad("s.gguf", sums(data=[float("inf")] * 64).at),
    "all negative": Bad("s.gguf", sums(data=[-1.0] * 64).at),
    "a count of NaN": Bad("s.gguf", sums(count=float("nan")).at),
    "a count of zero": Bad("s.gguf", sums(count=0).at),
    "absurd list": Bad(
        "s.gguf", ByHand([key("x", "array", array("string", 2**60, b""))]).at, ("items",)
    ),
    "a directory": Bad("s.gguf", lambda p: p.mkdir(), ("not a file",)),
    "a pipe": Bad("s.gguf", os.mkfifo, ("not a file",)),
    "legacy: too many entries": Bad("s.dat", legacy([entry()], count=10**6), ("entries",)),
    "legacy: cut short": Bad("s.dat", raw((struct.pack("<i", 1) + entry())[:-5]), ("truncated",)),
    "legacy: a long name": Bad("s.dat", legacy([entry(), entry(length=2**31 - 1)]), ("claims",)),
    "legacy: a negative name": Bad("s.dat", legacy([entry(), entry(length=-1)]), ("claims",)),
    "legacy: absurd values": Bad("s.dat", legacy([entry(claimed=2**31 - 1)]), ("truncated",)),
    "legacy: negative values": Bad("s.dat", legacy([entry(claimed=-1)]), ("claims",)),
    "legacy: twice": Bad("s.dat", legacy([entry(), entry()]), ("twice",)),
    "legacy: of another model": Bad("s.dat", legacy([entry(values=63)])),
}
