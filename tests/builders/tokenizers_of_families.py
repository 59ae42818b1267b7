# ruff: noqa: RUF001 - texts of many scripts
"""Small tokenizers with the structure of real families, and texts on which tokenizers disagree.

The structures are those that the families' tokenizer.json files have; only the vocabulary is small.
It is learned from text that nothing splits, so that a piece cut in another place, by whoever reads
the structure otherwise, gives other tokens.
"""

from __future__ import annotations

import json
import re
import struct
from copy import deepcopy
from functools import cache
from pathlib import Path

import gguf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from qtool.calibration.builtin import builtin_pieces

SPACE = "▁"
SPECIAL = ("<bos>", "<eos>", "<turn>")
PLAIN = "<think>"
WORDS = (
    "The quick brown fox doesn't jump; HE'S asleep, they'LL wake it, I'M sure we'Ve a'lL seen it.",
    "'s 'S 't 'RE we're WE'RE l'd L'D it's'it rock'n'roll o'clock ''s '' '\n's",
    "CamelCase HTTPServer parseJSONFile iPhone eBay McDonald USA's NASAs aBcDeF ABCdef",
    "ÉCOLE école Über über naïve Ça ñandú ÑANDÚ straße STRASSE Œuvre œuvre İstanbul ısı",
    "Привет, МИР! Как дела? съешь ещё этих мягких французских булок. ΑΒΓ αβγδε Ώρα",
    "我想在apple工作1314151天～ 你好，世界！　全角　空格。",
    "日本語のテキスト、カタカナとひらがな。한국어 문장입니다.",
    "def f(x):\n\tif x:\n\t\treturn x ** 2  # comment\n\n\n    y = [i for i in z]\r\n\r\nx = 1\r\n",
    "#include <stdio.h>\nint main(void) {\n\n\treturn 0;\n}\n/* a/b/c */ // http://x.org/a?b=c&d=%20\n",
    "first.\n\nsecond:\n\nthird,\nfourth\n",
    "a  b   c    d     e      f          g\n \n  \n   \n\t\t\n \t x",
    " leading", "  two", "trailing ", "trailing  \n", "\n\n\nx", "x\n\n\n", " \n ", "\t\tx \t y",
    "1 12 123 1234 12345 123456 1234567 12345678 3.14159 1,000,000 0x1F 1e-10 v2.0.1 ½ ² ٣٤٥ Ⅻ",
    "...!!!??? ---===+++ (a)[b]{c} <d> $5.00 100% a@b.c #tag ~/x `code` \"q\" “q” «q» ¿q? … — –",
    "🚀 😶‍🌫️ 👨‍👩‍👧‍👦 👍🏽 🇨🇭 ❤️ ✅✅ a🚀b 1🚀2",
    "zero\u200bwidth nbsp\u00a0here em\u2003space line\u2028s bom\ufeffx soft\u00adhyphen \u200ex",
    "\x01\x02 bell\x07 esc\x1b[0m del\x7f \x85 next",
    "[PAD7] <0x41> <unk> \u2581under \u2581\u2581 </s> <s> \ufffd \U0010ffff \ue000",
    "", " ", "  ", "\n", "\r\n", "\r", "\t", "a", "'", "0", "é",
)  # fmt: skip
MARKED = (
    "e\u0301cole cafe\u0301 A\u030angstro\u0308m z\u0335a\u0335l\u0335g\u0335o\u0335",
    "ภาษาไทย ผู้ใหญ่หาผ้าใหม่ สวัสดีครับ",
    "हिन्दी में लिखा हुआ पाठ। नमस्ते दुनिया १२३",
    "مَرْحَبًا بِالعَالَمِ السلام عليكم ١٢٣ שָׁלוֹם עוֹלָם",
    "កាន់តែពិសេសអាច বাংলা ভাষা தமிழ்",
)
WITH_MARKS = (
    "<bos>text<eos>",
    "<turn>user\nHello there<turn>assistant\n<think>\nhm\n</think>  <eos>",
    "<think> <think><think>\n\n<turn> <turn>",
    "a<turn>b <turn> c",
)
RUNS = tuple(
    f"x{character * count}y{character * count}"
    for character in (" ", "\n", "\t", "=", "7", " \n")
    for count in (2, 3, 4, 5, 7, 9, 16, 17)
)
TEXTS = WORDS + WITH_MARKS + RUNS

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + TAIL
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + TAIL
QWEN35 = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LEAD = r"[^\r\n\p{L}\p{N}]?"
O200K_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{LEAD}{UPPER}*{LOWER}+|{LEAD}{UPPER}+{LOWER}*|\p{{N}}|{O200K_TAIL}"
GPT4O = (
    rf"{LEAD}{UPPER}*{LOWER}+{CONTRACTIONS}?|{LEAD}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{O200K_TAIL}"
)
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
JAIS2 = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)"
    + r"|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
    + r"|\s{1,2}(?!\S)|\s{1}"
)
SEED = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
LING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def digits(individual):
    return {"type": "Digits", "individual_digits": individual}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}
