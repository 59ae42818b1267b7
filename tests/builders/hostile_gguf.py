"""GGUF files whose parts contradict each other, each field well-formed by itself."""

import os
import struct

from builders.hostile_configs import Hostile

from qtool.checkpoint.gguf_bytes import key_entry
from qtool.checkpoint.gguf_header import read_gguf
from qtool.checkpoint.gguf_values import Value
from qtool.ggml_types import GGML_TYPES

FILE = "model.gguf"
READING = ("inspect", "estimate-memory", "export", "restore", "eval")
USING = ("export", "restore", "eval")


def rewritten(keys=None, tensors=None, *, drop=(), order=None, tail=b""):
    """The file with other keys (None removes one) and other entries of tensors.

    Args:
        keys: key -> Value or None.
        tensors: name -> what replaces (name, shape, type, offset).
        drop: names of tensors left out.
    """

    def spoil(directory):
        path = directory / FILE
        found = read_gguf(path)
        data = path.read_bytes()[found.data_start :]
        metadata = dict(found.metadata)
        for key, value in (keys or {}).items():
            metadata.pop(key, None)
            if value is not None:
                metadata[key] = value
        entries = []
        for ref in found.tensors:
            if ref.name in drop:
                continue
            entry = {
                "name": ref.name,
                "shape": ref.shape,
                "kind": GGML_TYPES[ref.dtype].number,
                "offset": ref.start - found.data_start,
            }
            entries.append(entry | (tensors or {}).get(ref.name, {}))
        head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata))
        head += b"".join(key_entry(key, value) for key, value in metadata.items())
        for entry in entries:
            name, shape = entry["name"].encode(), entry["shape"]
            head += struct.pack("<Q", len(name)) + name
            head += struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            head += struct.pack("<IQ", entry["kind"], entry["offset"])
        alignment = 32
        path.write_bytes(head + bytes(-len(head) % alignment) + data + tail)

    return spoil


def u32(number):
    return Value("u32", number)


def f32(number):
    return Value("f32", number)


def text(content):
    return Value("string", content)


def many(kind, content):
    return Value(kind, tuple(content), array=True)


def patched(*places):
    """The file with some bytes replaced: (offset, bytes)."""

    def spoil(directory):
        raw = bytearray((directory / FILE).read_bytes())
        for offset, content in places:
            raw[offset : offset + len(content)] = content
        (directory / FILE).write_bytes(raw)

    return spoil


def cut(length):
    return lambda d: (d / FILE).write_bytes((d / FILE).read_bytes()[:length])


def other(make):
    def spoil(directory):
        (directory / FILE).unlink()
        make(directory / FILE)

    return spoil


TOKENS = [f"t{n}" for n in range(300)]
BASE = "gguf"


def bad(spoil, *words, by=READING):
    return Hostile(spoil, (FILE, *words), by, BASE)


