# ruff: noqa: INP001 - a script, not a package
"""Write docs/reference/{cli,recipe,families,memory}.md from the code that they describe.

    python docs/generate.py            write them
    python docs/generate.py --check    exit 1 if one of them is not what would be written

Imports the command line, the recipe's schema and the family tables: no torch, no transformers.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

REFERENCE = Path(__file__).parent / "reference"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkout that this file belongs to, wherever it is run

from qtool import memory  # noqa: E402
from qtool.cli.app import EXAMPLES, app  # noqa: E402
from qtool.memory.catalogue import rows, shape_of_row  # noqa: E402
from qtool.memory.file_sizes import weight_bytes  # noqa: E402
from qtool.model.family import FAMILIES, Family  # noqa: E402
from qtool.recipe import schema  # noqa: E402

MARK = "<!-- Written by docs/generate.py; change the code and run `make docs`. -->"


def main() -> int:
    """Write the pages, or with --check only compare them."""
    pages = {
        "cli.md": cli_page(),
        "recipe.md": recipe_page(),
        "families.md": families_page(),
        "memory.md": memory_page(),
    }
    if "--check" not in sys.argv[1:]:
        REFERENCE.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            (REFERENCE / name).write_text(text, encoding="utf-8", newline="\n")
        return 0
    stale = [name for name, text in pages.items() if _read(REFERENCE / name) != text]
    for name in stale:
        sys.stderr.write(f"docs/reference/{name} is not current: run make docs\n")
    return 1 if stale else 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", MARK, *parts]) + "\n"


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    # A bar would end the cell, even inside code.
    cells = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


# --- the command line ------------------------------------------------------------------------


def cli_page() -> str:
    """Return every command with its arguments, options, variables and examples."""
    parts = [
        f"{app.info.help}",
        "A setting comes from its flag, else from its `QTOOL_*` variable, else from the recipe, "
        "else it has its default. Underscores work in place of the dashes inside a flag. The "
        "result goes to stdout, progress and messages to stderr. "
        "[Exit codes](../explanation/errors-and-exit-codes.md), [recipe keys](recipe.md), "
        "[JSON schemas](schemas/).",
    ]
    for command in app.registered_commands:
        function: Any = command.callback
        name = command.name or function.__name__
        parts += _command(name, function)
    return _page("Command line", *parts)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a command's function as typer sees it."""

    info: Any  # typer's ArgumentInfo or OptionInfo
    kind: Any  # the Python type, without None
    default: Any

    @property
    def is_argument(self) -> bool:
        """Whether it stands by itself, without a flag."""
        return isinstance(self.info, typer.models.ArgumentInfo)


