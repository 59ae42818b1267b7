"""Decide from small files alone whether a model may be worked on; nothing here imports torch.

A model directory is a stranger's. Whatever its configuration, headers and tokenizer files say is
held against each other before the libraries that would act on it are imported, so that a refusal
takes neither their time nor their memory. What needs weights is found later, and refused as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.calibration.tokenizer_trial import check_tokenizer
from qtool.checkpoint.locate import CONFIG_FILE, Checkpoint
from qtool.checkpoint.untrusted import GET_AGAIN, naming, printable, read_json_object, shown_path
from qtool.errors import DamagedError, QtoolError, UnsupportedError
from qtool.formats.gguf_file_types import file_type_named
from qtool.formats.gguf_pretokenizers import flattened
from qtool.formats.gguf_vocab import vocabulary
from qtool.formats.gguf_vocab_files import TokenizerFiles, read_tokenizer_files
from qtool.formats.protocol import FORMATS, LAYOUTS, TensorLayout
from qtool.memory.expected_tensors import check_tensors
from qtool.model.config_check import check_config
from qtool.model.conversion import converted_tensors
from qtool.model.family import family_of
from qtool.model.gguf_metadata import model_metadata
from qtool.pipeline.found_linears import block_linears, check_rules
from qtool.pipeline.gguf_admission import admit_gguf
from qtool.pipeline.rule_trial import EXPRESSION, MAX_SECONDS, check_patterns, slow_pattern
from qtool.recipe.rules import first_match
from qtool.recipe.schema import Quantize, Recipe

MODEL_CODE = "auto_map"
CODE_PLACES = (CONFIG_FILE, "tokenizer_config.json", "generation_config.json")
# Files that are used or carried along and have to be what their names promise.
OBJECTS = frozenset(
    {
        "added_tokens.json",
        "chat_template.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
    }
)
MAX_JSON_BYTES = 64 << 20
# Any one of them is what a tokenizer can be loaded from.
TOKENIZERS: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
TOKENIZERS += ("tekken.json", "*.tiktoken")
MOST_GROWTH = 1000
MOST_STEPS = 100  # of a normalizer; real ones have up to ten


def admit(
    checkpoint: Checkpoint, *, trust_remote_code: bool = False, tokenizer: bool = True
) -> tuple[tuple[str, str], ...]:
    """Check a float or packed model directory; GGUF files were checked when they were read.

    Args:
        checkpoint: as found.
        trust_remote_code: take a model that brings code of its own as a plain one of its family.
            The code is not run in any case.
        tokenizer: whether its tokenizer will be used.

    Returns:
        Warnings, as (code, message).

    Raises:
        UnsupportedError: no family, a quantization that qtool does not read, or code.
        DamagedError: the files contradict each other, or one is malformed.
    """
    if checkpoint.gguf:
        admit_gguf(checkpoint.gguf)
        return ()
    with naming(checkpoint.path):
        return _admit_directory(checkpoint, trusted=trust_remote_code, tokenizer=tokenizer)


def _admit_directory(
    checkpoint: Checkpoint, *, trusted: bool, tokenizer: bool
) -> tuple[tuple[str, str], ...]:
    with naming(checkpoint.path / CONFIG_FILE):
        family = family_of(checkpoint.config)
    where = shown_path(checkpoint.path / CONFIG_FILE)
    settings = {
        path.name: read_json_object(path, max_bytes=MAX_JSON_BYTES)
        for path in checkpoint.extra_files
        if path.name in OBJECTS and path.parent == checkpoint.path
    }
    warnings = _code_warnings(checkpoint, settings, trusted=trusted)
    check_config(checkpoint.config, family, where)
    declared = checkpoint.config.get("quantization_config") or {}
    method = declared.get("quant_method", "")
    if declared and (not isinstance(method, str) or method not in FORMATS):
        raise UnsupportedError(
            f"{where}: the model is already quantized as '{printable(method)}', which qtool cannot "
            "read",
            f"formats it reads: {', '.join(FORMATS)}; quantize the original model instead",
        )
    _check_expressions(declared, checkpoint)
    longest = settings.get("tokenizer_config.json", {}).get("model_max_length")
    if longest is not None and type(longest) not in {int, float}:
        raise DamagedError(
            f"{shown_path(checkpoint.path / 'tokenizer_config.json')}: 'model_max_length' is "
            f"{printable(longest)}, not a number",
            GET_AGAIN,
        )
    check_tensors(checkpoint, family)
    if declared:
        _check_packed(checkpoint)
    files = read_tokenizer_files(checkpoint.path)
    _check_growth(files)
    _check_dropout(files)
    if tokenizer:
        check_tokenizer(checkpoint.path, int(checkpoint.config["vocab_size"]))
    return warnings


def _check_expressions(declared: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a quantization whose rules never finish saying which modules they are for."""
    groups, dynamic = declared.get("config_groups"), declared.get("dynamic")
    entries = list(groups.values()) if isinstance(groups, dict) else []
    targets = [entry.get("targets") for entry in entries if isinstance(entry, dict)]
    stated = [one for names in targets if isinstance(names, list) for one in names]
    found = [one for one in stated if isinstance(one, str) and one.startswith(EXPRESSION)]
    if isinstance(dynamic, dict):
        found += [
            EXPRESSION + key.removeprefix("+:") for key in dynamic if not key.startswith("-:")
        ]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in checkpoint.refs))
    if (slow := slow_pattern(found, modules)) is not None:
        raise DamagedError(
            f"{shown_path(checkpoint.path / CONFIG_FILE)}: quantization_config has the pattern "
            f"'{printable(slow.removeprefix(EXPRESSION))}', which takes more than "
            f"{MAX_SECONDS:g} seconds to match the names of the model",
            "do not trust this model; get it from its original source",
        )


