"""Configurations that no honest model has: how to spoil a directory, and who has to refuse it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONFIG = "config.json"
EVERY = ("inspect", "estimate-memory", "calibrate", "quantize", "export", "eval")
# Those that compute or write something by what the files say; inspect only tells of it.
WORKING = EVERY[1:]
READING_WEIGHTS = EVERY[2:]


@dataclass(frozen=True)
class Hostile:
    """One way to spoil a sound model directory.

    Args:
        spoil: does it, given the directory.
        words: the refusal has to hold one of each; "a|b" is a choice.
        refused_by: commands that must refuse it; the others may do either, cleanly.
        base: which of the sound models.
    """

    spoil: Callable[[Path], object]
    words: tuple[str, ...]
    refused_by: tuple[str, ...] = EVERY
    base: str = "llama"


GONE = object()


def edit(directory, changes, name=CONFIG):
    """Set keys of a JSON file; dotted ones inside a section; GONE removes one."""
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        if value is GONE:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def edited(**changes):
    """A config.json with other values."""
    return lambda directory: edit(directory, {k.replace("__", "."): v for k, v in changes.items()})


def written(content, name=CONFIG):
    """A file with this content."""
    raw = content if isinstance(content, bytes) else content.encode()

    def spoil(directory):
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(raw)

    return spoil


def replaced(name, make):
    """Something else than a file under a file's name."""

    def spoil(directory):
        (directory / name).unlink(missing_ok=True)
        make(directory / name)

    return spoil


def raw_number(key, text):
    """A number that Python's writer would not write as it stands."""

    def spoil(directory):
        edit(directory, {key: "PUT IT HERE"})
        path = directory / CONFIG
        path.write_text(path.read_text().replace('"PUT IT HERE"', text))

    return spoil


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
NO_SIZE = {
    "minus one": "-1",
    "zero": "0",
    "a fraction": "1.5",
    "text": '"64"',
    "true": "true",
    "a list": "[]",
    "an object": "{}",
    "1e30": "1e30",
    "ten to the thirty": "1" + "0" * 30,
    "two to the 63": str(2**63),
    "NaN": "NaN",
    "infinity": "Infinity",
    "minus zero": "-0.0",
}
NO_REAL = {
    "negative": "-1e-5",
    "text": '"1e-6"',
    "true": "true",
    "a list": "[1]",
    "an object": '{"a": 1}',
    "1e300": "1e300",
    "NaN": "NaN",
    "infinity": "-Infinity",
    "huge": "1" + "0" * 400,
}
REALS = ("rms_norm_eps", "rope_parameters.rope_theta")

CONFIGS: dict[str, Hostile] = {}
for _key in SIZES:
    for _name, _text in NO_SIZE.items():
        CONFIGS[f"{_key} is {_name}"] = Hostile(raw_number(_key, _text), (CONFIG, _key))
for _key in REALS:
    for _name, _text in NO_REAL.items():
        CONFIGS[f"{_key} is {_name}"] = Hostile(
            raw_number(_key, _text), (CONFIG, _key.rpartition(".")[2]), READING_WEIGHTS
        )

# Numbers that a model may have, but not one of these weights.
for _key, _values in {
    "hidden_size": (32, 128, 65),
    "intermediate_size": (159, 161, 320),
    "num_hidden_layers": (3, 500),
    "num_attention_heads": (1, 3, 5, 8, 64),
    "num_key_value_heads": (1, 3, 4),
    "head_dim": (8, 15, 32),
    "vocab_size": (299, 301, 1 << 20),
}.items():
    for _value in _values:
        CONFIGS[f"{_key} of another model: {_value}"] = Hostile(
            edited(**{_key: _value}),
            (f"{CONFIG}|.safetensors", "tensor|blocks|head|layers"),
            WORKING,
        )

