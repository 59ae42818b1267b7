"""What is refused before llama.cpp sees a GGUF file, and what becomes of its own refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

import qtool
from qtool.checkpoint.gguf_header import GgufContents
from qtool.checkpoint.gguf_values import Value, flag, text, u32
from qtool.checkpoint.header import TensorRef
from qtool.errors import CapacityError, DamagedError, UnsupportedError
from qtool.evaluation import llama_cpp, llama_trial
from qtool.evaluation.gguf_model import check_continues_text
from qtool.evaluation.llama_cpp import VERSION, check_installed
from qtool.evaluation.llama_trial import check_runs

PATH = Path("some.gguf")
MODEL: dict[str, Value] = {
    "general.architecture": text("llama"),
    "general.type": text("model"),
    "llama.block_count": u32(2),
}
TENSORS = (TensorRef("token_embd.weight", "F32", (4, 32), PATH, 0, 512),)


def contents(tensors=TENSORS, **changes):
    metadata = MODEL | {key.replace("__", "."): value for key, value in changes.items()}
    return GgufContents(PATH, 3, 32, metadata, tensors, 0, 512)


def test_a_language_model_passes_with_and_without_its_type():
    check_continues_text(contents())
    check_continues_text(contents(llama__attention__causal=flag(True)))
    without = {key: value for key, value in MODEL.items() if key != "general.type"}
    check_continues_text(GgufContents(PATH, 3, 32, without, TENSORS, 0, 512))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general__type": text("imatrix")}, "an importance matrix"),
        ({"general__type": text("adapter")}, "an adapter"),
        ({"general__type": text("mmproj")}, "the vision or audio part"),
        ({"general__architecture": text("clip")}, "the vision or audio part"),
        ({"llama__pooling_type": u32(1)}, "embeds text"),
        ({"llama__attention__causal": flag(False)}, "embeds text"),
        ({"tensors": ()}, "a vocabulary without weights"),
    ],
)
def test_anything_else_is_refused_by_name(changes, said):
    with pytest.raises(UnsupportedError, match=said) as caught:
        check_continues_text(contents(**changes))
    assert "some.gguf" in caught.value.message


def test_a_file_that_names_no_architecture_is_no_model():
    with pytest.raises(UnsupportedError, match="no architecture"):
        check_continues_text(GgufContents(PATH, 3, 32, {}, TENSORS, 0, 512))


def test_without_llama_cpp_the_hint_is_how_to_get_it(monkeypatch):
    def absent(name):
        raise llama_cpp.PackageNotFoundError(name)

    monkeypatch.setattr(llama_cpp, "version", absent)
    for check in (check_installed, lambda: check_runs(PATH, 8)):
        with pytest.raises(UnsupportedError, match="not installed") as caught:
            check()
        assert "pip install 'qtool-llm[llama]'" in caught.value.hint


def test_another_version_is_refused_because_its_structures_are_not_known(monkeypatch):
    monkeypatch.setattr(llama_cpp, "version", lambda name: "2027.1.1")
    with pytest.raises(UnsupportedError, match=r"2027\.1\.1 is installed") as caught:
        check_installed()
    assert VERSION in caught.value.message
    assert caught.value.exit_code == 5


def test_the_version_is_the_one_that_the_package_asks_for():
    import tomllib

    project = tomllib.loads((Path(qtool.__file__).parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert extras["llama"] == [f"xllamacpp=={VERSION}"]
    assert f"xllamacpp=={VERSION}" in extras["test"]


@pytest.mark.parametrize(
    ("program", "kind", "said"),
    [
        ("import os; os.abort()", DamagedError, r"fell over some\.gguf .*ended without a word"),
        (
            "import sys; sys.stderr.write('ggml.c:1: GGML_ASSERT(x)\\n\\x1b[2J'); sys.exit(9)",
            DamagedError,
            r"fell over some\.gguf \(exit 9\)",
        ),
        ("import sys; sys.stderr.write('why\\n'); sys.exit(3)", DamagedError, "refuses .*: why"),
        (
            "import sys; sys.stderr.write('terminate: std::bad_alloc'); sys.exit(9)",
            CapacityError,
            r"too little memory for some\.gguf and 8 tokens: terminate: std::bad_alloc",
        ),
        ("import sys; sys.stderr.write('no\\n'); sys.exit(4)", UnsupportedError, "cannot run .*no"),
    ],
)
def test_however_a_trial_ends_it_becomes_an_error_with_a_name(monkeypatch, program, kind, said):
    def instead(command, environment, seconds):
        assert command[0] == sys.executable
        return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)

    monkeypatch.setattr(llama_trial, "run_trial", instead)
    with pytest.raises(kind, match=said) as caught:
        check_runs(PATH, 8)
    assert "\x1b" not in caught.value.message


def test_a_trial_that_passes_is_silent(monkeypatch):
    monkeypatch.setattr(
        llama_trial,
        "run_trial",
        lambda command, environment, seconds: subprocess.run(
            ["true"], check=False, capture_output=True
        ),
    )
    check_runs(PATH, 8)


def test_a_trial_without_end_is_ended_and_the_file_named(monkeypatch):
    real = llama_trial.run_trial

    def hangs(command, environment, seconds):
        assert seconds >= llama_trial.FIXED_SECONDS
        return real([sys.executable, "-c", "import time; time.sleep(600)"], environment, 0.2)

    monkeypatch.setattr(llama_trial, "run_trial", hangs)
    with pytest.raises(DamagedError, match=r"takes more than 300 seconds to load some\.gguf"):
        check_runs(PATH, 8)


def test_a_trial_that_writes_without_end_fills_neither_disk_nor_memory():
    program = (
        "import sys\nfrom qtool.evaluation.llama_trial import limit\nlimit(8 << 30)\n"
        "try:\n    while True: sys.stderr.write('x' * 65536)\nexcept OSError: sys.exit(9)"
    )
    environment = {"PYTHONPATH": str(Path(qtool.__file__).parents[1])}
    done = llama_trial.run_trial([sys.executable, "-c", program], environment, 60)
    assert done.returncode == 9
    assert len(done.stderr) == llama_trial.MOST_WRITTEN


def limits_of(monkeypatch, path, context):
    """What a trial is given: bytes of address space, and seconds."""
    seen = []

    def looks(command, environment, seconds):
        seen.append((int(command[-1]), seconds))
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(llama_trial, "run_trial", looks)
    check_runs(path, context)
    return seen[0]


def test_limits_grow_with_all_parts_of_a_file_and_with_the_context(monkeypatch, tmp_path):
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        with part.open("wb") as file:
            file.truncate(40 << 30)
    (tmp_path / "other.gguf").write_bytes(b"")
    most, seconds = limits_of(monkeypatch, parts[0], 512)
    assert most >= (240 << 30) + 512 * (5 << 20)
    assert seconds >= 8192
    longer, _ = limits_of(monkeypatch, parts[0], 131072)
    # 80 layers of 64 heads of 128, without groups, in float16.
    assert longer - most >= (131072 - 512) * 80 * 64 * 128 * 2 * 2
