"""Read a recipe, change it from the command line, and write it out with every default.

Whatever is wrong is one line that names the place, the key and the value, and a hint.
"""

from __future__ import annotations

import copy
import difflib
import re
import stat
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qtool.errors import UsageError, shortened
from qtool.recipe.schema import Recipe, Section
from qtool.recipe.yaml_text import MAX_BYTES, read_yaml
from qtool.registry import nearest

Kind = TypeVar("Kind", bound=Section)
Keys = tuple[int | str, ...]

UNKNOWN = {"extra_forbidden", "invalid_key"}  # pydantic's names for a key that does not exist

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a mapping of keys to values",
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UsageError: no such file, not YAML, an unknown key or a value that does not fit.
    """
    return parse_recipe(read_mapping(path), str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the keys of a recipe file without judging them, for `apply_overrides`.

    Raises:
        UsageError: no such file, not UTF-8, not YAML, or not a mapping.
    """
    shown = str(path)
    start = "recipes to start from: recipes/*.yaml"
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            kind = "a directory" if stat.S_ISDIR(state.st_mode) else "not a file"
            raise UsageError(f"cannot read recipe '{shown}': it is {kind}", start)
        if state.st_size > MAX_BYTES:
            raise UsageError(
                f"{shown}: {state.st_size} bytes, more than the {MAX_BYTES} of a recipe", start
            )
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{shown}: not UTF-8 text, offset {error.start}", "save the recipe as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "not a valid path"
        raise UsageError(f"cannot read recipe '{shown}': {why}", start) from error
    data = read_yaml(text, str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise UsageError(
            f"{path}: holds {found} where a mapping of keys was expected",
            "a recipe starts with 'version: 1' and 'model: {id: ...}'",
        )
    return data


def parse_recipe(data: dict[str, Any], place: str) -> Recipe:
    """Check the keys and values of a recipe; `place` is where they come from, for messages.

    Raises:
        UsageError: an unknown key or a value that does not fit.
    """
    return validated(Recipe, data, place)


def validated(kind: type[Kind], data: Any, place: str) -> Kind:
    """Return `data` as a section of that kind.

    Raises:
        UsageError: the first thing that is wrong, unknown keys before all else.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = _causes(error)
        # A misspelt key is the cause of the missing one, so it comes first.
        problems.sort(key=lambda problem: problem["type"] not in UNKNOWN)
        raise _usage_error(kind, problems[0], place, len(problems) - 1) from error


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of a recipe's keys with `key.path=value` settings applied, later ones last.

    Values are YAML; an item of a list is named by its number, as in `rules.0.bits=8`.

    Raises:
        UsageError: not `key=value`, an unknown key, or a value that does not fit there.
    """
    result = copy.deepcopy(data)
    for override in overrides:
        place = f"--set {shortened(override)}"
        path, separator, value = override.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise UsageError(f"{place}: not KEY=VALUE", "for example --set quantize.bits=8")
        location = _assign(result, keys, read_yaml(value, place), place)
        try:
            Recipe.model_validate(result)
        except ValidationError as error:
            for problem in _causes(error):
                # Only what this setting did: the file's own faults are named with the file.
                if problem["loc"][: len(location)] == location and problem["type"] != "missing":
                    raise _usage_error(Recipe, problem, place, 0) from error
    return result


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with every key, in the order of the schema; `load_recipe` reads it back.

    Letters stay as they are, unless there is something among them that a terminal would obey.
    """
    data = recipe.model_dump(mode="json")
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    if text.replace("\n", "").isprintable():
        return text
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=False, width=100)


def _assign(data: Any, keys: list[str], value: Any, place: str) -> Keys:
    """Set the value at a dotted path, making sections on the way; return the path."""
    kind: type[Section] | None = Recipe
    location: Keys = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        step: int | str = key
        if isinstance(data, list):
            if not (key.isdecimal() and int(key) < len(data)):
                raise UsageError(
                    f"{place}: '{_dotted(location)}' has no item {key}",
                    f"its items are numbered from 0; it has {len(data)}",
                )
            step = int(key)
        elif not isinstance(data, dict) or kind is None or key not in kind.model_fields:
            known = kind if isinstance(data, dict) else None
            hint = _hint(key, known) if known else f"'{_dotted(location)}' is a single value"
            raise UsageError(f"{place}: unknown key '{_dotted((*location, key))}'", hint)
        else:
            if not last and not data.get(key):
                data[key] = _empty(kind, (*location, key), place)
            kind = _section(kind, key)
        location = (*location, step)
        if last:
            data[step] = value
        data = data[step]
    return location


def _empty(kind: type[Section], location: Keys, place: str) -> dict[str, Any] | None:
    """Return what a setting inside a key without a value starts from: an empty section."""
    key, path = str(location[-1]), _dotted(location)
    if get_origin(kind.model_fields[key].annotation) is tuple:
        raise UsageError(
            f"{place}: '{path}' is a list without items", f"set it as a whole: {path}=[...]"
        )
    return {} if _section(kind, key) else None


def _hint(key: str, kind: type[Section]) -> str:
    """Name the nearest key of a section; for the recipe itself, a key of its sections too."""
    names = list(kind.model_fields)
    if not difflib.get_close_matches(key, names, n=1):
        for name in names:
            section = _section(kind, name)
            if section and key in section.model_fields:
                return f"did you mean '{name}.{key}'?"
    return nearest(key, names)


def _section(kind: type[BaseModel], key: str) -> type[Section] | None:
    """Return the section, or the section of each item, that a key holds; None for a value."""
    waiting = [kind.model_fields[key].annotation]
    while waiting:
        annotation: Any = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
        waiting += get_args(annotation)
    return None


def _causes(error: ValidationError) -> list[ErrorDetails]:
    """Return the problems without those that only follow from one further inside."""
    problems = error.errors(include_url=False)
    inside = [problem["loc"] for problem in problems]
    return [
        problem
        for problem in problems
        if not any(
            len(loc) > len(problem["loc"]) and loc[: len(problem["loc"])] == problem["loc"]
            for loc in inside
        )
    ]


def _usage_error(kind: type[Section], problem: ErrorDetails, place: str, more: int) -> UsageError:
    """Say one pydantic problem in a line, with the nearest key or what is expected."""
    location = problem["loc"]
    path = _dotted(location)
    others = f"; {more} more to correct after it" if more else ""
    if problem["type"] in UNKNOWN:
        owner: type[Section] | None = kind
        for key in location[:-1]:
            owner = _section(owner, key) if owner and isinstance(key, str) else owner
        hint = _hint(str(location[-1]), owner) if owner else "remove it"
        return UsageError(f"{place}: unknown key '{path}'", hint + others)
    if problem["type"] == "missing":
        return UsageError(f"{place}: the key '{path}' is missing", f"add it{others}")
    subject = f"'{path}'" if path else "it"
    value = problem["input"]
    # A whole section is not worth repeating; a value is.
    shown = "" if isinstance(value, dict | list | BaseModel) else f" is {_shown(value)},"
    hint = f"correct {subject}"
    if problem["type"] == "literal_error" and isinstance(value, str):
        words = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        hint = nearest(value, words) if words else hint
    return UsageError(f"{place}: {subject}{shown} must be {_expected(problem)}", hint + others)


def _expected(problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    if problem["type"] == "value_error":
        return str(context["error"])
    if problem["type"] == "literal_error":
        return str(context["expected"])
    if "max_length" in context and problem["type"] == "string_too_long":
        return f"text of at most {context['max_length']} characters"
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if name in context:
            return f"{sign} {context[name]}"
    return EXPECTED.get(problem["type"], problem["msg"].lower())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as YAML writes it
    return "empty" if value is None else shortened(repr(value))


def _dotted(location: Keys) -> str:
    return shortened(".".join(map(str, location)))