PARTS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
PARTS += ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
EVERY_TENSOR = {f"blk.{block}.{part}.weight" for block in range(2) for part in PARTS}
EVERY_TENSOR |= {"token_embd.weight", "output.weight", "output_norm.weight"}
GGUFS: dict[str, Hostile] = {
    "empty": bad(cut(0)),
    "three bytes": bad(cut(3)),
    "the magic alone": bad(cut(4)),
    "cut in the counts": bad(cut(20)),
    "cut in a key": bad(cut(40), "truncated"),
    "cut in the tokens": bad(cut(1500), "truncated"),
    "cut in the data": bad(lambda d: os.truncate(d / FILE, (d / FILE).stat().st_size - 1)),
    "version 0": bad(patched((4, struct.pack("<I", 0))), "version"),
    "version 1": bad(patched((4, struct.pack("<I", 1))), "version"),
    "version 4": bad(patched((4, struct.pack("<I", 4))), "version"),
    "big-endian": bad(patched((4, struct.pack(">I", 3))), "big-endian"),
    "other magic": bad(patched((0, b"GGML")), "GGUF"),
    "2**63 tensors": bad(patched((8, struct.pack("<Q", 2**63))), "tensors"),
    "2**63 keys": bad(patched((16, struct.pack("<Q", 2**63))), "keys"),
    "one key more": bad(lambda d: _count(d, 16, 1)),
    "one tensor more": bad(lambda d: _count(d, 8, 1)),
    "a key of 2**62 bytes": bad(patched((24, struct.pack("<Q", 2**62))), "bytes"),
    "a directory": bad(other(lambda p: p.mkdir()), by=("export", "restore")),
    "a pipe": bad(other(os.mkfifo)),
    "zeros": bad(other(lambda p: p.write_bytes(bytes(1 << 20)))),
    "a terabyte of nothing": bad(lambda d: os.truncate(d / FILE, 1 << 40), by=()),
    "alignment 0": bad(rewritten({"general.alignment": u32(0)}), "alignment"),
    "alignment 3": bad(rewritten({"general.alignment": u32(3)}), "alignment"),
    "alignment 2**31": bad(rewritten({"general.alignment": u32(2**31)}), "alignment"),
    "alignment of text": bad(rewritten({"general.alignment": text("32")}), "alignment"),
    "no architecture": bad(rewritten({"general.architecture": None}), "architecture", by=USING),
    "architecture unknown": bad(
        rewritten({"general.architecture": text("evil")}), by=("restore", "eval")
    ),
    "architecture empty": bad(rewritten({"general.architecture": text("")}), by=USING),
    "architecture is a number": bad(rewritten({"general.architecture": u32(5)}), by=USING),
    "architecture with escapes": bad(
        rewritten({"general.architecture": text("\x1b]52;c;x\x07")}), by=("restore", "eval")
    ),
    "an adapter": bad(rewritten({"general.type": text("adapter")}), by=USING),
    "block_count 0": bad(rewritten({"llama.block_count": u32(0)}), by=("restore", "eval")),
    "block_count 1": bad(rewritten({"llama.block_count": u32(1)}), by=("restore", "eval")),
    "block_count 3": bad(rewritten({"llama.block_count": u32(3)}), by=("restore", "eval")),
    "block_count 2**32-1": bad(
        rewritten({"llama.block_count": u32(2**32 - 1)}), by=("restore", "eval")
    ),
    "block_count of text": bad(rewritten({"llama.block_count": text("2")}), by=("restore", "eval")),
    "no block_count": bad(rewritten({"llama.block_count": None}), by=("restore", "eval")),
    "head_count 0": bad(rewritten({"llama.attention.head_count": u32(0)}), by=("restore", "eval")),
    "head_count 3": bad(rewritten({"llama.attention.head_count": u32(3)}), by=("restore",)),
    "head_count 2**31": bad(
        rewritten({"llama.attention.head_count": u32(2**31)}), by=("restore", "eval")
    ),
    "head_count_kv 0": bad(
        rewritten({"llama.attention.head_count_kv": u32(0)}), by=("restore", "eval")
    ),
    "head_count_kv 3": bad(
        rewritten({"llama.attention.head_count_kv": u32(3)}), by=("restore", "eval")
    ),
    "head_count_kv a long list": bad(
        rewritten({"llama.attention.head_count_kv": many("u32", [2] * 600)}), by=("restore", "eval")
    ),
    "embedding_length 0": bad(
        rewritten({"llama.embedding_length": u32(0)}), by=("restore", "eval")
    ),
    "embedding_length 65": bad(
        rewritten({"llama.embedding_length": u32(65)}), by=("restore", "eval")
    ),
    "embedding_length huge": bad(
        rewritten({"llama.embedding_length": u32(2**32 - 32)}), by=("restore", "eval")
    ),
    "feed_forward_length 0": bad(
        rewritten({"llama.feed_forward_length": u32(0)}), by=("restore", "eval")
    ),
    "context_length 0": bad(rewritten({"llama.context_length": u32(0)}), by=("restore",)),
    "epsilon NaN": bad(
        rewritten({"llama.attention.layer_norm_rms_epsilon": f32(float("nan"))}), by=("restore",)
    ),
    "epsilon infinite": bad(
        rewritten({"llama.attention.layer_norm_rms_epsilon": f32(float("inf"))}), by=("restore",)
    ),
    "epsilon negative": bad(
        rewritten({"llama.attention.layer_norm_rms_epsilon": f32(-1.0)}), by=("restore",)
    ),
    "rope base 0": bad(rewritten({"llama.rope.freq_base": f32(0.0)}), by=("restore",)),
    "rope base NaN": bad(rewritten({"llama.rope.freq_base": f32(float("nan"))}), by=("restore",)),
    "rope dimensions odd": bad(rewritten({"llama.rope.dimension_count": u32(7)}), by=("restore",)),
    "rope dimensions huge": bad(
        rewritten({"llama.rope.dimension_count": u32(2**31)}), by=("restore", "eval")
    ),
    "experts of text": bad(
        rewritten({"llama.expert_count": text("x")}), "expert_count", by=("export",)
    ),
    "experts": bad(rewritten({"llama.expert_count": u32(2**31)}), by=("restore", "eval")),
    "no tokens": bad(rewritten({"tokenizer.ggml.tokens": None}), by=USING),
    "tokens are numbers": bad(
        rewritten({"tokenizer.ggml.tokens": many("u32", range(300))}), by=USING
    ),
    "too few tokens": bad(
        rewritten({"tokenizer.ggml.tokens": many("string", TOKENS[:5])}), by=USING
    ),
    "too many tokens": bad(
        rewritten({"tokenizer.ggml.tokens": many("string", [f"t{n}" for n in range(500)])}),
        by=USING,
    ),
    "too few types": bad(rewritten({"tokenizer.ggml.token_type": many("i32", [1, 1])}), by=USING),
    "types of text": bad(
        rewritten({"tokenizer.ggml.token_type": many("string", ["x"] * 300)}), by=USING
    ),
    "absurd types": bad(
        rewritten({"tokenizer.ggml.token_type": many("i32", [2**31 - 1] * 300)}), by=USING
    ),
    "too few scores": bad(rewritten({"tokenizer.ggml.scores": many("f32", [0.0])}), by=USING),
    "a token twice": bad(
        rewritten({"tokenizer.ggml.tokens": many("string", ["same"] * 300)}), by=("restore", "eval")
    ),
    "a token of a megabyte": bad(
        rewritten({"tokenizer.ggml.tokens": many("string", [*TOKENS[:299], "x" * (1 << 20)])}),
        by=(),
    ),
    "eos beyond": bad(rewritten({"tokenizer.ggml.eos_token_id": u32(10**9)}), "eos", by=USING),
    "bos beyond": bad(rewritten({"tokenizer.ggml.bos_token_id": u32(300)}), "bos", by=USING),
    "pad is text": bad(
        rewritten({"tokenizer.ggml.padding_token_id": text("x")}), "padding", by=USING
    ),
    "eos negative": bad(
        rewritten({"tokenizer.ggml.eos_token_id": Value("i32", -7)}), "eos", by=USING
    ),
    "an unknown tokenizer": bad(
        rewritten({"tokenizer.ggml.model": text("evil")}), by=("restore", "eval")
    ),
    "tokenizer is a number": bad(rewritten({"tokenizer.ggml.model": u32(1)}), by=USING),
    "no tokenizer": bad(rewritten({"tokenizer.ggml.model": None}), by=USING),
    "an unknown pre-tokenizer": bad(
        rewritten({"tokenizer.ggml.pre": text("evil")}), by=("restore", "eval")
    ),
    "merges of nonsense": bad(
        rewritten({"tokenizer.ggml.merges": many("string", ["nospace", "", " "])}), by=()
    ),
    "merges of numbers": bad(
        rewritten({"tokenizer.ggml.merges": many("u32", [1, 2])}), by=("export", "restore", "eval")
    ),
    "a template without end": bad(
        rewritten(
            {
                "tokenizer.chat_template": text(
                    "{% for a in range(99999) %}{% for b in range(99999) %}{{a}}{% endfor %}"
                    "{% endfor %}"
                )
            }
        ),
        by=(),
    ),
    "a template of a number": bad(rewritten({"tokenizer.chat_template": u32(1)}), by=USING),
    "a name with escapes": bad(
        rewritten({"general.name": text("\x1b[2J\x1b]8;;http://evil\x07\u202e\u200b")}), by=()
    ),
    "a licence of ten megabytes": bad(
        rewritten({"general.license": text("x" * (10 << 20))}), by=()
    ),
    "a description that is HTML": bad(
        rewritten({"general.description": text("<script>alert(1)</script>")}), by=()
    ),
    "a file type from nowhere": bad(rewritten({"general.file_type": u32(9999)}), by=()),
    "quantization_version text": bad(rewritten({"general.quantization_version": text("x")}), by=()),
    "no embedding": bad(rewritten(drop=("token_embd.weight",)), by=("restore", "eval")),
    "no head": bad(rewritten(drop=("output.weight",)), by=()),
    "no norm": bad(rewritten(drop=("output_norm.weight",)), by=("restore", "eval")),
    "a matrix missing": bad(rewritten(drop=("blk.1.ffn_up.weight",)), by=("restore", "eval")),
    "no tensors": bad(
        rewritten(drop=EVERY_TENSOR),
        by=USING,
    ),
    "a tensor of an unknown name": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"name": "evil"}}), by=("restore", "eval")
    ),
    "a tensor name with escapes": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"name": "\x1b[31mx\n"}}), by=("restore", "eval")
    ),
    "a tensor twice": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"name": "blk.1.ffn_gate.weight"}}), "twice"
    ),
    "a matrix transposed": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"shape": (64, 160)}}), by=("restore", "eval")
    ),
    "a matrix of one row less": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"shape": (159, 64)}}), by=("restore", "eval")
    ),
    "a vector for a matrix": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"shape": (10240,)}}), by=("restore", "eval")
    ),
    "four dimensions": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"shape": (1, 1, 160, 64)}}), by=("restore",)
    ),
    "five dimensions": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"shape": (1, 1, 1, 160, 64)}}), "dimensions"
    ),
    "a dimension of zero": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"shape": (0, 64)}}), "shape"
    ),
    "a product beyond 64 bits": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"shape": (2**40, 2**40)}}), "shape"
    ),
    "an embedding of other rows": bad(
        rewritten(tensors={"token_embd.weight": {"shape": (299, 64)}}), by=USING
    ),
    "an unknown type": bad(rewritten(tensors={"blk.1.ffn_up.weight": {"kind": 77}}), "type"),
    "a type that was removed": bad(rewritten(tensors={"blk.1.ffn_up.weight": {"kind": 4}}), "type"),
    "integers": bad(
        rewritten(tensors={"blk.1.ffn_norm.weight": {"kind": 24}}), by=("restore", "eval", "export")
    ),
    "an offset beyond": bad(rewritten(tensors={"blk.1.ffn_up.weight": {"offset": 2**62}})),
    "an offset that wraps": bad(rewritten(tensors={"blk.1.ffn_up.weight": {"offset": 2**64 - 32}})),
    "an offset between": bad(rewritten(tensors={"blk.1.ffn_up.weight": {"offset": 33}}), "offset"),
    "a type of fewer bytes": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"kind": 2}}), "begins at byte", by=USING
    ),
    "a shape of fewer bytes": bad(
        rewritten(tensors={"blk.1.ffn_up.weight": {"shape": (32, 64)}}), "begins at byte", by=USING
    ),
    "a matrix named as a bias": bad(
        rewritten(tensors={"blk.0.attn_q.weight": {"name": "blk.0.attn_q.bias"}}), "bias", by=USING
    ),
    "values of another size than keys": bad(
        rewritten({"llama.attention.value_length": u32(4)}), "value_length", by=("restore",)
    ),
    "an overlap": bad(rewritten(tensors={"blk.1.ffn_up.weight": {"offset": 0}}), "overlap"),
    "bytes behind": bad(rewritten(tail=b"evil" * 100), by=()),
    "split of one": bad(
        rewritten({"split.count": Value("u16", 3), "split.no": Value("u16", 0)}), "split"
    ),
    "split of text": bad(rewritten({"split.count": text("x")}), "split"),
}


def _count(directory, offset, more):
    raw = bytearray((directory / FILE).read_bytes())
    number = struct.unpack_from("<Q", raw, offset)[0] + more
    struct.pack_into("<Q", raw, offset, number)
    (directory / FILE).write_bytes(raw)
