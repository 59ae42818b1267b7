"""The marks of a tokenizer in a GGUF file: which tokens begin and end a text, and chat templates.

Where an end of text is missing, llama.cpp generates for ever; where a beginning is added twice, the
model answers badly. Both are therefore decided here as transformers decides them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_letters, digits
from typing import Any

from qtool.checkpoint.gguf_values import Value, flag, many, text, u32
from qtool.checkpoint.untrusted import GET_AGAIN, printable, shown_path
from qtool.errors import DamagedError
from qtool.formats.gguf_pretokenizers import flattened
from qtool.formats.gguf_vocab_files import (
    DEFAULT_TEMPLATE,
    TokenizerFiles,
    token_text,
    whole_number,
)

# Name in the Hugging Face files -> key of a GGUF file ("seperator" is how the format spells it).
KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
TEMPLATE = "tokenizer.chat_template"
TEMPLATE_NAMES = "tokenizer.chat_templates"
# Tokens at which llama.cpp b11549 ends an answer by their text alone.
ENDS_BY_TEXT = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "[e~[",
        "<|ifm|im_end|>",
    }
)
_SAFE_IN_NAMES = frozenset(ascii_letters + digits)


@dataclass
class _Marks:
    """What is decided so far; ids of names, and which of them are put around a text."""

    ids: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    warnings: list[str] = field(default_factory=list)


def special_metadata(
    files: TokenizerFiles, config: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return the keys for special tokens and chat templates, and what cannot be carried over.

    Args:
        files: of the model.
        config: its config.json.
        tokens: the vocabulary as it will be written, by number.

    Raises:
        DamagedError: a file is not what its name promises.
    """
    numbers = {token: number for number, token in enumerate(tokens)}
    marks = _Marks()
    _name_tokens(marks, files, config, numbers)
    _decide_additions(marks, files, numbers)
    _name_other_ends(marks, files, config, tokens)
    if "eos" not in marks.ids:
        marks.warnings.append(
            "no file names an end-of-text token: llama.cpp stops only at the token limit"
        )
    metadata = {KEYS[name]: u32(marks.ids[name]) for name in KEYS if name in marks.ids}
    metadata["tokenizer.ggml.add_bos_token"] = flag(marks.add_bos)
    metadata["tokenizer.ggml.add_eos_token"] = flag(marks.add_eos)
    return metadata | _template_metadata(files.templates), tuple(marks.warnings)


def _name_tokens(
    marks: _Marks,
    files: TokenizerFiles,
    config: Mapping[str, Any],
    numbers: Mapping[str, int],
) -> None:
    """Find the number of every named token: by its text, else as the model's settings give it."""
    named = dict(files.named)
    for name, instead in (("bos", "cls"), ("eos", "sep")):
        if name not in named and instead in named:
            named[name] = named[instead]
    inner = config.get("text_config")
    settings = (files.generation, config, inner if isinstance(inner, dict) else {})
    for name in KEYS:
        if named.get(name) in numbers:
            marks.ids[name] = numbers[named[name]]
            continue
        given = next((n for s in settings for n in _ids(s, name, files)), None)
        if given is not None and given < len(numbers):
            marks.ids[name] = given
        elif name in named and name in {"bos", "eos"}:
            marks.warnings.append(
                f"the {name} token '{printable(named[name])}' is not among the model's "
                f"{len(numbers)} tokens"
            )


def _ids(settings: Mapping[str, Any], name: str, files: TokenizerFiles) -> list[int]:
    """Return the numbers that a config or generation_config gives to a name: none, one or more."""
    value = settings.get(f"{name}_token_id")
    items = value if isinstance(value, list) else [value]
    where = shown_path(files.directory)
    # Some configs write -1 for "none".
    return [whole_number(item, where) for item in items if item is not None and item != -1]


