"""The keys of a recipe, their types and defaults; a key that is not here is an error.

Keys that may be left open are None until `resolved` decides them from the others. Paths are
relative to the working directory. Imports pydantic only, so that `--help` stays fast.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qtool.errors import UsageError, shortened
from qtool.ggml_types import GGML_TYPES
from qtool.recipe.sizes import MOST, parse_size

Item = TypeVar("Item")
# YAML has lists, a frozen record wants tuples: the one conversion that a strict model allows.
Many = Annotated[tuple[Item, ...], Field(strict=False)]

Method = Literal["rtn", "gptq", "awq", "awq+gptq"]
Bits = Literal[2, 3, 4, 8]
Target = Literal["vllm", "transformers", "llama.cpp", "ollama"]
Metric = Literal["ppl", "kld", "top1", "flips"]
GroupSize = Annotated[int, Field(ge=-1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Length = Annotated[int, Field(ge=2, le=MOST)]

# GGUF file types that are rounded to nearest unless a method is named.
UNCALIBRATED_TYPES = frozenset({"F32", "F16", "BF16", "Q8_0", "Q6_K"})

LONGEST_GATE = 500  # characters; a task's name has at most 100
LONGEST_PATTERN = 4096  # characters of a rule's `match`

PER_CHANNEL = -1  # group_size: one scale for each output row
PER_TENSOR = 0  # group_size: one scale for the whole matrix

# What each name may be compared with is told when the figures are known: `evaluation.gates`.
_GATE = re.compile(
    r"[a-z][a-z0-9_.:-]*\s*"
    r"(==\s*same|(<=|>=|<|>)\s*-?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?\s*(%|[kmgt]?i?b?))",
    re.IGNORECASE,
)


class Section(BaseModel):
    """A mapping in the recipe: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Metadata(Section):
    """What the recipe calls itself; changes nothing."""

    name: str = ""
    description: str = ""


class Model(Section):
    """What is quantized: a directory or a hub id at a revision."""

    id: Annotated[str, Field(min_length=1)]
    revision: str | None = None


class Dataset(Section):
    """One source of calibration text: exactly one of `name`, `path` and `hf`."""

    name: Literal["builtin"] | None = None
    path: str | None = None
    hf: str | None = None  # owner/name or owner/name/configuration
    split: str | None = None  # of a hub dataset
    column: str | None = None  # None: a chat column, then `text`
    windows: Count | None = None  # None: an even share of the rest

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if sum(value is not None for value in (self.name, self.path, self.hf)) != 1:
            raise ValueError("exactly one of the keys name, path and hf")
        if self.split is not None and self.hf is None:
            raise ValueError("the key split only beside hf")
        if self.column is not None and self.name is not None:
            raise ValueError("no key column beside name")
        return self


