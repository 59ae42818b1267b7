"""`qtool export`: from one file format to another without calibration, a tensor at a time."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qtool import device as devices
from qtool.checkpoint.gguf_values import Value
from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.output import output_place
from qtool.checkpoint.reader import TensorReader
from qtool.checkpoint.untrusted import naming
from qtool.errors import UnsupportedError, UsageError, shortened
from qtool.evaluation.gguf_contents import check_is_model
from qtool.formats.gguf_mixes import ModelFacts, file_type_named
from qtool.formats.protocol import FORMATS
from qtool.formats.reading import DenseSource
from qtool.ggml_types import FLOAT_TYPES
from qtool.model.conversion import ConvertedTensor
from qtool.model.family import family_of
from qtool.pipeline.float_directory import PlannedFloats, plan_floats, unpacked
from qtool.pipeline.gguf_output import GgufFileWriter, PlannedGguf, verify_gguf, write_modelfile
from qtool.pipeline.gguf_plan import ConvertedModel, convert_model, plan_types, type_keys
from qtool.pipeline.gguf_sources import DirectorySource, GgufSource, TensorSource
from qtool.pipeline.outputs import CalibrationNote
from qtool.pipeline.progress import Progress
from qtool.recipe.schema import Export, Rule
from qtool.recipe.sizes import parse_size

FLOAT_FORMATS = ("safetensors", "safetensors:BF16", "safetensors:F16", "safetensors:F32")


@dataclass(frozen=True)
class ExportPlan:
    """What will be written from what."""

    checkpoint: Checkpoint
    output: PlannedGguf | PlannedFloats
    notes: tuple[tuple[str, str], ...]  # (code, message) of what the user should know
    rounded_again: int  # tensors that were quantized before and are quantized anew


@dataclass(frozen=True)
class ExportResult:
    """What was written and what that took."""

    plan: ExportPlan
    digests: Mapping[str, str]
    seconds: float
    peak_ram_bytes: int


def plan_export(
    checkpoint: Checkpoint,
    export: Export,
    rules: tuple[Rule, ...] = (),
    *,
    importance: bool = False,
    allow_requantize: bool = False,
) -> ExportPlan:
    """Plan a conversion from headers alone.

    Args:
        checkpoint: a directory of any format that qtool reads, or a GGUF file.
        export: the wanted format: `gguf:TYPE` or one of FLOAT_FORMATS.
        rules: types of single tensors.
        importance: whether statistics will weigh the errors; llama.cpp's mixtures depend on it.
        allow_requantize: round again what was rounded before.

    Raises:
        UnsupportedError: a format, family or combination that qtool does not do.
        UsageError: a second rounding that was not allowed; a type that does not fit, if strict.
        DamagedError: the model's files contradict each other.
    """
    if checkpoint.gguf:
        check_is_model(checkpoint.gguf[0])
    if export.gguf_type is None:
        return _plan_floats(checkpoint, export, rules, importance=importance)
    for rule in rules:
        if rule.type is None:
            raise UsageError(
                f"rule '{shortened(rule.match)}' gives bits or a group size, but a GGUF has types",
                f"write for example --override '{shortened(rule.match)}=Q6_K'",
            )
    if checkpoint.gguf:
        model = _model_of_gguf(checkpoint)
        output, warnings = _gguf(checkpoint, model, export, rules, importance=importance)
        with TensorReader(checkpoint.refs) as reader:
            source = GgufSource(checkpoint.refs, reader)
            again = _again(output, source)
            if not importance:
                output = _still_true(output, checkpoint, source)
    else:
        family = family_of(checkpoint.config)
        with TensorReader(checkpoint.refs) as reader:
            dense = DenseSource(checkpoint, reader)
            logical = unpacked(checkpoint, dense)
            model = convert_model(logical, family, pre=export.pre)
            output, warnings = _gguf(logical, model, export, rules, importance=importance)
            packed = DirectorySource(dense, logical.refs)
            again = _again(output, packed)
            notes = _notes(checkpoint, output, packed)
            warnings = (*warnings, *notes)
    if again and not allow_requantize:
        raise UsageError(
            f"{len(again)} tensors of {checkpoint.name} are quantized already, '{again[0]}' for "
            f"one, and {export.format} would round them a second time",
            "start from the float model, or accept the loss with --allow-requantize",
        )
    return ExportPlan(checkpoint, output, warnings, len(again))


def _plan_floats(
    checkpoint: Checkpoint, export: Export, rules: tuple[Rule, ...], *, importance: bool
) -> ExportPlan:
    if export.format not in FLOAT_FORMATS:
        packed = export.format in FORMATS
        rtn = f"qtool quantize MODEL -m rtn -f {export.format}"
        raise UnsupportedError(
            f"export does not write {export.format}",
            f"formats: gguf:TYPE, {', '.join(FLOAT_FORMATS)}"
            + (f"; to quantize without calibration: {rtn}" if packed else ""),
        )
    if rules or importance:
        raise UsageError(
            f"--{'override' if rules else 'statistics'} is for GGUF, but {export.format} rounds "
            "nothing",
            "leave it away, or choose -f gguf:TYPE",
        )
    dtype = export.format.partition(":")[2] or None
    with naming(checkpoint.gguf[0].path if checkpoint.gguf else checkpoint.path):
        output = plan_floats(checkpoint, dtype)
    return ExportPlan(checkpoint, output, output.warnings, 0)


def _gguf(
    checkpoint: Checkpoint,
    model: ConvertedModel,
    export: Export,
    rules: tuple[Rule, ...],
    *,
    importance: bool,
) -> tuple[PlannedGguf, tuple[tuple[str, str], ...]]:
    planned, warnings = plan_types(checkpoint, model, export, rules, importance=importance)
    kind = file_type_named(str(export.gguf_type)).name
    output = PlannedGguf(
        file_type=kind,
        stem=f"{checkpoint.name}-{kind}",
        tensors=planned,
        metadata={**model.metadata, **type_keys(export)},
        split_bytes=None if export.split_max_size is None else parse_size(export.split_max_size),
        chat_template=model.chat_template,
        modelfile=export.modelfile,
    )
    return output, (*model.warnings, *warnings)


# Keys of a GGUF that speak of its own files and quantization: another file says its own.
OWN_KEYS = ("split.", "quantize.imatrix.", "general.quantization_version", "general.alignment")


def _model_of_gguf(checkpoint: Checkpoint) -> ConvertedModel:
    """Return what a GGUF file says of itself, ready to be written again."""
    metadata = checkpoint.gguf[0].metadata
    kept = {k: v for k, v in metadata.items() if not k.startswith(OWN_KEYS)}
    architecture = str(_scalar(metadata, "general.architecture", ""))
    heads = int(_scalar(metadata, f"{architecture}.attention.head_count", 1))
    facts = ModelFacts(
        architecture=architecture,
        blocks=int(_scalar(metadata, f"{architecture}.block_count", 0)),
        heads=heads,
        key_value_heads=int(_scalar(metadata, f"{architecture}.attention.head_count_kv", heads)),
        experts=int(_scalar(metadata, f"{architecture}.expert_count", 0)),
    )
    tensors = tuple(
        ConvertedTensor(ref.name, ref.name, tuple(ref.shape), always_float=len(ref.shape) < 2)
        for ref in checkpoint.refs.values()
    )
    template = metadata.get("tokenizer.chat_template")
    return ConvertedModel(
        tensors, kept, facts, None if template is None else str(template.content), ()
    )


def _still_true(output: PlannedGguf, checkpoint: Checkpoint, source: GgufSource) -> PlannedGguf:
    """Return the output with what the file said of its statistics, where nothing is rounded."""
    quantized = [x for x in output.tensors if x.kind not in FLOAT_TYPES]
    if not quantized or any(source.kind(x.converted) != x.kind for x in quantized):
        return output
    metadata = checkpoint.gguf[0].metadata
    said = {k: v for k, v in metadata.items() if k.startswith("quantize.imatrix.")}
    return replace(output, metadata={**output.metadata, **said})


def _scalar(metadata: Mapping[str, Value], key: str, default: float | str) -> float | str:
    """Return a number or string; of a list, which differs by block, the first."""
    value = metadata.get(key)
    if value is None:
        return default
    content = value.content
    if isinstance(content, tuple):
        return content[0] if content else default
    return content


def _again(output: PlannedGguf, source: TensorSource) -> list[str]:
    """Return the tensors that are rounded already, and not to the values of their new type."""
    return [
        x.converted.name
        for x in output.tensors
        if x.kind not in FLOAT_TYPES and source.kind(x.converted) not in FLOAT_TYPES | {x.kind}
    ]


def _notes(
    checkpoint: Checkpoint, output: PlannedGguf, source: DirectorySource
) -> list[tuple[str, str]]:
    """Say what becomes of a packed model's integers."""
    packed = [x for x in output.tensors if source.kind(x.converted) not in FLOAT_TYPES]
    if not packed:
        return []
    same = sum(source.kind(x.converted) == x.kind for x in packed)
    declared = checkpoint.config["quantization_config"]
    messages = []
    if same:
        messages.append(f"{same} linears keep their integers and scales exactly")
    if same < len(packed):
        method = declared.get("quant_method")
        messages.append(f"{len(packed) - same} linears packed as {method} are dequantized")
    return [("dequantized" if same < len(packed) else "carried_over", "; ".join(messages))]


