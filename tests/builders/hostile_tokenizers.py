"""Tokenizer, template and other small files that no honest model has."""

import os
import pickle

from builders.hostile_configs import (
    CODE,
    GONE,
    READING_WEIGHTS,
    Hostile,
    edit,
    edited,
    replaced,
    written,
)

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
GENERATION, SPECIAL = "generation_config.json", "special_tokens_map.json"
TOKENIZING = ("calibrate", "quantize", "export", "eval")
EVIL = "import pathlib\npathlib.Path('MARKER').touch()\nclass EvilTokenizer: pass\n"


class Bomb:
    """A pickle that leaves a mark where it is opened."""

    def __reduce__(self):
        return os.mkdir, ("MARKER",)


def tokenizer(**changes):
    """A tokenizer.json with other values."""
    return lambda d: edit(d, {k.replace("__", "."): v for k, v in changes.items()}, TOKENIZER)


def settings(**changes):
    """A tokenizer_config.json with other values."""
    return lambda d: edit(d, changes, SETTINGS)


def cut(name, length=50):
    """A file that ends too early."""
    return lambda d: (d / name).write_bytes((d / name).read_bytes()[:length])


def all_of(*spoils):
    """Several at once."""

    def spoil(directory):
        for one in spoils:
            one(directory)

    return spoil


def pickles(directory):
    """Pickles under every name that a library might open."""
    raw = pickle.dumps(Bomb())
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "tokenizer.pkl",
        "vocab.pkl",
        "vocab.bin",
        "added_tokens.pickle",
        "model.ckpt",
        "tf_model.h5",
    ):
        (directory / name).write_bytes(raw)


