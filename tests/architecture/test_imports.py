"""The layers of the design, as a literal table, against every import in the package."""

import ast
from pathlib import Path

import pytest

import qtool

ROOT = Path(qtool.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LOWEST = {"registry", "errors", "device", "json_text", "ggml_types"}
LOW = {"grids", "checkpoint", "recipe"} | LOWEST
MIDDLE = {"evaluation", "formats", "memory", "methods", "calibration", "model"} | LOW

# Package or module directly below qtool -> those it may import. Its own modules it always may, and
# `from qtool import __version__` everybody may.
ALLOWED = {
    "__init__": set(),
    "__main__": {"cli", "console", "errors"},
    "cli": {"pipeline", "console"} | MIDDLE,
    "console": {"pipeline", "checkpoint"} | LOWEST,  # the reports it shows
    "pipeline": MIDDLE,
    "evaluation": {"model", "formats", "calibration"} | LOW,
    "formats": LOW,
    "methods": LOW,
    "memory": {"formats", "model"} | LOW,
    "model": {"calibration"} | LOW,
    "calibration": LOW,
    "grids": LOWEST,
    "checkpoint": LOWEST,
    "recipe": LOWEST,
    "device": {"errors"},
    "registry": {"errors"},
    "errors": set(),
    "json_text": set(),
    "ggml_types": set(),
}
MOST_LINES = 400
VAGUE = {"utils", "util", "helpers", "helper", "base", "common", "misc"}


def relative(path):
    return path.relative_to(ROOT.parent).as_posix()


def part_of(path):
    """The package or module directly below qtool in which a file lies."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path):
    """(line, dotted name) of everything imported anywhere in a file, in functions too."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*above, *filter(None, [node.module])))
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def own_imports(path):
    """(line, part of qtool) of what a file imports from the package."""
    for line, name in imported_modules(path):
        root, _, rest = name.partition(".")
        first = rest.partition(".")[0]
        if root == "qtool" and first and first != "__version__":
            yield line, first


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path):
    part = part_of(path)
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    wrong = [
        f"{relative(path)}:{line} imports qtool.{target}"
        for line, target in own_imports(path)
        if target != part and target not in ALLOWED[part]
    ]
    assert not wrong


def test_the_table_itself_has_no_cycles():
    done = set()
    while len(done) < len(ALLOWED):
        ready = {part for part in ALLOWED if part not in done and ALLOWED[part] <= done}
        assert ready, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_methods_and_formats_see_neither_each_other_nor_models():
    for part, strangers in (
        ("methods", {"formats", "model", "calibration"}),
        ("formats", {"methods", "model", "calibration"}),
    ):
        assert not ALLOWED[part] & strangers


def test_only_the_command_line_sees_the_console():
    assert {part for part, targets in ALLOWED.items() if "console" in targets} == {
        "cli",
        "__main__",
    }


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_stays_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES, f"{relative(path)} has {lines} lines: find the seam and cut there"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_module_has_a_name_that_says_nothing(path):
    assert not VAGUE & set(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_the_device_module_speaks_of_cuda(path):
    if path == ROOT / "device.py":
        pytest.skip("device.py is the one that may")
    attributes = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr == "cuda"
        and not (isinstance(node.value, ast.Call))  # tensor.cuda() would be a device move
    ]
    imports = [line for line, name in imported_modules(path) if name.startswith("torch.cuda")]
    moves = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "cuda"
    ]
    assert (attributes, imports, moves) == ([], [], [])


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_the_console_prints(path):
    if path == ROOT / "console.py":
        pytest.skip("console.py is the one that may")
    prints = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"print", "input"}
    ]
    assert not prints


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_exception_is_swallowed_wholesale(path):
    wholesale = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
    ]
    # Where what escapes gets its exit code, and where a thread hands it to the one that waits.
    allowed = {"cli/app.py", "cli/session.py", "model/pausing.py"}
    assert not wholesale or path.relative_to(ROOT).as_posix() in allowed


def test_the_checks_see_what_they_forbid(tmp_path, monkeypatch):
    """A file that breaks the rules in every way is caught, function-level imports included."""
    package = tmp_path / "qtool"
    (package / "formats").mkdir(parents=True)
    bad = package / "formats" / "bad.py"
    bad.write_text(
        "from qtool import methods\n"
        "import torch.cuda.amp\n"
        "def late():\n"
        "    from qtool.model.family import Family\n"
        "    import qtool.console\n"
        "    from ..calibration import moments\n"
        "    from . import protocol\n"
    )
    monkeypatch.setattr(f"{__name__}.ROOT", package)
    found = [target for _, target in own_imports(bad) if target != "formats"]
    assert found == ["methods", "model", "console", "calibration"]
    assert "torch.cuda.amp" in [name for _, name in imported_modules(bad)]