def _check_packed(checkpoint: Checkpoint) -> None:
    """Hold packed tensors to the quantization_config, and name the file of the one that differs."""
    declared = checkpoint.config["quantization_config"]
    layouts = {n: TensorLayout(ref.dtype, tuple(ref.shape)) for n, ref in checkpoint.refs.items()}
    try:
        LAYOUTS[declared["quant_method"]](declared, layouts)
    except QtoolError as error:
        place, said = checkpoint.path / CONFIG_FILE, error.message.removeprefix(f"{CONFIG_FILE}: ")
        if said.startswith("tensor "):
            module = said.split()[1].rpartition(".")[0]
            refs = checkpoint.refs.items()
            place = next((ref.file for name, ref in refs if name.startswith(f"{module}.")), place)
        raise type(error)(f"{shown_path(place)}: {said}", error.hint) from error


def check_has_tokenizer(checkpoint: Checkpoint) -> None:
    """Check that there are files that a tokenizer can be loaded from.

    Raises:
        DamagedError: there are none.
    """
    directory = checkpoint.path
    if not any((directory / name).exists() or list(directory.glob(name)) for name in TOKENIZERS):
        raise DamagedError(
            f"{shown_path(directory)} has no tokenizer: {TOKENIZERS[0]} is missing",
            "tokenizer.json and tokenizer_config.json must lie beside the weights",
        )


def _check_dropout(files: TokenizerFiles) -> None:
    """Refuse a tokenizer that cuts the same text differently each time: nothing repeats then."""
    model = files.tokenizer.get("model")
    if isinstance(model, Mapping) and model.get("dropout"):
        raise DamagedError(
            f"{shown_path(files.tokenizer_path)}: 'dropout' is {printable(model['dropout'])}, so "
            "that it cuts the same text differently each time",
            "set it to null: it is for training only",
        )


def _check_growth(files: TokenizerFiles) -> None:
    """Refuse a normalizer that can blow a short text up until the memory is full, or takes ages."""
    where = shown_path(files.tokenizer_path)
    growth = 1.0
    steps = list(flattened(files.tokenizer.get("normalizer"), "normalizers", where))
    if len(steps) > MOST_STEPS:
        raise DamagedError(
            f"{where}: its normalizer has {len(steps)} steps, more than {MOST_STEPS}", GET_AGAIN
        )
    for step in steps:
        content, pattern = step.get("content"), step.get("pattern")
        if step.get("type") != "Replace" or not isinstance(content, str):
            continue
        plain = pattern.get("String") if isinstance(pattern, Mapping) else None
        growth *= max(1.0, len(content) / max(len(plain), 1) if isinstance(plain, str) else 1.0)
        growth *= max(1.0, len(content) + 1.0) if not isinstance(plain, str) else 1.0
        if growth > MOST_GROWTH:
            raise DamagedError(
                f"{where}: its normalizer can make a text more than {MOST_GROWTH} times as long",
                GET_AGAIN,
            )