def run_export(
    plan: ExportPlan,
    destination: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    importance: Mapping[str, Tensor] | None = None,
    note: CalibrationNote | None = None,
) -> ExportResult:
    """Carry a plan out; the result has its name only when it is complete and reads back.

    Args:
        plan: from `plan_export`.
        destination: a file that ends in .gguf, or a directory.
        progress: told each tensor.
        overwrite: replace what is there once the new is complete.
        importance: llama.cpp's tensor name -> [C], weights of squared errors.
        note: what the file says of them.

    Raises:
        UsageError: the output is in the way.
        NumericalError: weights are not finite, or beyond what the type holds.
        CapacityError: the disk is full.
        DamagedError: the input is damaged, or what was written does not read back.
    """
    started = time.perf_counter()
    checkpoint, output = plan.checkpoint, plan.output
    if isinstance(output, PlannedGguf):
        output = output.noted(note)
        if destination.suffix == ".gguf":
            output = replace(output, stem=destination.stem)
        plan = replace(plan, output=output)
    sources = [part.path for part in checkpoint.gguf] or [checkpoint.path]
    place = output_place(destination, overwrite=overwrite, sources=sources)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(place)
        if isinstance(output, PlannedFloats):
            digests = output.write(checkpoint, directory, progress)
        else:
            digests = _write_gguf(checkpoint, output, directory, progress, importance)
        checkpoint.check_unchanged()
        place.commit()
    ram, _ = devices.peak_memory(torch.device("cpu"))
    return ExportResult(plan, digests, time.perf_counter() - started, ram)


