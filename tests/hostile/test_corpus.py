"""Hundreds of hostile directories and files, and one property.

Whoever must refuse one does so with a message that names the file and what is wrong with it, with
the exit code of the contract, before torch or transformers is imported, without a traceback, and
with everything on the disk as it was.
"""

import itertools
import shutil

import pytest
import torch
from builders.hostile_configs import CONFIGS, EVERY
from builders.hostile_gguf import GGUFS
from builders.hostile_texts import DATA, RECIPES, STATISTICS
from builders.hostile_tokenizers import TOKENIZERS
from builders.llama_gguf import llama_gguf
from builders.refusals import HANGS, snapshot
from builders.tiny_models import tiny_model

from qtool.calibration import datasets
from qtool.errors import DamagedError

CODES = {2, 4, 5, 6}
MOST_BYTES = 300 << 20
WEIGHT_LIBRARIES = {"torch", "transformers"}
ON_DIRECTORIES = {
    "inspect": ("inspect", "model"),
    "estimate-memory": ("estimate-memory", "model"),
    "calibrate": ("calibrate", "model", "-o", "out.gguf", "-n", "2", "-l", "32"),
    "quantize": ("quantize", "model", "-m", "rtn", "-g", "32", "-f", "gptq", "-o", "out"),
    "export": ("export", "model", "-f", "gguf:Q8_0", "-o", "out.gguf"),
    "eval": ("eval", "model", "-l", "32", "-n", "2"),
}
ON_FILES = {
    "inspect": ("inspect", "model/model.gguf"),
    "estimate-memory": ("estimate-memory", "model/model.gguf"),
    "export": ("export", "model/model.gguf", "-f", "gguf:Q8_0", "-o", "out.gguf"),
    "restore": ("export", "model/model.gguf", "-f", "safetensors", "-o", "out"),
    "eval": ("eval", "model/model.gguf", "-l", "32", "-n", "2"),
}
# What llama.cpp alone can tell, in a process of its own; that needs the tokens first.
LATER = {"architecture unknown", "architecture with escapes", "an unknown tokenizer"}
LATER |= {"an unknown pre-tokenizer", "experts", "head_count_kv a long list"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Name -> a directory without fault."""
    place = tmp_path_factory.mktemp("sound")
    tiny_model("llama", place / "llama", dtype=torch.bfloat16)
    (place / "gguf").mkdir()
    llama_gguf(place / "llama", place / "gguf" / "model.gguf", "F16")
    return place


def refused(server, place, arguments, words, codes=CODES):
    """Run a command line that has to be refused, and look at everything that it left."""
    before = snapshot(place)
    ended = server.run(*arguments, cwd=place, seconds=60)
    assert ended.code != HANGS
    assert ended.code in codes, (ended.code, ended.err)
    assert "Traceback" not in ended.err
    assert not WEIGHT_LIBRARIES & set(ended.heavy), ended.err
    assert ended.peak_bytes < MOST_BYTES
    assert all(c.isprintable() or c == "\n" for c in ended.err)
    for word in words:
        assert any(one in ended.message for one in word.split("|")), ended.message
    assert snapshot(place) == before


def copied(sound, base, place):
    shutil.copytree(sound / base, place / "model")
    return place / "model"


def some(commands, number):
    """Two of the commands, others for the next case: all of them for each would take minutes."""
    chosen = itertools.islice(itertools.cycle(commands), number, number + 2)
    return dict.fromkeys(chosen)


DIRECTORIES = {**CONFIGS, **TOKENIZERS}
PAIRS = [
    pytest.param(case, command, id=f"{name}, {command}")
    for number, (name, case) in enumerate(DIRECTORIES.items())
    if case.refused_by
    for command in some(case.refused_by, number % len(case.refused_by))
]


@pytest.mark.parametrize(("case", "command"), PAIRS)
def test_a_hostile_directory_is_refused(server, sound, tmp_path, case, command):
    case.spoil(copied(sound, case.base, tmp_path))
    refused(server, tmp_path, ON_DIRECTORIES[command], case.words)


@pytest.mark.parametrize("command", EVERY)
def test_every_command_refuses_before_anything_heavy_is_imported(server, sound, tmp_path, command):
    directory = copied(sound, "llama", tmp_path)
    (directory / "config.json").write_text("{")
    refused(server, tmp_path, ON_DIRECTORIES[command], ("config.json", "JSON"), {6})


FILES = [
    pytest.param(case, command, id=f"{name}, {command}")
    for number, (name, case) in enumerate(GGUFS.items())
    if case.refused_by and name not in LATER
    for command in some(case.refused_by, number % len(case.refused_by))
]


@pytest.mark.parametrize(("case", "command"), FILES)
def test_a_gguf_file_that_contradicts_itself_is_refused(server, sound, tmp_path, case, command):
    case.spoil(copied(sound, case.base, tmp_path))
    refused(server, tmp_path, ON_FILES[command], case.words)


# Too few tokens are counted by the tokenizer; what flipped bytes do is the library's business; a
# bomb goes off row by row, see below.
LATER_DATA = {"text too short", "a parquet of flipped bytes", "a parquet bomb"}


@pytest.mark.parametrize("name", [name for name in DATA if name not in LATER_DATA])
def test_bad_data_is_refused_with_its_place(server, sound, tmp_path, name):
    bad = DATA[name]
    copied(sound, "llama", tmp_path)
    bad.make(tmp_path / bad.name)
    arguments = (*ON_DIRECTORIES["calibrate"], "-d", bad.name)
    before = snapshot(tmp_path)
    ended = server.run(*arguments, cwd=tmp_path)
    assert ended.code in CODES, ended.err
    assert not WEIGHT_LIBRARIES & set(ended.heavy)
    assert bad.name in ended.message
    for word in bad.words:
        assert word in ended.message
    assert snapshot(tmp_path) == before


def test_a_parquet_bomb_is_given_up_after_a_bounded_part_of_it(tmp_path, monkeypatch):
    """A file of some kilobytes stands for 60 MB of text here, and could for terabytes."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(datasets, "MAX_TEXT", 4 << 20)
    read = []
    real = datasets._row

    def counting(*arguments):
        read.append(1)
        return real(*arguments)

    monkeypatch.setattr(datasets, "_row", counting)
    table = pyarrow.table({"text": ["x" * 100_000] * 600})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(DamagedError, match=r"a\.parquet.*characters"):
        list(datasets.read_rows(datasets.DatasetSpec("file", str(tmp_path / "a.parquet")), None))
    assert len(read) == 42  # of 600, up to the first beyond the bound


REFUSED_RECIPES = [
    name
    for name in RECIPES
    if name not in {"a sexagesimal number", "a window of 10**12", "windows of 10**12"}
]


@pytest.mark.parametrize("name", REFUSED_RECIPES)
def test_a_bad_recipe_is_refused_by_name(server, sound, tmp_path, name):
    bad = RECIPES[name]
    copied(sound, "llama", tmp_path)
    bad.make(tmp_path / bad.name)
    arguments = ("quantize", "--recipe", bad.name, "-o", "out", "--dry-run")
    refused(server, tmp_path, arguments, (bad.name, *bad.words), {2})


REFUSED_STATISTICS = [name for name in STATISTICS if STATISTICS[name].words]


@pytest.mark.parametrize("name", REFUSED_STATISTICS)
@pytest.mark.parametrize("command", ["quantize", "export"])
def test_bad_statistics_are_refused(server, sound, tmp_path, name, command):
    bad = STATISTICS[name]
    copied(sound, "llama", tmp_path)
    bad.make(tmp_path / bad.name)
    arguments = {
        "quantize": ("quantize", "model", "-m", "rtn", "-f", "gguf:Q4_0", "-o", "out"),
        "export": ("export", "model", "-f", "gguf:Q4_0", "-o", "out.gguf"),
    }[command]
    arguments = (*arguments, "--statistics", bad.name)
    refused(server, tmp_path, arguments, (bad.name, *bad.words))


def test_code_that_a_model_names_is_taken_along_nowhere(server, sound, tmp_path):
    """Told to trust it, qtool computes the family and still runs none of the code."""
    directory = copied(sound, "llama", tmp_path)
    TOKENIZERS["code in the configuration"].spoil(directory)
    TOKENIZERS["pickles beside the weights"].spoil(directory)
    arguments = (*ON_DIRECTORIES["quantize"], "--eval", "none", "--trust-remote-code")
    ended = server.run(*arguments, cwd=tmp_path, seconds=300)
    assert ended.code == 0, ended.err
    assert "auto_map" in ended.err
    assert not list(tmp_path.rglob("MARKER"))
    suffixes = {path.suffix for path in (tmp_path / "out").rglob("*")}
    assert suffixes <= {".json", ".safetensors", ".yaml", ".md", ""}