# Family -> (name in llama.cpp, pre_tokenizer, ignore_merges). Two learn from text split their own
# way: llama.cpp leaves pieces whole there, between whose parts these families have no merges.
BYTE_LEVEL = {
    "gpt-2": ("gpt-2", byte_level(True), False),
    "smollm": ("refact", sequence(digits(True), byte_level(True)), False),
    "llama-3": ("llama-bpe", sequence(split(LLAMA3), byte_level(False)), True),
    "olmo-2": ("dbrx", sequence(split(LLAMA3), byte_level(False)), False),
    "qwen-2": ("qwen2", sequence(split(QWEN2), byte_level(False)), False),
    "qwen-3.5": ("qwen35", sequence(split(QWEN35), byte_level(False)), False),
    "mistral-nemo": ("tekken", sequence(split(TEKKEN), byte_level(False)), True),
    "gpt-oss": ("gpt-4o", sequence(split(GPT4O), byte_level(False)), False),
    "deepseek-coder": (
        "deepseek-coder",
        sequence(
            split("[\r\n]"),
            split("\\s?\\p{L}+"),
            split("\\s?\\p{P}+"),
            split("[一-龥ࠀ-一가-퟿]+"),
            digits(True),
            byte_level(False),
        ),
        False,
    ),
    "deepseek-3": (
        "deepseek-v3",
        sequence(
            split("\\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK3), byte_level(False)
        ),
        False,
    ),
    "falcon": (
        "falcon",
        sequence(PUNCTUATION, byte_level(True), digits(False), split("[0-9][0-9][0-9]")),
        False,
    ),
    "bloom": ("bloom", sequence(split(BLOOM), byte_level(False)), False),
    "viking": ("viking", sequence(split(BLOOM), digits(True), byte_level(False)), False),
    "seed-coder": ("seed-coder", sequence(split(SEED), byte_level(False)), False),
    "ling": ("bailingmoe", sequence(split(LING), byte_level(False)), False),
    "jais-2": ("jais-2", sequence(split(JAIS2), byte_level(False)), False),
    "minicpm-5": (
        "minicpm5",
        sequence(
            split("\\p{N}{1,3}"),
            split(LLAMA3.replace("\\p{N}{1,3}", "\\p{N}+")),
            byte_level(False),
        ),
        True,
    ),
    "aya": (
        "tiny_aya",
        sequence(split("\\d{1,3}(?=(?:\\d{3})*\\b)"), split(GPT4O), byte_level(False)),
        False,
    ),
}
LEARNS_FROM_ITS_OWN_SPLITS = frozenset({"falcon"})

ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
# Family -> (normalizer, pre_tokenizer, is there a space before a text).
SPACED = {
    "llama-2": ({"type": "Sequence", "normalizers": [PREPEND, ESCAPE]}, None, True),
    "mistral-3": (None, {**METASPACE, "prepend_scheme": "first"}, True),
    "metaspace": (None, {**METASPACE, "prepend_scheme": "always"}, True),
    "gemma": (
        ESCAPE,
        {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        False,
    ),
}


@cache
def _corpus() -> tuple[str, ...]:
    return (
        *builtin_pieces("calibration", None)[:25],
        *WORDS * 4,
        *MARKED * 4,
        *RUNS,
        *["ÉCOLE NAÏVETÉ"] * 40,
    )


@cache
def _learned(structure: str) -> dict:
    """`model` of a byte-level tokenizer.json that was learned from the corpus, split as given."""
    tokenizer = Tokenizer(models.BPE())
    raw = json.loads(tokenizer.to_str()) | {"pre_tokenizer": json.loads(structure)}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=1400,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
            max_token_length=12,
        ),
    )
    return json.loads(tokenizer.to_str())["model"]


def template(before, ids):
    """A post-processor that puts tokens before every text."""
    marks = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*marks, one],
        "pair": [*marks, one, two],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in before
        },
    }  # fmt: skip


def added(token, number, **flags):
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    } | flags