def _write_gguf(
    checkpoint: Checkpoint,
    output: PlannedGguf,
    directory: Path,
    progress: Progress,
    importance: Mapping[str, Tensor] | None,
) -> Mapping[str, str]:
    writer = GgufFileWriter(output, checkpoint, directory, importance)
    left = Counter(_part(x.converted.name) for x in output.tensors)
    progress.start("exporting", len(left))

    def done(name: str) -> None:
        part = _part(name)
        left[part] -= 1
        if not left[part]:
            progress.advance(part)

    with _open_source(checkpoint) as source, torch.no_grad():
        writer.fill(source, done)
    digests = writer.close()
    progress.finish()
    verify_gguf(output, directory)
    if output.modelfile:
        for warning in write_modelfile(output, directory):
            progress.warn("modelfile", warning)
    return digests


def _part(name: str) -> str:
    """Return the block that a tensor belongs to, or its own name outside of blocks."""
    pieces = name.split(".")
    return f"block {pieces[1]}" if pieces[0] == "blk" and len(pieces) > 2 else pieces[0]


@contextlib.contextmanager
def _open_source(checkpoint: Checkpoint) -> Iterator[TensorSource]:
    refs: Mapping[str, TensorRef] = checkpoint.refs
    with TensorReader(refs) as reader:
        if checkpoint.gguf:
            yield GgufSource(refs, reader)
        else:
            source = DenseSource(checkpoint, reader)
            yield DirectorySource(source, source.logical_refs())
