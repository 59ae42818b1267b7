"""GGUF files that qtool did not write: by the gguf package, and by hand."""

import struct
from dataclasses import dataclass, field

import gguf
import numpy as np

NUMBERS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7}
NUMBERS |= {"string": 8, "array": 9, "u64": 10, "i64": 11, "f64": 12}


def string(raw):
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, payload):
    """One entry of the metadata: `payload` are the bytes of its value."""
    number = NUMBERS.get(kind, kind)
    return string(name) + struct.pack("<I", number) + payload


def array(kind, count, payload):
    return struct.pack("<IQ", NUMBERS.get(kind, kind), count) + payload


def tensor(name, dimensions, number, offset):
    """One tensor's entry, dimensions as stored: columns first."""
    rank = len(dimensions)
    return string(name) + struct.pack(f"<I{rank}QIQ", rank, *dimensions, number, offset)


@dataclass
class ByHand:
    """A file whose every field can be wrong."""

    keys: list = field(default_factory=list)
    tensors: list = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    alignment: int = 32

    @property
    def content(self):
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        head = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys)
        head += b"".join([*self.keys, *self.tensors])
        return head + bytes(-len(head) % self.alignment) + self.data

    def at(self, path):
        path.write_bytes(self.content)
        return path


def small():
    """A file with a bit of everything."""
    return ByHand(
        keys=[
            key("general.architecture", "string", string("llama")),
            key("llama.block_count", "u32", struct.pack("<I", 2)),
            key("flag", "bool", b"\1"),
            key("half", "f64", struct.pack("<d", 0.5)),
            key("tokenizer.ggml.tokens", "array", array("string", 2, string("a") + string("é"))),
            key("scores", "array", array("f32", 2, struct.pack("<2f", -1.0, 2.5))),
        ],
        tensors=[tensor("a.weight", (32, 3), 8, 0), tensor("b", (5,), 0, 128)],
        data=bytes(range(128)) + struct.pack("<5f", 1, 2, 3, 4, 5),
    )


LLAMA = {"layers": 2, "hidden": 64, "inner": 96, "vocabulary": 40}


def llama_keys():
    """(method of GGUFWriter, arguments) for the smallest model that llama.cpp runs."""
    n = LLAMA["vocabulary"]
    return [
        ("add_name", "Tiny"),
        ("add_type", "model"),
        ("add_block_count", LLAMA["layers"]),
        ("add_context_length", 64),
        ("add_embedding_length", LLAMA["hidden"]),
        ("add_feed_forward_length", LLAMA["inner"]),
        ("add_head_count", 4),
        ("add_head_count_kv", 2),
        ("add_layer_norm_rms_eps", 2.0**-17),  # exact in 32 bits
        ("add_rope_dimension_count", 16),
        ("add_tokenizer_model", "llama"),
        ("add_token_list", ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(n - 3))]),
        ("add_token_scores", [0.0] * n),
        ("add_token_types", [2, 3, 3] + [1] * (n - 3)),
        ("add_bos_token_id", 1),
        ("add_eos_token_id", 2),
        ("add_chat_template", "{{ messages }}"),
    ]


def llama_weights(seed=0, *, tied=False):
    """Name -> float32 array."""
    random = np.random.default_rng(seed)
    hidden, inner, vocabulary = LLAMA["hidden"], LLAMA["inner"], LLAMA["vocabulary"]
    shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (vocabulary, hidden)
    for i in range(LLAMA["layers"]):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (hidden, hidden),
            f"blk.{i}.attn_k.weight": (hidden // 2, hidden),
            f"blk.{i}.attn_v.weight": (hidden // 2, hidden),
            f"blk.{i}.attn_output.weight": (hidden, hidden),
            f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.ffn_gate.weight": (inner, hidden),
            f"blk.{i}.ffn_up.weight": (inner, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, inner),
        }
    made = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        made[name] = values if len(shape) == 1 else values * np.float32(0.2)
    return made


def by_package(path, weights, keys=None, architecture="llama", types=None, **settings):
    """A file as the gguf package writes it; `types`: name -> type to quantize to."""
    writer = gguf.GGUFWriter(str(path), architecture, **settings)
    for method, *arguments in llama_keys() if keys is None else keys:
        getattr(writer, method)(*arguments)
    for name, values in weights.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