def programs(directory):
    """Modules under every name that a library might import."""
    for name in (
        "evil",
        "modeling_llama",
        "configuration_llama",
        "tokenization_llama",
        "tokenizer",
        "__init__",
        "setup",
        "conftest",
        "sitecustomize",
        "vocab",
        "torch",
        "tokenizers",
        "json",
    ):
        (directory / f"{name}.py").write_text(EVIL)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TOKENIZERS: dict[str, Hostile] = {
    "tokenizer empty": Hostile(written("", TOKENIZER), (TOKENIZER,), TOKENIZING),
    "tokenizer cut short": Hostile(cut(TOKENIZER), (TOKENIZER,), TOKENIZING),
    "tokenizer a list": Hostile(written("[]", TOKENIZER), (TOKENIZER,), TOKENIZING),
    "tokenizer null": Hostile(written("null", TOKENIZER), (TOKENIZER,), TOKENIZING),
    "tokenizer empty object": Hostile(written("{}", TOKENIZER), (TOKENIZER,), TOKENIZING),
    "tokenizer not UTF-8": Hostile(written(b'{"a":"\xff"}', TOKENIZER), (TOKENIZER,), TOKENIZING),
    "tokenizer nested": Hostile(written("[" * 100_000, TOKENIZER), (TOKENIZER,), TOKENIZING),
    "tokenizer of words": Hostile(tokenizer(model="BPE"), (TOKENIZER,), TOKENIZING),
    "tokenizer of an unknown type": Hostile(
        tokenizer(model__type="Evil"), (TOKENIZER,), TOKENIZING
    ),
    "tokenizer without vocabulary": Hostile(tokenizer(model__vocab=GONE), (TOKENIZER,), TOKENIZING),
    "vocabulary a list": Hostile(tokenizer(model__vocab=[1]), (TOKENIZER,), TOKENIZING),
    "vocabulary of floats": Hostile(tokenizer(model__vocab={"a": 1.5}), (TOKENIZER,), TOKENIZING),
    "vocabulary of negative ids": Hostile(
        tokenizer(model__vocab={"a": -1}), (TOKENIZER,), TOKENIZING
    ),
    "vocabulary beyond the embedding": Hostile(
        lambda d: edit(d, {"model.vocab.a": 299_999}, TOKENIZER), (TOKENIZER,), TOKENIZING
    ),
    "vocabulary id of 64 bits": Hostile(
        lambda d: edit(d, {"model.vocab.a": 2**63}, TOKENIZER), (TOKENIZER,), TOKENIZING
    ),
    "an id twice": Hostile(
        lambda d: edit(d, {"model.vocab.b": 5, "model.vocab.c": 5}, TOKENIZER),
        (TOKENIZER,),
        ("export",),
    ),
    "merges of unknown tokens": Hostile(
        tokenizer(model__merges=["zz yy"]), (TOKENIZER,), TOKENIZING
    ),
    "merges of numbers": Hostile(tokenizer(model__merges=[1, 2]), (TOKENIZER,), TOKENIZING),
    "merges of three": Hostile(
        tokenizer(model__merges=[["a", "b", "c"]]), (TOKENIZER,), TOKENIZING
    ),
    "text doubled sixty times": Hostile(
        tokenizer(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 60}),
        (TOKENIZER,),
        TOKENIZING,
    ),
    "five thousand steps before every text": Hostile(
        tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 5000}),
        (TOKENIZER, "5000"),
        TOKENIZING,
    ),
    "no tokens at all": Hostile(
        tokenizer(model__vocab={}, model__merges=[], added_tokens=[], post_processor=None),
        (TOKENIZER,),
        TOKENIZING,
    ),
    "a megabyte before every text": Hostile(
        tokenizer(normalizer={"type": "Prepend", "prepend": "a" * 1_000_000}),
        (TOKENIZER,),
        TOKENIZING,
    ),
    "a pattern that backtracks": Hostile(
        tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(a+)+b|(.+)+Z"},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        (TOKENIZER,),
        ("export",),
    ),
    "a pattern that is none": Hostile(
        tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(((("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        (TOKENIZER,),
        TOKENIZING,
    ),
    "an unknown pre-tokenizer": Hostile(
        tokenizer(pre_tokenizer={"type": "Evil"}), (TOKENIZER,), TOKENIZING
    ),
    "a broken character map": Hostile(
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "////"}),
        (TOKENIZER,),
        TOKENIZING,
    ),
    "padding to a terabyte": Hostile(
        tokenizer(
            padding={
                "strategy": {"Fixed": 10**12},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<eos>",
            }
        ),
        (),
        (),
    ),
    "truncation to nothing": Hostile(
        tokenizer(
            truncation={
                "max_length": 0,
                "strategy": "LongestFirst",
                "stride": 0,
                "direction": "Right",
            }
        ),
        (),
        (),
    ),
    "added tokens of numbers": Hostile(tokenizer(added_tokens=[1]), (TOKENIZER,), TOKENIZING),
    "an added token without content": Hostile(
        tokenizer(added_tokens=[{"id": 5}]), (TOKENIZER,), TOKENIZING
    ),
    "an added token far beyond": Hostile(
        tokenizer(
            added_tokens=[
                {
                    "id": 10**9,
                    "content": "the",
                    "special": False,
                    "normalized": False,
                    "lstrip": False,
                    "rstrip": False,
                    "single_word": False,
                }
            ]
        ),
        (),
        (),
    ),
    "an empty added token": Hostile(
        tokenizer(
            added_tokens=[
                {
                    "id": 257,
                    "content": "",
                    "special": True,
                    "normalized": False,
                    "lstrip": False,
                    "rstrip": False,
                    "single_word": False,
                }
            ]
        ),
        (),
        (),
    ),
    "no tokenizer": Hostile(
        lambda d: (d / TOKENIZER).unlink(), ("tokenizer",), ("calibrate", "export", "eval")
    ),
    "a tokenizer that is a directory": Hostile(
        replaced(TOKENIZER, lambda p: p.mkdir()), (TOKENIZER,), TOKENIZING
    ),
    "a tokenizer that is a pipe": Hostile(replaced(TOKENIZER, os.mkfifo), (TOKENIZER,), TOKENIZING),
    "a tokenizer that links out": Hostile(
        replaced(TOKENIZER, lambda p: p.symlink_to("/etc/passwd")), (TOKENIZER, "link")
    ),
    "a licence that links out": Hostile(
        lambda d: (d / "LICENSE").symlink_to("/etc/passwd"), ("LICENSE", "link")
    ),
    "a licence that links to itself": Hostile(
        lambda d: (d / "LICENSE").symlink_to("LICENSE"), (), ()
    ),
    "a licence without end": Hostile(
        lambda d: (
            (d / "LICENSE").write_bytes(b""),
            os.truncate(d / "LICENSE", 1 << 40),
        ),
        ("LICENSE", "bytes"),
    ),
    "templates in a directory elsewhere": Hostile(
        lambda d: (
            (d.parent / "elsewhere").mkdir(),
            (d.parent / "elsewhere" / "x.jinja").write_text("secret"),
            (d / "additional_chat_templates").symlink_to(d.parent / "elsewhere"),
        ),
        ("x.jinja", "link"),
    ),
    "settings cut short": Hostile(cut(SETTINGS), (SETTINGS, "JSON"), ("inspect", *TOKENIZING)),
    "settings a list": Hostile(written("[]", SETTINGS), (SETTINGS, "object"), TOKENIZING),
    "settings a key twice": Hostile(
        written('{"bos_token":"a","bos_token":"b"}', SETTINGS), (SETTINGS, "twice"), TOKENIZING
    ),
    "settings that are code": Hostile(
        all_of(settings(auto_map=CODE), programs), (SETTINGS, "auto_map"), TOKENIZING
    ),
    "an unknown class": Hostile(
        all_of(settings(tokenizer_class="EvilTokenizer"), programs), (), ()
    ),
    "a class that is a path": Hostile(settings(tokenizer_class="../../evil.Tokenizer"), (), ()),
    "a class that is a number": Hostile(settings(tokenizer_class=5), (), ()),
    "special tokens of objects": Hostile(settings(eos_token={"a": {"b": 1}}), (), ()),
    "special tokens of lists": Hostile(settings(eos_token=[1, 2]), (), ()),
    "special tokens of numbers": Hostile(settings(eos_token=5), (), ()),
    "an unknown special token": Hostile(settings(eos_token="<nowhere>"), (), ()),
    "special tokens with escapes": Hostile(settings(eos_token="\x1b]0;x\x07"), (), ()),
    "a maximum that is text": Hostile(
        settings(model_max_length="x"), (SETTINGS, "model_max_length"), TOKENIZING
    ),
    "a negative maximum": Hostile(settings(model_max_length=-1), (), ()),
    "a decoder of nonsense": Hostile(settings(added_tokens_decoder={"x": 1}), (), ()),
    "a decoder far beyond": Hostile(
        settings(added_tokens_decoder={"999999999": {"content": "the", "special": False}}), (), ()
    ),
    "extra tokens of numbers": Hostile(settings(additional_special_tokens=[1, 2]), (), ()),
    "generation cut short": Hostile(
        cut(GENERATION), (GENERATION, "JSON"), ("inspect", *TOKENIZING)
    ),
    "generation a list": Hostile(
        written("[]", GENERATION), (GENERATION,), ("inspect", *TOKENIZING)
    ),
    "generation of nonsense": Hostile(
        written('{"eos_token_id": {"a": [1]}, "temperature": "x"}', GENERATION), (), ()
    ),
    "special map cut short": Hostile(written("{", SPECIAL), (SPECIAL, "JSON"), TOKENIZING),
    "special map of nonsense": Hostile(written('{"eos_token": [[1]]}', SPECIAL), (), ()),
    "added tokens a list": Hostile(
        written("[1]", "added_tokens.json"), ("added_tokens.json",), TOKENIZING
    ),
    "a template that is not closed": Hostile(written("{% for", "chat_template.jinja"), (), ()),
    "a template that is not UTF-8": Hostile(written(b"\xff\xfe", "chat_template.jinja"), (), ()),
    "a template without end": Hostile(
        written(
            "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
            "chat_template.jinja",
        ),
        (),
        (),
    ),
    "a template that escapes": Hostile(
        written(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os"
            ".mkdir('MARKER') }}",
            "chat_template.jinja",
        ),
        (),
        (),
    ),
    "a template of numbers": Hostile(settings(chat_template=5), (), ()),
    "templates of nonsense": Hostile(settings(chat_template=[{"x": 1}, 5]), (), ()),
    "a template that is a directory": Hostile(
        lambda d: (d / "chat_template.jinja").mkdir(), (), ()
    ),
    "a template that is a pipe": Hostile(lambda d: os.mkfifo(d / "chat_template.jinja"), (), ()),
    "pickles beside the weights": Hostile(pickles, (), ()),
    "programs beside the weights": Hostile(programs, (), ()),
    "code in the configuration": Hostile(
        all_of(edited(auto_map=CODE), programs), ("config.json", "auto_map"), READING_WEIGHTS
    ),
    "only pickles": Hostile(
        all_of(pickles, lambda d: (d / "model.safetensors").unlink()),
        ("only pickle weights",),
        ("inspect", *READING_WEIGHTS),
    ),
}