def _parameters(function: Any) -> list[Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = hints[name]
        default: Any = parameter.default
        if isinstance(default, typer.models.ParameterInfo):  # the older way to declare one
            info, default, kind = default, default.default, annotation
        else:
            kind, info = typing.get_args(annotation)[:2]
        found.append(Parameter(info, _without_none(kind), default))
    return found


def _without_none(kind: Any) -> Any:
    choices = [a for a in typing.get_args(kind) if a is not type(None)]
    return choices[0] if type(None) in typing.get_args(kind) else kind


def _command(name: str, function: Any) -> list[str]:
    parameters = _parameters(function)
    arguments = [p for p in parameters if p.is_argument]
    options = [p for p in parameters if not p.is_argument]
    shown = "".join(f" {_argument(p)}" for p in arguments)
    parts = [f"## qtool {name}", f"`qtool {name} [OPTIONS]{shown}`", inspect.getdoc(function) or ""]
    for argument in arguments:
        default = argument.info.show_default
        ending = f" Default: {default}." if isinstance(default, str) else ""
        parts.append(f"`{argument.info.metavar}`: {argument.info.help}{ending}")
    rows = [(_flags(p), p.info.help or "", _default(p), _variable(p)) for p in options]
    parts.append(_table(("option", "", "default", "variable"), rows))
    parts.append("\n".join(["```console", *(f"$ {line}" for line in EXAMPLES[name]), "```"]))
    return parts


def _argument(parameter: Parameter) -> str:
    many = "..." if typing.get_origin(parameter.kind) is list else ""
    shown = f"{parameter.info.metavar}{many}"
    return shown if parameter.default is inspect.Parameter.empty else f"[{shown}]"


def _flags(parameter: Parameter) -> str:
    names = [parameter.info.default, *(parameter.info.param_decls or ())]
    flags = ", ".join(name for name in names if isinstance(name, str))
    if parameter.kind is bool:
        return f"`{flags.replace('/', ' / ')}`"
    return f"`{flags} {parameter.info.metavar or _value_name(parameter.kind)}`"


def _value_name(kind: Any) -> str:
    kind = next(iter(typing.get_args(kind)), kind)
    return {int: "NUMBER", float: "NUMBER", Path: "PATH"}.get(kind, "TEXT")


def _default(parameter: Parameter) -> str:
    if isinstance(parameter.info.show_default, str):
        return parameter.info.show_default
    if parameter.default is None or isinstance(parameter.default, bool):
        return ""
    return f"`{parameter.default}`"


def _variable(parameter: Parameter) -> str:
    return f"`{parameter.info.envvar}`" if parameter.info.envvar else ""


# --- the recipe ------------------------------------------------------------------------------


def recipe_page() -> str:
    """Return every key of a recipe with its type, default and comment."""
    rows: list[tuple[str, ...]] = []
    sections: dict[str, type[BaseModel]] = {}
    _rows(schema.Recipe, "", rows, sections)
    parts = [
        "A recipe is one YAML file. Every key but `version` and `model` may be left out, and on "
        "the command line MODEL stands in for `model`. An unknown key is an error that names the "
        "nearest one. `--set key=value` reaches every key by its dotted name, items of lists by "
        "their number: `--set rules.0.bits=8`. The recipe beside a result has every key filled in.",
        _table(("key", "type", "default", ""), rows),
    ]
    for path, section in sections.items():
        parts.append(f"`{path}`: {_sentence(section)}")
    return _page("Recipe", *parts)


def _rows(
    section: type[BaseModel],
    prefix: str,
    rows: list[tuple[str, ...]],
    sections: dict[str, type[BaseModel]],
) -> None:
    comments = _comments(section)
    for name, field in section.model_fields.items():
        inner, many = _inner(field.annotation)
        path = f"{prefix}{name}"
        if inner is not None:
            path += "[]" if many else ""
            sections[path] = inner
            _rows(inner, f"{path}.", rows, sections)
            continue
        kind = _kind(field.annotation, field.metadata)
        rows.append((f"`{path}`", kind, _shown(field.default), comments.get(name, "")))


def _inner(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the section that a key holds, if it does, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if typing.get_origin(annotation) is tuple:
        return _inner(_plain(typing.get_args(annotation)[0]))[0], True
    return None, False


def _plain(annotation: Any) -> Any:
    """Return a type without its Annotated wrapping."""
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def _kind(annotation: Any, limits: list[Any]) -> str:
    """Return a type in words, with its limits."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *extra = typing.get_args(annotation)
        found = [item for one in extra for item in getattr(one, "metadata", [one])]
        return _kind(inner, [*limits, *found])
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        kind = ", ".join(f"`{value}`" for value in arguments)
    elif origin in {typing.Union, types.UnionType}:
        return _kind(next(a for a in arguments if a is not type(None)), limits)
    elif origin is tuple:
        return f"list of: {_kind(arguments[0], limits)}"
    else:
        kind = WORDS.get(annotation, str(annotation))
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    bounds = [f"{s} {getattr(x, k)}" for x in limits for k, s in signs if hasattr(x, k)]
    # The upper limit of a seed is a property of 64 bits, not worth a line.
    shown = " and ".join(bound for bound in bounds if len(bound) < 10)
    return f"{kind} {shown}".rstrip()


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "**required**"
    if default is None:
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default}`" if default != "" else ""


def _comments(section: type[BaseModel]) -> dict[str, str]:
    """Return field -> the comment beside or above it in the source."""
    source = inspect.getsource(section)
    lines = source.splitlines()
    found = {}
    body = typing.cast("ast.ClassDef", ast.parse(source).body[0]).body
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        last = lines[(node.end_lineno or node.lineno) - 1]
        beside = last[node.end_col_offset or 0 :].strip().removeprefix("#").strip()
        above: list[str] = []
        row = node.lineno - 2
        while row >= 0 and lines[row].strip().startswith("#"):
            above.insert(0, lines[row].strip().removeprefix("#").strip())
            row -= 1
        # None in the schema is null, or left out, in YAML.
        found[node.target.id] = (beside or " ".join(above)).replace("None:", "null:")
    return found


def _sentence(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


# --- the families ----------------------------------------------------------------------------


def families_page() -> str:
    """Return every model family with its taps and scale pairs."""
    overview = [
        (f"[{family.name}](#{_anchor(family.name)})", f"`{family.model_type}`",
         f"`{family.gguf_architecture}`")
        for family in FAMILIES.values()
    ]  # fmt: skip
    parts = [
        "The architectures that qtool calibrates, quantizes and evaluates. A *tap* is a set of "
        "linears that read one input, so that they share its statistics. A *scale pair* names "
        "the norm or linear in front of a tap into which AWQ folds the inverse of its scale.",
        _table(("family", "`model_type` of config.json", "llama.cpp's name"), overview),
    ]
    for family in FAMILIES.values():
        parts += _family(family)
    return _page("Model families", *parts)


def _anchor(name: str) -> str:
    kept = "".join(c for c in name.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def _family(family: Family) -> list[str]:
    pairs = {pair.tap: pair for pair in family.pairs}
    rows = []
    for tap in family.taps:
        pair = pairs.get(tap.name)
        where = "nowhere: AWQ leaves this tap as it is"
        if pair is not None:
            part = {"all": "", "value": ", its value rows", "up": ", its second half"}[pair.part]
            heads = ", shared by the heads of a group" if pair.through_heads else ""
            where = f"`{pair.previous}`{part}{heads}"
        rows.append((f"`{tap.name}`", ", ".join(f"`{x}`" for x in tap.linears), where))
    facts = f"Blocks at `{family.blocks}`, output head `{family.head}`."
    if family.norm_offset:
        facts += f" Norms multiply by their stored weight plus {family.norm_offset:g}."
    table = _table(("tap", "linears", "scale folded into"), rows)
    return [f"## {family.name}", facts, table]


# --- sizes of files ---------------------------------------------------------------------------

PUBLISHED = Path(memory.__file__).parent / "published.json"


def memory_page() -> str:
    """Return the sizes of published files beside their estimates, and the catalogue."""
    entries = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    lines = [_published(entry) for entry in entries]
    worst = max(abs(entry["bytes"] - estimate) / entry["bytes"] for entry, estimate, _ in lines)
    parts = [
        "Sizes of GGUF files from hyper-parameters alone, beside those of files on the Hugging "
        "Face hub. Tensors are exact: what differs is in the headers, which hold the tokenizer, "
        "the chat template and what the publisher added. The header of each tokenizer comes from "
        f"one published file. The largest difference is {worst:.3%}.",
        "*Recipe* is the year of the llama.cpp that the estimate is for: older files have other "
        "mixes (`qtool/memory/gguf_sizes.py` says which).",
        _table(
            ("model", "type", "recipe", "published, bytes", "estimate, bytes", "difference"),
            [
                (
                    f"[{entry['model']}]({entry['by']})",
                    entry["type"] + (" (imatrix)" if entry.get("importance") else ""),
                    str(recipe),
                    f"{entry['bytes']:,}",
                    f"{estimate:,}",
                    f"{(estimate - entry['bytes']) / entry['bytes']:+.4%}",
                )
                for entry, estimate, recipe in lines
            ],
        ),
        "## Catalogue",
        "Models whose shapes qtool knows without a file. Any other is read from its config.json.",
        _table(
            ("model", "size", "parameters", "Q4_K_M, bytes"),
            [
                (
                    f"[{row.name}]({row.source})",
                    f"`{row.size}`",
                    f"{shape_of_row(row.name).parameters:,}",
                    f"{weight_bytes(shape_of_row(row.name), 'gguf:Q4_K_M').file_bytes:,}",
                )
                for row in rows()
            ],
        ),
    ]
    return _page("Memory", *parts)


def _published(entry: dict[str, Any]) -> tuple[dict[str, Any], int, int]:
    shape = shape_of_row(entry["model"])
    recipe = entry.get("recipe", shape.recipe)
    found = weight_bytes(
        shape, f"gguf:{entry['type']}", importance=entry.get("importance"), recipe=recipe
    )
    return entry, found.file_bytes, recipe


if __name__ == "__main__":
    sys.exit(main())