def check_recipe(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Check what a recipe asks of an admitted float model.

    Raises:
        UsageError: a rule matches nothing, a group size does not divide a row, fused linears would
            get different schemes, an unknown format.
        UnsupportedError: the model is quantized already.
    """
    family = family_of(checkpoint.config)
    if checkpoint.config.get("quantization_config"):
        raise UnsupportedError(
            f"{shown_path(checkpoint.path / CONFIG_FILE)}: {printable(checkpoint.name)} is already "
            "quantized",
            "quantize the original float model instead",
        )
    found = block_linears(checkpoint, family)
    check_patterns([rule.match for rule in recipe.rules], list(found))
    check_rules(recipe, checkpoint, family, list(found))
    packed = [export.format for export in recipe.export if export.gguf_type is None]
    for name in packed:
        if name not in FORMATS:
            FORMATS[name]  # raises, with the nearest name
    gguf = [export for export in recipe.export if export.gguf_type is not None]
    for export in gguf:
        file_type_named(export.format)
    if gguf:
        check_conversion(checkpoint, pre=gguf[0].pre)
    if not packed:
        return
    rules = [rule for rule in recipe.rules if rule.keep or rule.changes]
    for name, linear in found.items():
        rule = first_match(rules, name)
        if rule is None or not rule.keep:
            changes = {} if rule is None else rule.changes
            _check_row(recipe.quantize.model_copy(update=changes), linear.shape[1])


def check_conversion(checkpoint: Checkpoint, *, pre: str | None) -> None:
    """Check that an admitted directory can be written as GGUF: tokenizer, settings, tensors.

    Raises:
        UnsupportedError: something that llama.cpp cannot express.
        UsageError: llama.cpp does not know the pre-tokenizer `pre`.
        DamagedError: tokenizer files are missing or malformed.
    """
    if checkpoint.gguf:
        return
    with naming(checkpoint.path):
        family, config = family_of(checkpoint.config), checkpoint.config
        words = vocabulary(checkpoint.path, size=int(config["vocab_size"]), config=config, pre=pre)
        if not config.get("quantization_config"):
            converted_tensors(config, family, checkpoint.refs, vocabulary=words.size)
        model_metadata(
            config,
            family,
            name=checkpoint.name,
            vocabulary=words.size,
            parameters=sum(ref.n_elements for ref in checkpoint.refs.values()),
        )


def _check_row(section: Quantize, columns: int) -> None:
    """Refuse what `IntegerGrid.check_row` will refuse, without importing it first."""
    if section.group_size > 0 and columns % section.group_size:
        from qtool.grids.rows import no_group

        raise no_group(section.group_size, columns)


def _code_warnings(
    checkpoint: Checkpoint, settings: Mapping[str, Mapping[str, Any]], *, trusted: bool
) -> tuple[tuple[str, str], ...]:
    """Refuse, or if told so warn of, a model whose files name code to be run."""
    places = {CONFIG_FILE: checkpoint.config, **settings}
    naming = [name for name in CODE_PLACES if places.get(name, {}).get(MODEL_CODE)]
    if not naming:
        return ()
    where = shown_path(checkpoint.path / naming[0])
    kind = printable(checkpoint.config.get("model_type"))
    if not trusted:
        raise UnsupportedError(
            f"{where} names code of its own ({MODEL_CODE}), which qtool never runs, so the model "
            f"may compute something else than {kind} does",
            f"if you know it for a plain {kind}, take it as one with --trust-remote-code",
        )
    message = f"{where} names code of its own ({MODEL_CODE}): it is not run, {kind} is computed"
    return (("remote_code", message),)