class Calibration(Section):
    """What the model is run on to learn which inputs its weights see."""

    datasets: Annotated[Many[Dataset], Field(min_length=1)] = (Dataset(name="builtin"),)
    sequence_length: Length = 2048  # tokens of a window
    windows: Count = 128
    chat_template: Literal["auto", "on", "off"] = "auto"

    @field_validator("chat_template", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        # YAML reads a bare on or off as a truth value.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Quantize(Section):
    """How weights are rounded."""

    method: Method | None = None  # None: awq up to 4 bits, rtn at 8
    bits: Bits = 4
    group_size: GroupSize = 128  # columns; -1: one scale a row; 0: one scale a matrix
    symmetric: bool | None = None  # None: asymmetric for awq and the awq format, else symmetric
    clip: bool | None = None  # search scales for least squared error; None: all but rtn
    act_order: bool = True  # gptq: round the columns with the largest inputs first
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.05  # gptq: fraction of mean(diag H)
    # gptq: how often all columns are chosen anew afterwards, with scales moved in between.
    sweeps: Annotated[int, Field(ge=0, le=100)] = 3
    # How far each layer is aimed at what the float model computes, from the inputs it really gets:
    # 0 rounds the weights as they are, 1 corrects in full for the layers before.
    error_propagation: Annotated[float, Field(ge=0, le=1)] = 0.5


class Rule(Section):
    """What is different for the modules that `match` names."""

    match: Annotated[str, Field(min_length=1, max_length=LONGEST_PATTERN)]
    keep: bool = False  # leave in the model's own dtype
    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    type: str | None = None  # gguf: the tensor's type, such as Q6_K; other formats pass it by
    why: str = ""

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of `quantize` that this rule replaces."""
        named = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {key: value for key, value in named.items() if value is not None}

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str | None) -> str | None:
        return None if value is None else _ggml_type(value)

    @field_validator("match")
    @classmethod
    def _expression(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"a regular expression after 're:' ({shortened(str(error))})"
                ) from error
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if self.keep == bool(self.changes or self.type):
            raise ValueError("either keep: true or some of bits, group_size, symmetric and type")
        return self


class Export(Section):
    """One output: its format, and who shall read it; all keys below `target` are for gguf."""

    format: Annotated[str, Field(min_length=1)]
    target: Target | None = None
    modelfile: bool = False  # write an Ollama Modelfile beside it
    output_type: str | None = None  # type of the output projection, such as Q8_0
    embed_type: str | None = None  # type of the token embeddings
    pre: str | None = None  # llama.cpp's name of the pre-tokenizer, where it is not recognised
    strict: bool = False  # refuse rows that the type's blocks do not divide
    split_max_size: str | None = None  # such as 4GB: several files of at most that

    @property
    def gguf_type(self) -> str | None:
        """The file type of a gguf output, such as `Q4_K_M`; None for other formats."""
        name, _, kind = self.format.partition(":")
        return kind.upper() if name.lower() == "gguf" else None

    @field_validator("output_type", "embed_type")
    @classmethod
    def _known_type(cls, value: str | None) -> str | None:
        return None if value is None else _ggml_type(value)

    @field_validator("split_max_size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        return None if value is None else _parsed_size(value)

    @model_validator(mode="after")
    def _names_a_type(self) -> Export:
        if self.format.lower() == "gguf" or self.gguf_type == "":
            raise ValueError("a gguf format with its type, such as gguf:Q4_K_M")
        only_gguf = (self.output_type, self.embed_type, self.pre, self.split_max_size)
        if self.gguf_type is None and (any(only_gguf) or self.strict or self.modelfile):
            raise ValueError(
                "a gguf format where modelfile, output_type, embed_type, pre, strict or "
                "split_max_size is given"
            )
        return self


class Rung(Section):
    """One step of a ladder: what differs from `quantize`; keys left out are those of there."""

    method: Method
    bits: Bits | None = None  # of packed formats; a gguf type has its own
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    format: str | None = None  # null: the method's own


class Evaluation(Section):
    """How the result is compared with the original; no metrics, no evaluation."""

    metrics: Many[Metric] = ("ppl", "kld", "top1")
    data: Annotated[str, Field(min_length=1)] = "builtin"
    context: Length = 2048  # tokens of a window
    windows: Count | None = 16  # None: all


class Recipe(Section):
    """Everything that decides the bytes of a result."""

    version: Literal[1]
    metadata: Metadata = Metadata()
    model: Model
    calibration: Calibration = Calibration()
    quantize: Quantize = Quantize()
    rules: Many[Rule] = ()
    export: Many[Export] = ()  # empty: one output in the method's own format
    eval: Evaluation = Evaluation()
    ladder: Many[Rung] = ()  # tried from the largest on; the smallest that passes all gates is kept
    gates: Many[str] = ()  # conditions on the result, such as kld<=0.05: exit code 3 if one fails
    output: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    max_shard_size: str = "5GB"

    @field_validator("gates")
    @classmethod
    def _comparisons(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for gate in value:
            if len(gate) > LONGEST_GATE or not _GATE.fullmatch(gate.strip()):
                raise ValueError(
                    f"comparisons such as kld<=0.05 or size<=5GB, not '{shortened(gate)}'"
                )
        return value

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: str) -> str:
        return _parsed_size(value)


def _parsed_size(value: str) -> str:
    try:
        parse_size(value)
    except UsageError as error:  # pydantic adds the key to what it says
        raise ValueError("a size such as 5GB or 2GiB") from error
    return value


def _ggml_type(value: str) -> str:
    named = {name.upper(): name for name in GGML_TYPES}
    if value.upper() not in named:
        raise ValueError(f"a type of ggml such as Q6_K or F16, not '{shortened(value)}'")
    return named[value.upper()]


def resolved(recipe: Recipe) -> Recipe:
    """Return the recipe with every open key of `quantize` and `export` decided."""
    quantize = recipe.quantize
    method = quantize.method or _default_method(recipe)
    symmetric = quantize.symmetric
    if symmetric is None:
        symmetric = method != "awq" and all(export.format != "awq" for export in recipe.export)
    clip = method != "rtn" if quantize.clip is None else quantize.clip
    decided = quantize.model_copy(
        update={"method": method, "symmetric": symmetric, "clip": clip},
    )
    export = recipe.export or (Export(format=_default_format(decided, recipe.rules)),)
    return recipe.model_copy(update={"quantize": decided, "export": export})


def _default_method(recipe: Recipe) -> Method:
    types = [export.gguf_type for export in recipe.export]
    if types and None not in types:
        # Types of 6 bits and more lose so little that calibration is not worth its time.
        return "rtn" if set(types) <= UNCALIBRATED_TYPES else "awq+gptq"
    return "rtn" if recipe.quantize.bits == 8 else "awq"


def _default_format(quantize: Quantize, rules: tuple[Rule, ...]) -> str:
    """Return the format that most engines read among those that hold what is asked for."""
    mixed = any(rule.changes for rule in rules)  # the awq format knows one scheme for all
    if quantize.method in {"gptq", "awq+gptq"} or quantize.bits in {2, 3}:
        return "gptq"
    plain = quantize.group_size != PER_TENSOR and not mixed
    if quantize.method == "awq" and quantize.bits == 4 and not quantize.symmetric and plain:
        return "awq"
    return "compressed-tensors"