CONFIGS |= {
    "empty": Hostile(written(""), (CONFIG, "JSON")),
    "spaces": Hostile(written(" " * 100), (CONFIG, "JSON")),
    "cut short": Hostile(
        lambda d: (d / CONFIG).write_text((d / CONFIG).read_text()[:100]), (CONFIG, "JSON")
    ),
    "a list": Hostile(written("[]"), (CONFIG, "object")),
    "a word": Hostile(written('"llama"'), (CONFIG, "object")),
    "null": Hostile(written("null"), (CONFIG, "object")),
    "two objects": Hostile(written("{}{}"), (CONFIG, "JSON")),
    "YAML": Hostile(written("model_type: llama\n"), (CONFIG, "JSON")),
    "byte order mark": Hostile(
        lambda d: (d / CONFIG).write_bytes(b"\xef\xbb\xbf" + (d / CONFIG).read_bytes()),
        (CONFIG,),
        (),
    ),
    "UTF-16": Hostile(
        lambda d: (d / CONFIG).write_text((d / CONFIG).read_text(), encoding="utf-16"),
        (CONFIG, "UTF-8", "byte 0"),
    ),
    "not UTF-8": Hostile(written(b'{"a": "\xff"}'), (CONFIG, "UTF-8", "byte 7")),
    "surrogates alone": Hostile(edited(model_type="\ud800"), (r"\ud800",), READING_WEIGHTS),
    "a zero byte": Hostile(written(b'{"a": 1}\x00'), (CONFIG, "JSON")),
    "nested lists": Hostile(written("[" * 200_000), (CONFIG, "nested|JSON")),
    "nested objects": Hostile(written('{"a":' * 200_000), (CONFIG, "nested|JSON")),
    "nested well-formed": Hostile(
        written('{"model_type":"llama","num_hidden_layers":1,"x":' + "[" * 900 + "]" * 900 + "}"),
        (CONFIG,),
    ),
    "20 MB": Hostile(written("{" + " " * (20 << 20) + "}"), (CONFIG, "bytes")),
    "a million keys": Hostile(
        written("{" + ",".join(f'"{n}":[]' for n in range(1_000_000)) + "}"), (CONFIG,)
    ),
    "a key twice": Hostile(
        lambda d: (d / CONFIG).write_text('{"model_type":"llama",' + (d / CONFIG).read_text()[1:]),
        (CONFIG, "twice"),
    ),
    "a number of 5000 digits": Hostile(raw_number("hidden_size", "9" * 5000), (CONFIG,)),
    "no model_type": Hostile(edited(model_type=GONE), (CONFIG, "model_type")),
    "model_type is a number": Hostile(edited(model_type=5), (CONFIG, "model_type")),
    "model_type is a list": Hostile(edited(model_type=["llama"]), (CONFIG, "model_type")),
    "model_type is unknown": Hostile(
        edited(model_type="no_such_model"), ("no_such_model",), READING_WEIGHTS
    ),
    "model_type with escapes": Hostile(
        edited(model_type="\x1b]52;c;ZXZpbA==\x07\u202e"), (r"\x1b]52",), READING_WEIGHTS
    ),
    "model_type of a megabyte": Hostile(
        edited(model_type="x" * (1 << 20)), ("xxx",), READING_WEIGHTS
    ),
    "model_type with newlines": Hostile(edited(model_type="a\nerror: b"), ("a",), READING_WEIGHTS),
    "no layers": Hostile(edited(num_hidden_layers=GONE), (CONFIG, "num_hidden_layers")),
    "layers are null": Hostile(edited(num_hidden_layers=None), (CONFIG, "num_hidden_layers")),
    "no hidden_size": Hostile(edited(hidden_size=GONE), (CONFIG, "hidden_size"), WORKING),
    "no heads": Hostile(edited(num_attention_heads=GONE), (CONFIG, "num_attention_heads"), WORKING),
    "no vocab_size": Hostile(edited(vocab_size=GONE), (CONFIG, "vocab_size"), WORKING),
    "no intermediate_size": Hostile(
        edited(intermediate_size=GONE), (CONFIG, "intermediate_size"), WORKING
    ),
    "key-value heads null": Hostile(
        edited(num_key_value_heads=None), (CONFIG + "|.safetensors",), WORKING
    ),
    "unknown activation": Hostile(
        edited(hidden_act="evil"), (CONFIG, "hidden_act"), READING_WEIGHTS
    ),
    "activation is code": Hostile(
        edited(hidden_act="__import__('os').system('touch MARKER')"),
        (CONFIG, "hidden_act"),
        READING_WEIGHTS,
    ),
    "activation is a list": Hostile(
        edited(hidden_act=[1]), (CONFIG, "hidden_act"), READING_WEIGHTS
    ),
    "tied is text": Hostile(edited(tie_word_embeddings="no"), (CONFIG, "tie_word_embeddings")),
    "tied is 2": Hostile(edited(tie_word_embeddings=2), (CONFIG, "tie_word_embeddings")),
    "attention_bias without biases": Hostile(
        edited(attention_bias=True), (f"{CONFIG}|.safetensors", "bias"), WORKING
    ),
    "mlp_bias without biases": Hostile(
        edited(mlp_bias=True), (f"{CONFIG}|.safetensors", "bias"), WORKING
    ),
    "attention_bias is text": Hostile(
        edited(attention_bias="x"), (CONFIG, "attention_bias"), WORKING
    ),
    "rope is text": Hostile(edited(rope_parameters="yes"), (CONFIG, "rope"), READING_WEIGHTS),
    "rope is a list": Hostile(edited(rope_parameters=[1]), (CONFIG, "rope"), READING_WEIGHTS),
    "rope of an unknown type": Hostile(
        edited(rope_parameters={"rope_type": "evil", "rope_theta": 1e4}),
        (CONFIG, "rope"),
        READING_WEIGHTS,
    ),
    "rope without its factor": Hostile(
        edited(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        (CONFIG, "factor|rope"),
        READING_WEIGHTS,
    ),
    "rope with factor zero": Hostile(
        edited(rope_parameters={"rope_type": "linear", "factor": 0, "rope_theta": 1e4}),
        (CONFIG, "factor|rope"),
        READING_WEIGHTS,
    ),
    "rope with a negative factor": Hostile(
        edited(rope_parameters={"rope_type": "linear", "factor": -4.0, "rope_theta": 1e4}),
        (CONFIG, "factor|rope"),
        READING_WEIGHTS,
    ),
    "rope_theta zero": Hostile(
        edited(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        (CONFIG, "rope"),
        READING_WEIGHTS,
    ),
    "rope with short factors": Hostile(
        edited(
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0],
                "long_factor": [1.0] * 8,
                "original_max_position_embeddings": 64,
            }
        ),
        (CONFIG, "factor"),
        READING_WEIGHTS,
    ),
    "layer_types too short": Hostile(
        edited(layer_types=["full_attention"]), (CONFIG, "layer_types"), READING_WEIGHTS
    ),
    "layer_types unknown": Hostile(
        edited(layer_types=["evil", "evil"]), (CONFIG, "layer_types"), READING_WEIGHTS
    ),
    "sliding attention without a window": Hostile(
        edited(layer_types=["full_attention", "sliding_attention"], sliding_window=None),
        (CONFIG, "sliding_window"),
        READING_WEIGHTS,
    ),
    "weights that link out": Hostile(
        lambda d: (
            (d / "model.safetensors").rename(d.parent / "other.safetensors"),
            (d / "model.safetensors").symlink_to("../other.safetensors"),
        ),
        ("model.safetensors", "link"),
    ),
    "weights that link to nothing": Hostile(
        replaced("model.safetensors", lambda p: p.symlink_to("nowhere")),
        ("model.safetensors", "link"),
    ),
    "a shard of an endless name": Hostile(
        lambda d: (
            (d / "model.safetensors").unlink(),
            edit(
                d,
                {"weight_map": {"model.norm.weight": f"{'x' * 300}.safetensors"}},
                "model.safetensors.index.json",
            ),
        ),
        ("model.safetensors.index.json", "xxx"),
    ),
    "an index that links out": Hostile(
        lambda d: (
            (d / "model.safetensors").rename(d / "one.safetensors"),
            (d.parent / "index.json").write_text("{}"),
            (d / "model.safetensors.index.json").symlink_to("../index.json"),
        ),
        ("model.safetensors.index.json", "link"),
    ),
    "dtype unknown": Hostile(edited(dtype="float7"), (CONFIG, "dtype"), READING_WEIGHTS),
    "dtype is a number": Hostile(edited(dtype=16), (CONFIG, "dtype"), READING_WEIGHTS),
    "architectures is a number": Hostile(edited(architectures=5), (CONFIG, "architectures"), ()),
    "architectures of objects": Hostile(edited(architectures=[{}]), (CONFIG, "architectures"), ()),
    "architectures of another family": Hostile(
        edited(architectures=["EvilForCausalLM"]), (CONFIG, "architectures"), ()
    ),
    "quantized by a word": Hostile(
        edited(quantization_config="gptq"), (CONFIG, "quantization_config")
    ),
    "quantized by an unknown method": Hostile(
        edited(quantization_config={"quant_method": "evil"}), ("evil",), READING_WEIGHTS
    ),
    "quantized, but not": Hostile(
        edited(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}),
        ("quantized|.safetensors",),
        READING_WEIGHTS,
    ),
    "token ids beyond the vocabulary": Hostile(edited(bos_token_id=10**9), (CONFIG,), ()),
    "token ids of text": Hostile(edited(eos_token_id="x"), (CONFIG,), ()),
    "token ids of objects": Hostile(edited(eos_token_id={"a": 1}), (CONFIG,), ()),
    "negative token ids": Hostile(edited(eos_token_id=-5), (CONFIG,), ()),
    "pad id beyond": Hostile(edited(pad_token_id=300), (CONFIG, "pad_token_id"), ()),
    "dropout of a hundred": Hostile(edited(attention_dropout=100), (CONFIG,), ()),
    "a key that is a method": Hostile(edited(to_dict=1, from_dict=[1]), (CONFIG,), ()),
    "use_cache is a list": Hostile(edited(use_cache=[1]), (CONFIG,), ()),
    "text_config nested": Hostile(
        edited(text_config={"hidden_size": -1, "num_hidden_layers": 10**9}), (CONFIG, "text_config")
    ),
    "transformers_version is code": Hostile(edited(transformers_version="9999; rm -rf"), (), ()),
    "torch_dtype old style": Hostile(
        edited(torch_dtype="evil", dtype=GONE), (CONFIG, "dtype"), READING_WEIGHTS
    ),
    "a directory": Hostile(replaced(CONFIG, lambda p: p.mkdir()), (CONFIG, "not a file")),
    "a pipe": Hostile(replaced(CONFIG, os.mkfifo), (CONFIG, "not a file")),
    "a device": Hostile(replaced(CONFIG, lambda p: p.symlink_to("/dev/zero")), (CONFIG,)),
    "a loop of links": Hostile(replaced(CONFIG, lambda p: p.symlink_to(p)), (CONFIG,)),
    "a link to nothing": Hostile(replaced(CONFIG, lambda p: p.symlink_to("nowhere")), (CONFIG,)),
}
CODE = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", None],
}