def byte_level_json(family: str, *, bos: bool = True) -> dict:
    """tokenizer.json of a byte-level family, with three special tokens and one plain added one."""
    _, structure, ignore_merges = BYTE_LEVEL[family]
    own = family in LEARNS_FROM_ITS_OWN_SPLITS
    learned = _learned(json.dumps(structure if own else byte_level(False)))
    model = deepcopy(learned)  # callers change it
    first = len(model["vocab"])
    extra = [
        added(token, first + place, special=token in SPECIAL)
        for place, token in enumerate((*SPECIAL, PLAIN))
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": extra,
        "normalizer": {"type": "NFC"} if family.startswith("qwen") else None,
        "pre_tokenizer": structure,
        "post_processor": template(["<bos>"], {"<bos>": first}) if bos else byte_level(True),
        "decoder": byte_level(True),
        "model": model | {"ignore_merges": ignore_merges},
    }


@cache
def _pieces() -> tuple[tuple[str, float], ...]:
    """Learned pieces with scores, as SentencePiece's BPE gives them: -1, -2, -3 ..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    lines = [part for text in _corpus() for part in text.split("\n")]
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=1600, show_progress=False, max_token_length=12)
    )
    model = json.loads(tokenizer.to_str())["model"]
    made = ["".join(pair) for pair in model["merges"]]
    letters = {token for token in model["vocab"] if len(token) == 1 and not token.isspace()}
    # Every letter of a piece is a piece; what is not becomes bytes.
    order = [piece for piece in (*made, *sorted(letters)) if letters.issuperset(piece)]
    order = [piece for piece in order if piece.rfind(SPACE) <= 0]  # words end where a space is
    return tuple((piece, -1.0 - place) for place, piece in enumerate(dict.fromkeys(order)))


def pieces(family: str) -> list[tuple[str, float, int]]:
    """(text, score, type) of every piece of a tokenizer.model, by number."""
    head = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    runs = [(letter * n, 0.0, 4) for letter in (SPACE, "\n") for n in range(2, 32)]
    taken = {text for text, _, _ in runs} if family == "gemma" else set()
    data = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    learned = [(text, score, 1) for text, score in _pieces() if text not in taken]
    return [*head, *(runs if family == "gemma" else []), *data, *learned]


def merges_of(listed: list[tuple[str, float, int]]) -> list[list[str]]:
    """Every pair of words whose union is a word, best score first: what conversions write."""
    words = {
        text: (score, number) for number, (text, score, kind) in enumerate(listed) if kind in {1, 4}
    }
    found = []
    for text, (score, _) in words.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in words and right in words:
                found.append((-score, words[left][1], words[right][1], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def spaced_json(family: str) -> dict:
    """tokenizer.json of a SentencePiece family, as transformers converts a tokenizer.model."""
    normalizer, structure, prefix = SPACED[family]
    listed = pieces(family)
    first = len(listed)
    vocabulary = {text: number for number, (text, _, _) in enumerate(listed)}
    marks = ["<unk>", "<s>", "</s>"]
    extra = [added(text, vocabulary[text], special=True) for text in marks]
    extra += [added(text, number) for number, (text, _, kind) in enumerate(listed) if kind == 4]
    extra += [
        added(token, first + place, special=token in SPECIAL)
        for place, token in enumerate((*SPECIAL, PLAIN))
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": extra,
        "normalizer": normalizer,
        "pre_tokenizer": structure,
        "post_processor": template(["<s>"], {"<s>": 1}),
        "decoder": {"type": "Sequence", "decoders": decoders + [strip] * prefix},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges_of(listed),
        },
    }


def sentencepiece_model(family: str) -> bytes:
    """tokenizer.model of a SentencePiece family, as the library would write it."""
    prefix = SPACED[family][2]
    parts = [
        _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in pieces(family)
    ]
    trainer = _number(3, 2) + _number(35, 1)  # BPE, with tokens for single bytes
    normalizer = _field(1, b"identity") + _number(3, prefix) + _number(4, 0) + _number(5, 1)
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def write_model_directory(directory: Path, tokenizer: dict, **settings: object) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json, and return the tokenizer of the first."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def write_vocabulary_only(path: Path, metadata: dict, size: int) -> None:
    """Write a GGUF file without tensors, of which llama.cpp loads the vocabulary."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 8)
    writer.add_uint32("llama.attention.head_count", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_vocab_size(size)
    for key, value in metadata.items():
        kind = gguf.GGUFValueType[re.sub("^([uif])(8|16|32|64)$", _long, value.kind).upper()]
        if value.array:
            writer.add_key_value(key, list(value.content), gguf.GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value.content, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _long(match: re.Match) -> str:
    return {"u": "uint", "i": "int", "f": "float"}[match[1]] + match[2]