def _decide_additions(marks: _Marks, files: TokenizerFiles, numbers: Mapping[str, int]) -> None:
    """Decide what goes before and after every text, as transformers 5 does.

    The switches of tokenizer_config.json count only where there is no tokenizer.json; a tokenizer
    of SentencePiece alone begins texts unless told otherwise.
    """
    before, after = _template_of(files)
    switches = {name: files.settings.get(f"add_{name}_token") for name in ("bos", "eos")}
    if not files.tokenizer:
        before = [files.named.get("bos", "<s>")] if switches["bos"] is not False else []
        after = [files.named.get("eos", "</s>")] if switches["eos"] is True else []
    for name, around in (("bos", before), ("eos", after)):
        if isinstance(switches[name], bool) and switches[name] != bool(around):
            marks.warnings.append(
                f"tokenizer_config.json has add_{name}_token {str(switches[name]).lower()}, but "
                "the post-processor of tokenizer.json, which transformers 5 follows, says otherwise"
            )
    for name, around in (("bos", before), ("eos", after)):
        if not around:
            continue
        outermost = around[0] if name == "bos" else around[-1]
        if len(around) > 1 or outermost not in numbers:
            side = "before" if name == "bos" else "after"
            marks.warnings.append(
                f"the tokenizer puts {' '.join(map(printable, around))} {side} every text, of "
                "which llama.cpp adds at most one"
            )
        if outermost not in numbers:
            continue
        if name == "eos" and marks.ids.get("eos", numbers[outermost]) != numbers[outermost]:
            marks.ids.setdefault("eot", marks.ids["eos"])
        marks.ids[name] = numbers[outermost]
        if name == "bos":
            marks.add_bos = True
        else:
            marks.add_eos = True


def _template_of(files: TokenizerFiles) -> tuple[list[str], list[str]]:
    """Return the tokens that the post-processor puts before and after a text."""
    where = shown_path(files.tokenizer_path)
    before: list[str] = []
    after: list[str] = []
    for step in flattened(files.tokenizer.get("post_processor"), "processors", where):
        if step.get("type") in {"RobertaProcessing", "BertProcessing"}:
            before += _first(step.get("cls"), where)
            after += _first(step.get("sep"), where)
        if step.get("type") != "TemplateProcessing":
            continue
        single = step.get("single")
        if not isinstance(single, list) or not all(isinstance(item, dict) for item in single):
            raise DamagedError(f"{where} has a template that is not a list", GET_AGAIN)
        text_seen = False
        for item in single:
            text_seen = text_seen or "Sequence" in item
            mark = item.get("SpecialToken")
            if isinstance(mark, dict):
                (after if text_seen else before).append(token_text(mark.get("id"), where))
    return before, after


def _first(pair: object, where: str) -> list[str]:
    return [token_text(pair[0], where)] if isinstance(pair, list) and pair else []


def _name_other_ends(
    marks: _Marks, files: TokenizerFiles, config: Mapping[str, Any], tokens: Sequence[str]
) -> None:
    """Name every further token at which generation ends and that llama.cpp would not know.

    A fine-tune with a turn mark of its own otherwise talks on after every answer.
    """
    ends = _ids(files.generation, "eos", files) or _ids(config, "eos", files)
    unknown = [
        number
        for number in dict.fromkeys(ends)
        if number < len(tokens)
        and number not in marks.ids.values()
        and tokens[number] not in ENDS_BY_TEXT
    ]
    free = [name for name in ("eot", "eom") if name not in marks.ids]
    for name, number in zip(free, unknown, strict=False):
        marks.ids[name] = number
    if len(unknown) > len(free):
        left = ", ".join(printable(tokens[number]) for number in unknown[len(free) :])
        marks.warnings.append(f"llama.cpp will not stop at {left}: a GGUF file has no place for it")


def _template_metadata(templates: Mapping[str, str]) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    names = []
    for name, template in templates.items():
        if name == DEFAULT_TEMPLATE:
            metadata[TEMPLATE] = text(template)
            continue
        safe = "".join(c if c in _SAFE_IN_NAMES else "_" for c in name)
        metadata[f"{TEMPLATE}.{safe}"] = text(template)
        names.append(safe)
    if names:
        metadata[TEMPLATE_NAMES] = many("string", dict.fromkeys(names))
    return metadata
