"""Plan a GGUF output: what each tensor is called, of which type it is, and what the file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtool.checkpoint.gguf_values import Value, u32
from qtool.checkpoint.locate import Checkpoint
from qtool.errors import UnsupportedError, UsageError, shortened
from qtool.formats.gguf_file_types import FILE_TYPES
from qtool.formats.gguf_mixes import (
    ChosenType,
    ModelFacts,
    TensorShape,
    fallback_warning,
    file_type_named,
    needs_importance,
    tensor_types,
)
from qtool.formats.gguf_vocab import Vocabulary, vocabulary
from qtool.ggml_types import FLOAT_TYPES
from qtool.grids.ggml import LAYOUTS, GgmlGrid
from qtool.model.conversion import ConvertedTensor, converted_tensors
from qtool.model.family import Family
from qtool.model.gguf_metadata import conversion_warnings, model_metadata
from qtool.pipeline.card import original_card
from qtool.pipeline.found_linears import FoundLinear
from qtool.pipeline.gguf_output import PlannedGguf, PlannedTensor
from qtool.pipeline.linears import PlannedLinear
from qtool.recipe.rules import first_match, matches
from qtool.recipe.schema import Export, Recipe, Rule
from qtool.recipe.sizes import parse_size


@dataclass(frozen=True)
class ConvertedModel:
    """A checkpoint as llama.cpp sees it, before anybody says of which types its tensors are."""

    tensors: tuple[ConvertedTensor, ...]
    metadata: Mapping[str, Value]
    facts: ModelFacts
    chat_template: str | None
    warnings: tuple[tuple[str, str], ...]


def convert_model(checkpoint: Checkpoint, family: Family, *, pre: str | None) -> ConvertedModel:
    """Translate names, keys and vocabulary of a checkpoint.

    Raises:
        UnsupportedError: something that llama.cpp cannot express, or an unknown pre-tokenizer.
        DamagedError: configuration or tokenizer files are malformed.
    """
    config = checkpoint.config
    words = vocabulary(checkpoint.path, size=int(config["vocab_size"]), config=config, pre=pre)
    tensors = converted_tensors(config, family, checkpoint.refs, vocabulary=words.size)
    metadata = model_metadata(
        config,
        family,
        name=checkpoint.name,
        vocabulary=words.size,
        parameters=sum(ref.n_elements for ref in checkpoint.refs.values()),
        card=original_card(checkpoint.path),
    )
    warnings = conversion_warnings(config, family)
    heads = int(config["num_attention_heads"])
    facts = ModelFacts(
        architecture=str(metadata["general.architecture"].content),
        blocks=int(config["num_hidden_layers"]),
        heads=heads,
        key_value_heads=int(config.get("num_key_value_heads") or heads),
        experts=0,
    )
    return ConvertedModel(
        tensors,
        {**metadata, **words.metadata},
        facts,
        _template(words),
        tuple(("conversion", message) for message in (*warnings, *words.warnings)),
    )


def _template(words: Vocabulary) -> str | None:
    value = words.metadata.get("tokenizer.chat_template")
    return None if value is None else str(value.content)


def gguf_output(
    checkpoint: Checkpoint,
    recipe: Recipe,
    family: Family,
    modules: Mapping[str, FoundLinear],
    *,
    importance: bool,
) -> tuple[list[PlannedLinear], PlannedGguf]:
    """Plan the one GGUF of a recipe; return the linears that the engine rounds, and the output.

    Raises:
        UsageError: an unknown type, or rows that do not fit and `strict`.
        UnsupportedError: as `convert_model`, or a type that qtool does not write.
        DamagedError: as `convert_model`.
    """
    export = recipe.export[0]
    model = convert_model(checkpoint, family, pre=export.pre)
    planned, warnings = plan_types(checkpoint, model, export, recipe.rules, importance=importance)
    linears = []
    for tensor in planned:
        module = (tensor.converted.source or "").removesuffix(".weight")
        found = modules.get(module)
        if found is not None and tensor.kind in LAYOUTS:
            grid = GgmlGrid(tensor.kind)
            linears.append(
                PlannedLinear(module, found.path, found.block, found.tap, found.shape, grid)
            )
    chosen = {x.name for x in linears}
    output = PlannedGguf(
        file_type=file_type_named(str(export.gguf_type)).name,
        stem=f"{checkpoint.name}-{file_type_named(str(export.gguf_type)).name}",
        tensors=planned,
        metadata={**model.metadata, **type_keys(export)},
        kept=tuple(name for name in modules if name not in chosen),
        warnings=(*model.warnings, *warnings),
        split_bytes=None if export.split_max_size is None else parse_size(export.split_max_size),
        chat_template=model.chat_template,
        modelfile=export.modelfile,
    )
    # The order in which blocks are gone through, not the file's.
    places = {name: place for place, name in enumerate(modules)}
    return sorted(linears, key=lambda x: places[x.name]), output


def type_keys(export: Export) -> dict[str, Value]:
    """Return the keys that say of which type a file is."""
    kind = file_type_named(str(export.gguf_type))
    keys = {"general.file_type": u32(kind.number)}
    if kind.name not in FLOAT_TYPES:
        keys["general.quantization_version"] = u32(2)
    return keys


def plan_types(
    checkpoint: Checkpoint,
    model: ConvertedModel,
    export: Export,
    rules: Sequence[Rule],
    *,
    importance: bool,
) -> tuple[tuple[PlannedTensor, ...], list[tuple[str, str]]]:
    """Choose the type of every tensor; return them and (code, message) warnings.

    Raises:
        UsageError: an unknown type, a rule that names no matrix, or rows that do not fit and
            `strict`.
        UnsupportedError: a type that qtool does not write.
    """
    _check_file_type(str(export.gguf_type))
    check_type_rules(checkpoint.name, model.tensors, rules)
    shapes = [TensorShape(x.name, x.shape) for x in model.tensors]
    stored = {ref.name: ref.dtype for ref in checkpoint.refs.values()}
    kept = _float_type(stored.get(_embedding_source(model)))
    chosen = tensor_types(
        str(export.gguf_type),
        shapes,
        model.facts,
        importance=importance,
        overrides=_overrides(model.tensors, rules, kept),
        output_type=export.output_type,
        embed_type=export.embed_type,
        kept=kept,
    )
    _check_writable(chosen)
    if not importance:
        _check_needs_nothing(str(export.gguf_type), chosen)
    warning = fallback_warning(chosen, shapes)
    if warning is not None and export.strict:
        raise UsageError(warning, "leave --strict away to accept it, or choose another type")
    warnings = [] if warning is None else [("fallback_types", warning)]
    planned = tuple(
        PlannedTensor(x, "F32" if x.always_float else chosen[x.name].type) for x in model.tensors
    )
    return planned, warnings


def _check_needs_nothing(file_type: str, chosen: Mapping[str, ChosenType]) -> None:
    needing = [name for name, x in chosen.items() if needs_importance(file_type, name, x)]
    if needing:
        raise UsageError(
            f"{file_type} is too coarse for '{needing[0]}' without importance of its inputs",
            "calibrate with --method gptq, or give --statistics, or choose Q2_K",
        )


def _embedding_source(model: ConvertedModel) -> str:
    return next((x.source for x in model.tensors if x.name == "token_embd.weight" and x.source), "")


def _float_type(dtype: str | None) -> str:
    return dtype if dtype in FLOAT_TYPES else "F16"


def _overrides(
    tensors: Sequence[ConvertedTensor], rules: Sequence[Rule], kept: str
) -> list[tuple[str, str]]:
    """Return (exact name, type) of every tensor that a rule names, under either of its names."""
    found = []
    wanted = [rule for rule in rules if rule.keep or rule.type]
    for tensor in tensors:
        if len(tensor.shape) < 2:
            continue
        names = [tensor.name, tensor.source] if tensor.source else [tensor.name]
        matching = [first_match(wanted, name) for name in names]
        rule = next((r for r in wanted if r in matching), None)
        if rule is not None:
            found.append((tensor.name, kept if rule.keep else str(rule.type)))
    return found


def check_type_rules(name: str, tensors: Sequence[ConvertedTensor], rules: Sequence[Rule]) -> None:
    """Refuse a rule that gives a type to nothing: a typing error in it would go unnoticed.

    Raises:
        UsageError: names the rule.
    """
    matrices = [x for x in tensors if len(x.shape) > 1]
    names = [known for x in matrices for known in (x.name, x.source) if known]
    example = [known for x in matrices[:2] for known in (x.name, x.source) if known][-2:]
    shared = all(x.name != "output.weight" for x in matrices)
    for rule in rules:
        if rule.type is None or any(matches(rule.match, known) for known in names):
            continue
        if shared and any(matches(rule.match, head) for head in ("lm_head", "output")):
            raise UsageError(
                f"rule '{shortened(rule.match)}' matches nothing: the embeddings of {name} "
                "serve as its head",
                f"name them instead: --override 'token_embd={rule.type}', or --output-type "
                f"{rule.type}",
            )
        raise UsageError(
            f"rule '{shortened(rule.match)}' matches no matrix of {name}",
            f"names look like {' or '.join(dict.fromkeys(example))}",
        )


def _check_file_type(name: str) -> None:
    kind = file_type_named(name)
    if not kind.writable:
        writable = ", ".join(x.name for x in FILE_TYPES.values() if x.writable)
        raise UnsupportedError(
            f"qtool does not write gguf:{kind.name}", f"types that it writes: {writable}"
        )


def _check_writable(chosen: Mapping[str, ChosenType]) -> None:
    writable = {*LAYOUTS, *FLOAT_TYPES}
    for name, choice in chosen.items():
        if choice.type not in writable:
            raise UnsupportedError(
                f"'{name}' would be {choice.type}, which qtool does not write",
                f"types it writes: {', '.join(sorted(writable))}",
            )
