"""Texts that a stranger wrote are refused before torch where they are no text, or are read."""

import pyarrow as pa
import pytest
import torch
from builders.tiny_models import tiny_model
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer

from qtool.calibration import tokens
from qtool.calibration.datasets import DatasetSpec, read_rows
from qtool.cli.app import run
from qtool.errors import DamagedError, UsageError

MANY = 3_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("float") / "model", dtype=torch.bfloat16)


def brackets(path):
    path.write_text(f'{{"text": "a", "more": [{"[]," * MANY}[]]}}\n')


def many_columns(path):
    path.write_text("{" + ",".join(f'"k{i}": 1' for i in range(50_000)) + "}\n")


def long_line(path):
    with path.open("wb") as file:
        file.truncate(1 << 30)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (brackets, "bad.jsonl:1: a line of brackets"),
        (many_columns, "bad.jsonl:1: no column 'text'"),
        (long_line, "bad.jsonl:1: a line of more than"),
    ],
)
def test_lines_that_are_no_text_are_refused_before_torch(server, tmp_path, model, write, said):
    write(tmp_path / "bad.jsonl")
    ended = server.run("calibrate", model, "-o", "s.gguf", "-d", "bad.jsonl", cwd=tmp_path)
    assert ended.code in {2, 6}, ended.err
    assert said in ended.message
    assert len(ended.err) < 1000
    assert "torch" not in ended.heavy
    assert ended.peak_bytes < 300e6


def test_parquet_whose_rows_are_too_long_takes_little_memory(server, tmp_path, model):
    table = pa.table({"text": ["a" * (1 << 20)] * 600})
    parquet.write_table(table, tmp_path / "bomb.parquet", compression="ZSTD")
    ended = server.run("calibrate", model, "-o", "s.gguf", "-d", "bomb.parquet", cwd=tmp_path)
    assert ended.code == 6, ended.err
    assert "bomb.parquet:513: the rows hold more than" in ended.message
    assert "torch" not in ended.heavy
    assert ended.peak_bytes < 450e6


def test_of_a_row_too_long_for_one_call_only_what_is_needed_is_tokenized(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "LONGEST_CALL", 1000)
    (tmp_path / "long.jsonl").write_text(f'{{"text": "{"ab cd " * 20_000}"}}\n')
    lengths = []

    class Counting:
        chat_template = None
        bos_token_id = None
        eos_token_id = None

        def __call__(self, texts, **_):
            lengths.extend(map(len, texts))
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    spec = DatasetSpec("file", str(tmp_path / "long.jsonl"))
    found = tokens.token_windows(Counting(), [spec], windows=2, length=50, seed=1)
    assert bytes(found.ids.flatten().tolist()) == b"ab cd " * 16 + b"ab c"
    assert max(lengths) <= 1000
    assert sum(lengths) <= 1000


def test_a_tokenizer_that_panics_is_a_refusal():
    PanicException = type("PanicException", (BaseException,), {})
    tokenizer = tiny_tokenizer()

    def panics(*_, **__):
        raise PanicException("gave up")

    tokenizer._encode_plus = panics
    with pytest.raises(DamagedError, match="fails on the text: gave up"):
        tokens._encode(tokenizer, ["text"])


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_calibrating_refuses_what_no_text_reads_if_it_is_not_finite(tmp_path, capsys, name):
    place = tiny_model("llama", tmp_path / "model")
    weights = load_file(place / "model.safetensors")
    weights[name][299, 3] = float("nan")  # a row that the tokenizer never uses
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    arguments = ["calibrate", place, "-o", tmp_path / "s.gguf", "-n", "2", "-l", "16", "-q"]
    assert run([str(argument) for argument in arguments]) == 8
    assert name in capsys.readouterr().err
    assert not (tmp_path / "s.gguf").exists()


@pytest.mark.parametrize("name", ["hf:../../x", "hf:/etc/x", "hf:.", "hf:a/../b", "hf:./a"])
def test_a_path_is_no_dataset_of_the_hub(server, tmp_path, model, name):
    """The library would read the files below it, whatever they are."""
    ended = server.run("calibrate", model, "-o", "s.gguf", "-d", name, cwd=tmp_path)
    assert ended.code == 2, ended.err
    assert name.removeprefix("hf:") in ended.message
    assert not ended.heavy
    text = f"version: 1\nmodel: {{id: '{model}'}}\nquantize: {{method: gptq, group_size: 32}}\n"
    text += f"calibration: {{datasets: [{{hf: '{name.removeprefix('hf:')}'}}]}}\n"
    (tmp_path / "r.yaml").write_text(text)
    ended = server.run("quantize", "--recipe", "r.yaml", "-o", "out", cwd=tmp_path)
    assert ended.code == 2, ended.err
    assert "r.yaml" in ended.message
    assert not ended.heavy


def test_a_directory_is_not_taken_for_a_dataset_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "data").mkdir(parents=True)
    (tmp_path / "org" / "data" / "train.txt").write_text("words of somebody else")
    with pytest.raises(UsageError, match="'org/data' here"):
        list(read_rows(DatasetSpec("hub", "org/data"), seed=None))
