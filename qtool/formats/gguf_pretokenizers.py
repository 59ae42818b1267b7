"""Which of llama.cpp's pre-tokenizers splits a text as a tokenizer.json does, told by structure.

A pre-tokenizer is a row of regular expressions, each of which isolates its matches in what the
ones before it left. Every step of a tokenizer.json is brought to that form and to one spelling, so
that a model with one added token is still recognised, and a new structure is refused by name.

Source: the expressions and the names of src/llama-vocab.cpp, llama.cpp b11549.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.checkpoint.untrusted import GET_AGAIN, printable
from qtool.errors import DamagedError, UnsupportedError, UsageError

MARKS = "letters with combining marks (as in Hindi or vowelled Arabic) and capitals with accents"
AYA = "numbers that a letter follows and capitals inside words"

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
DIGIT = r"\p{N}"
DIGITS = r"\p{N}+"
PUNCTUATION = r"[\p{P}$+<=>^~|`]+"  # tokenizers counts these symbols of ASCII as punctuation
ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{ENDING}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{ENDING}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MINICPM5 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{ENDING}"
SEED_CODER = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAILING = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
JAIS2 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)"
    r"|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)
_HIGH, _LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_HIGH}*{_LOW}+|[^\r\n\p{{L}}\p{{N}}]?{_HIGH}+{_LOW}*"
    rf"|\p{{N}}|{_CASED_ENDING}"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_HIGH}*{_LOW}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_HIGH}+{_LOW}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_ENDING}"
)
DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8"
    "-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-"
    "\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-"
    "\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-"
    "\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13"
    "-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
    "]+"
)
DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
HAN_TO_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
BLOOM = r" ?[^(\s|[" ".,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c" r"])]+"


@dataclass(frozen=True)
class PreTokenizer:
    """What llama.cpp does under one name.

    Args:
        name: of `tokenizer.ggml.pre`.
        splits: expressions that isolate their matches, in order.
        whole_words: a piece that is itself a token is taken without merging (`ignore_merges`).
        inexact: which texts llama.cpp splits otherwise than the expressions say.
    """

    name: str
    splits: tuple[str, ...]
    whole_words: bool = False
    inexact: str = ""


# The first row that fits is taken: of equal ones the name that most releases of llama.cpp know.
TABLE = (
    PreTokenizer("gpt-2", (GPT2,)),
    PreTokenizer("refact", (DIGIT, GPT2)),
    PreTokenizer("llama-bpe", (LLAMA3,), whole_words=True),
    PreTokenizer("dbrx", (LLAMA3,)),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("qwen35", (QWEN35,)),
    PreTokenizer("tekken", (TEKKEN,), whole_words=True, inexact=MARKS),
    PreTokenizer("gpt-4o", (GPT4O,), inexact=MARKS),
    PreTokenizer(
        "deepseek-llm",
        (
            r"[\r\n]",
            DEEPSEEK_LETTERS,
            DEEPSEEK_PUNCTUATION,
            r"\s+$",
            HAN_TO_HANGUL,
            DIGIT,
        ),
    ),
    PreTokenizer("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_TO_HANGUL, DIGIT)),
    PreTokenizer("deepseek-v3", (r"\p{N}{1,3}", HAN_AND_KANA, DEEPSEEK_WORDS)),
    PreTokenizer("falcon", (PUNCTUATION, GPT2, DIGITS, "[0-9][0-9][0-9]")),
    PreTokenizer("bloom", (BLOOM,)),
    PreTokenizer("viking", (BLOOM, DIGIT)),
    PreTokenizer("seed-coder", (SEED_CODER,)),
    PreTokenizer("bailingmoe", (BAILING,)),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", MINICPM5), whole_words=True),
    PreTokenizer("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O), inexact=AYA),
    PreTokenizer("jais-2", (JAIS2,)),
)

# Names whose splits are those of a row above, for the way back and for --pre.
ALIASES = {
    "a.x-4.0": "gpt-2",
    "bailingmoe2": "bailingmoe",
    "chatglm-bpe": "dbrx",
    "codeshell": "refact",
    "cohere2moe": "tiny_aya",
    "command-r": "refact",
    "deepseek-r1-qwen": "qwen2",
    "exaone": "refact",
    "exaone4": "gpt-2",
    "f2llmv2": "qwen2",
    "falcon-h1": "llama-bpe",
    "falcon3": "llama-bpe",
    "gigachat": "gpt-2",
    "glm4": "llama-bpe",
    "glm5": "llama-bpe",
    "gpt3-finnish": "bloom",
    "granite-docling": "gpt-2",
    "grok-2": "qwen2",
    "hunyuan": "qwen2",
    "hunyuan-dense": "deepseek-v3",
    "hy_v4": "deepseek-v3",
    "jais": "gpt-2",
    "joyai-llm": "deepseek-v3",
    "kanana2": "gpt-4o",
    "kormo": "qwen2",
    "lfm2": "llama-bpe",
    "llada-moe": "bailingmoe",
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "llama4": "gpt-4o",
    "megrez": "qwen2",
    "mellum": "gpt-2",
    "mellum2": "refact",
    "midm-2.0": "llama-bpe",
    "minerva-7b": "refact",
    "minimax-m2": "gpt-4o",
    "modern-bert": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
    "pixtral": "llama-bpe",
    "poro-chat": "bloom",
    "smaug-bpe": "dbrx",
    "smollm": "refact",
    "solar-open": "qwen2",
    "stablelm2": "qwen2",
    "starcoder": "refact",
    "talkie": "gpt-4o",
    "trillion": "gpt-2",
}
# Names that llama.cpp knows and whose structure in a tokenizer.json is not in the table.
UNTABLED = frozenset(
    {
        "afmoe",
        "chameleon",
        "default",
        "exaone-moe",
        "gemma4",
        "granite-embed-multi-311m",
        "granite-embed-multi-97m",
        "jina-de",
        "jina-es",
        "jina-v1-en",
        "jina-v2-code",
        "jina-v2-de",
        "jina-v2-es",
        "jina-v5-nano",
        "k2-horizon",
        "kimi-k2",
        "laguna",
        "mmbert",
        "roberta-bpe",
        "sarvam-moe",
        "spark2_5",
        "superbpe",
        "ufakzeka",
        "whitespace",
        "youtu",
    }
)
KNOWN_NAMES = frozenset(row.name for row in TABLE) | ALIASES.keys() | UNTABLED

# One spelling for what means the same; possessive quantifiers change nothing in these expressions.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTIONS),
    ("'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS),
    ("'(?:[sdmt]|ll|ve|re)", "'s|'t|'re|'ve|'m|'ll|'d"),
    ("{1}", ""),
    ("{1,3}+", "{1,3}"),
    ("++", "+"),
    ("?+", "?"),
    ("*+", "*"),
)
_COVERS_EVERYTHING = r"|\s+"  # how an expression ends that leaves no character unmatched


def canonical(regex: str) -> str:
    """Return the one spelling under which expressions are compared."""
    for spelling, instead in _SPELLINGS:
        regex = regex.replace(spelling, instead)
    return regex


_ROWS = tuple((tuple(map(canonical, row.splits)), row) for row in TABLE)


def by_name(name: str) -> PreTokenizer | None:
    """Return what is known of a name, None for a name of llama.cpp outside the table.

    Raises:
        UsageError: llama.cpp does not know the name.
    """
    if name not in KNOWN_NAMES:
        raise UsageError(
            f"'{printable(name)}' is not a pre-tokenizer of llama.cpp",
            f"one of {', '.join(sorted(KNOWN_NAMES))}",
        )
    target = ALIASES.get(name, name)
    row = next((row for row in TABLE if row.name == target), None)
    return row and PreTokenizer(name, row.splits, row.whole_words, row.inexact)


def recognise(pre_tokenizer: object, *, whole_words: bool, where: str) -> PreTokenizer:
    """Return the row that splits as the `pre_tokenizer` of a tokenizer.json does.

    Args:
        pre_tokenizer: that value of the file.
        whole_words: its model's `ignore_merges`, which decides between equal splits.
        where: the file, for messages.

    Raises:
        UnsupportedError: nothing in llama.cpp splits like that.
        DamagedError: the value is not of the form that the tokenizers library writes.
    """
    steps = splits_of(pre_tokenizer, where)
    fitting = [row for splits, row in _ROWS if splits == tuple(map(canonical, steps))]
    if not fitting:
        shown = "  then  ".join(printable(step) for step in steps) or "nothing at all"
        raise UnsupportedError(
            f"{where} splits text with {shown}, as no pre-tokenizer of llama.cpp does",
            "if you know one that comes close enough, give its name with --pre NAME: "
            f"{', '.join(row.name for row in TABLE)}, ...",
        )
    return next((row for row in fitting if row.whole_words == whole_words), fitting[0])


def splits_of(pre_tokenizer: object, where: str) -> tuple[str, ...]:
    """Return the isolating expressions that a byte-level `pre_tokenizer` amounts to.

    A step without an equal expression comes back as its description, which equals no row.

    Raises:
        UnsupportedError: it puts a space before every text, which llama.cpp cannot.
        DamagedError: not of the form that the tokenizers library writes.
    """
    splits: list[str] = []
    for step in flattened(pre_tokenizer, "pretokenizers", where):
        kind = step.get("type")
        if kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise UnsupportedError(
                    f"{where} puts a space before every text, which llama.cpp does not do for "
                    "byte-level tokenizers",
                    "there is no setting for it: this model cannot be written as GGUF",
                )
            splits += [GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits":
            splits.append(DIGIT if step.get("individual_digits") else DIGITS)
        elif kind == "Punctuation" and step.get("behavior") == "Contiguous":
            splits.append(PUNCTUATION)
        elif kind == "Split":
            splits.append(_split(step, where))
        else:
            splits.append(f"{kind}()")
    return tuple(splits)


def flattened(value: object, members: str, where: str) -> Sequence[Mapping[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or post-processor, sequences opened.

    Raises:
        DamagedError: not of the form that the tokenizers library writes.
    """
    if value is None:
        return ()
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise DamagedError(f"{where} has a step that is not an object with a type", GET_AGAIN)
    if value.get("type") != "Sequence":
        return (value,)
    inner = value.get(members)
    if not isinstance(inner, list):
        raise DamagedError(f"{where} has a sequence without '{members}'", GET_AGAIN)
    return [step for item in inner for step in flattened(item, members, where)]


def _split(step: Mapping[str, Any], where: str) -> str:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        return f"Split({pattern['String']!r}, {step.get('behavior')})"
    if not isinstance(regex, str):
        raise DamagedError(f"{where} has a split without a pattern", GET_AGAIN)
    behavior, inverted = step.get("behavior"), step.get("invert", False)
    isolated = behavior == "Isolated" and not inverted
    # Conversions from tiktoken remove what does not match; where everything does, that is the same.
    kept = behavior == "Removed" and inverted and regex.endswith(_COVERS_EVERYTHING)
    return regex if isolated or kept else f"Split({regex}, {behavior}, invert={inverted})"


def pre_tokenizer_json(row: PreTokenizer) -> dict[str, Any]:
    """Return the `pre_tokenizer` of a tokenizer.json that splits as a row does."""
    steps: list[dict[str, Any]] = [
        _byte_level(use_regex=True)
        if split == GPT2
        else {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in row.splits
    ]
    if GPT2 not in row.splits:
        steps.append(_byte_level(use_regex=False))
    return {"type": "Sequence", "pretokenizers": steps}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
