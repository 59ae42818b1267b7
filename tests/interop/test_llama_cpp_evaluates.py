"""`qtool eval` of GGUF files: llama.cpp's figures against transformers' and its own."""

import json
import math
import shutil

import gguf
import numpy as np
import pytest
import torch
from builders.command_line import Outcome
from builders.llama_gguf import llama_gguf
from builders.tiny_models import tiny_model, token_ids
from oracles import llama_cpp as oracle
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtool.calibration.datasets import DatasetSpec
from qtool.calibration.tokens import DatasetSource, Windows, evaluation_windows
from qtool.checkpoint.locate import locate
from qtool.cli.app import run
from qtool.errors import CapacityError, DamagedError, QtoolError, UnsupportedError
from qtool.evaluation import llama_trial
from qtool.evaluation.gguf_model import GgufModel, GgufTokenizer
from qtool.evaluation.llama_cpp import TOKENS_AT_ONCE, LlamaModel
from qtool.evaluation.metrics_json import DEFAULT_METRICS, METRICS
from qtool.pipeline.evaluate import evaluate, metrics_of
from qtool.pipeline.progress import Silent

CPU = torch.device("cpu")
# llama.cpp keeps keys and values in 16 bits.
CLOSE = 0.02


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with ./model, its float32 file and one with 8-bit weights."""
    directory = tmp_path_factory.mktemp("llama")
    tiny_model("llama", directory / "model", hidden=128, intermediate=256, seed=3)
    llama_gguf(directory / "model", directory / "f32.gguf", metadata={"general.file_type": 0})
    llama_gguf(
        directory / "model", directory / "q8.gguf", "Q8_0", metadata={"general.file_type": 7}
    )
    return directory


@pytest.fixture(scope="module")
def model(here):
    return AutoModelForCausalLM.from_pretrained(here / "model", dtype=torch.float32)


def located(path):
    return locate(str(path), gguf=True)


def windows(count=3, length=33):
    return Windows(token_ids(count, length, 5), (DatasetSource("random", "", count),), "")


def measured(models, reference=None, text=None):
    return evaluate(models, reference, text or windows(), CPU, Silent())


def logits_of_transformers(model, ids):
    with torch.no_grad():
        return model(torch.as_tensor(ids)[None], use_cache=False).logits[0]


def test_logits_are_those_of_transformers(here, model):
    ids = token_ids(1, 50)[0].tolist()
    with LlamaModel(here / "f32.gguf", context=64) as ours:
        found = torch.from_numpy(ours.logits(ids))
        again = torch.from_numpy(ours.logits(ids[:20]))
    expected = logits_of_transformers(model, ids)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < CLOSE * expected.std()
    assert (again - expected[:20]).abs().max() < CLOSE * expected.std()  # nothing is left over


def test_a_window_longer_than_one_call_is_still_one_window(tmp_path):
    directory = tiny_model("llama", tmp_path / "model", max_position_embeddings=1024)
    path = llama_gguf(directory, tmp_path / "long.gguf")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = token_ids(1, TOKENS_AT_ONCE + 70)[0].tolist()
    with LlamaModel(path, context=len(ids)) as ours:
        found = torch.from_numpy(ours.logits(ids))
    expected = logits_of_transformers(model, ids)
    assert (found - expected).abs().max() < CLOSE * expected.std()


def test_both_bindings_of_llama_cpp_agree_to_the_bit(here):
    """The structures were written down twice, for the product and for its tests."""
    ids = token_ids(1, 40)[0].tolist()
    other = oracle.Model(here / "q8.gguf", n_ctx=64)
    with LlamaModel(here / "q8.gguf", context=64) as ours:
        np.testing.assert_array_equal(ours.logits(ids), other.logits(ids))
        assert ours.tokenize("Some text.") == other.tokenize("Some text.")
    other.close()


def test_perplexity_and_divergence_are_those_of_the_definition(here, model):
    text = windows()
    found = measured([located(here / "q8.gguf")], located(here / "model"), text)[0]
    ours = oracle.Model(here / "q8.gguf", n_ctx=64)
    losses, divergences, same = [], [], []
    for ids in text.ids.tolist():
        q = torch.from_numpy(ours.logits(ids)).double().log_softmax(-1)
        p = logits_of_transformers(model, ids).double().log_softmax(-1)
        losses += (-q[torch.arange(len(ids) - 1), ids[1:]]).tolist()
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    ours.close()
    assert found.perplexity.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found.comparison.divergence.value == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.comparison.top1.value == pytest.approx(np.mean(same))
    assert found.comparison.divergence.value > 1e-6


def llama_perplexity(path, ids, length):
    """exp of the mean loss over second halves, as tools/perplexity of b11549 counts."""
    model = oracle.Model(path, n_ctx=length)
    total, count = 0.0, 0
    for window in ids:
        scores = torch.from_numpy(model.logits(window)).double().log_softmax(-1)
        for place in range(length // 2, length - 1):
            total -= float(scores[place, window[place + 1]])
            count += 1
    model.close()
    return math.exp(total / count), count


@pytest.mark.parametrize("length", [32, 33])
def test_the_rule_of_llama_perplexity_is_there_too(here, length):
    text = windows(length=length)
    expected, count = llama_perplexity(here / "q8.gguf", text.ids.tolist(), length)
    metrics = metrics_of(measured([located(here / "q8.gguf")], None, text)[0], METRICS)
    assert metrics["ppl_llama_cpp"]["value"] == pytest.approx(expected, rel=1e-5)
    assert metrics["ppl_llama_cpp"]["tokens"] == count
    directory = measured([located(here / "model")], None, text)[0]
    assert "ppl_llama_cpp" not in metrics_of(directory, DEFAULT_METRICS)


def test_files_and_directories_are_measured_together_and_either_is_the_reference(here):
    every = [located(here / name) for name in ("q8.gguf", "model", "f32.gguf")]
    for reference in ("model", "f32.gguf"):
        packed, directory, float_file = measured(every, located(here / reference))
        for same in (directory, float_file):
            assert same.comparison.divergence.value < 1e-3 * packed.perplexity.value
            assert same.comparison.divergence.value < packed.comparison.divergence.value
        assert packed.perplexity.value == pytest.approx(directory.perplexity.value, rel=0.05)
        assert packed.n_bytes < float_file.n_bytes / 3


def test_rows_that_stand_for_no_token_are_left_out(here, tmp_path):
    whole = measured([located(here / "f32.gguf")], located(here / "model"))[0]
    for rows in (258, 320):  # the model has 300, the tokenizer knows 258
        path = llama_gguf(here / "model", tmp_path / f"{rows}.gguf", rows=rows)
        found = measured([located(path)], located(here / "model"))[0]
        assert found.comparison.divergence.value < whole.comparison.divergence.value + 1e-4
    small = llama_gguf(here / "model", tmp_path / "small.gguf", rows=200)
    with pytest.raises(UnsupportedError, match="has 200 tokens and the reference 300"):
        measured([located(small)], located(here / "model"))
    with pytest.raises(UnsupportedError, match="has 200 tokens"):
        measured([located(small)])


def test_the_tokenizer_of_a_file_gives_the_windows_of_the_directory(here):
    text = DatasetSpec("builtin")
    theirs = AutoTokenizer.from_pretrained(here / "model")
    expected = evaluation_windows(theirs, text, length=128, limit=3)
    with GgufTokenizer(located(here / "q8.gguf")) as tokenizer:
        found = evaluation_windows(tokenizer, text, length=128, limit=3)
        sample = "Ünïcode, 1234 and\n\n  <eos> in the middle"
        assert tokenizer(sample)["input_ids"] == theirs(sample)["input_ids"]
    assert torch.equal(found.ids, expected.ids)


def test_a_text_begins_as_the_model_wants_it(here, tmp_path):
    def with_bos(writer):
        writer.add_bos_token_id(256)

    path = rewritten(here / "f32.gguf", tmp_path / "bos.gguf", {"add_bos_token": True}, with_bos)
    with GgufTokenizer(located(path)) as tokenizer:
        assert tokenizer("a")["input_ids"][0] == 256
        assert tokenizer(["a"], add_special_tokens=False)["input_ids"] != [tokenizer("a")]
        found = evaluation_windows(tokenizer, DatasetSpec("builtin"), length=16, limit=4)
    assert found.ids[:, 0].tolist() == [256] * 4


# --- files that are not what they should be -----------------------------------------------------


def rewritten(source, path, changes, also=lambda writer: None, *, tensors=True):
    """Copy a GGUF file; keys that end as one of `changes` get another value, None leaves them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        end = next((end for end in changes if key.endswith(end)), None)
        value = field.contents() if end is None else changes[end]
        if value is not None:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value, field.types[0], sub_type=inner)
    also(writer)
    for tensor in reader.tensors if tensors else []:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def spoiled(here, path):
    """A file with one weight that is no number."""
    raw = bytearray((here / "f32.gguf").read_bytes())
    ref = next(ref for ref in located(here / "f32.gguf").gguf[0].tensors if "ffn_up" in ref.name)
    raw[ref.start : ref.start + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"attention.head_count": 0},
        {"attention.head_count": 3},
        {"attention.head_count_kv": 0},
        {"attention.head_count": 2**31},
        {"embedding_length": 64},
        {"block_count": 3},
        {"block_count": 0},
        {"rope.dimension_count": 31},
        {"feed_forward_length": None},
        {"ggml.model": "unheard-of"},
        {"ggml.model": None},
        {"ggml.pre": "unheard-of"},
        {"ggml.tokens": ["a", "b"]},
        {"ggml.merges": ["no space in it"]},
        {"ggml.merges": None},
        {"eos_token_id": 2**30},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items()))[:40],
)
def test_whatever_llama_cpp_thinks_of_a_file_this_process_goes_on(changes, here, tmp_path):
    path = rewritten(here / "f32.gguf", tmp_path / "odd.gguf", changes)
    fault, found = None, None
    try:
        found = measured([located(path)], None, windows(1, 16))
    except QtoolError as error:
        fault = error
    if found is not None:  # some of these llama.cpp can make sense of
        assert math.isfinite(found[0].perplexity.value)
        return
    assert "odd" in fault.message
    assert fault.hint
    assert fault.exit_code in {5, 6}


def test_the_fault_that_llama_cpp_finds_is_told(here, tmp_path):
    path = rewritten(here / "f32.gguf", tmp_path / "odd.gguf", {"block_count": 3})
    with pytest.raises(DamagedError, match=r"blk\.2"):
        measured([located(path)])
    with pytest.raises(DamagedError, match="refuses"):
        measured([located(spoiled(here, tmp_path / "nan.gguf"))])


def test_a_truncated_file_never_reaches_llama_cpp(here, tmp_path):
    raw = (here / "f32.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (0, 3, 100, len(raw) // 2, len(raw) - 64):
        path.write_bytes(raw[:length])
        with pytest.raises(DamagedError, match=r"cut\.gguf"):
            located(path)


def test_a_vocabulary_alone_is_no_model(here, tmp_path):
    path = rewritten(here / "f32.gguf", tmp_path / "vocab.gguf", {}, tensors=False)
    for use in (GgufTokenizer, lambda checkpoint: GgufModel(checkpoint, windows().ids, CPU)):
        with pytest.raises(UnsupportedError, match="a vocabulary without weights"):
            use(located(path))


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def qtool(here, tmp_path, monkeypatch, capsys):
    """Run a command line next to the model and its files."""
    shutil.copytree(here, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def test_the_command_tokenizes_alike_with_and_without_the_original(qtool):
    small = ("--ctx", "32", "-n", "2", "--json")
    alone = qtool("eval", "q8.gguf", *small).value
    compared = qtool("eval", "q8.gguf", "f32.gguf", "--ref", "model", *small).value
    assert alone["data"] == compared["data"]
    assert [r["format"] for r in compared["results"]] == ["gguf:Q8_0", "gguf:F32"]
    first, second = (r["metrics"] for r in compared["results"])
    assert set(first) == {"ppl", "ppl_llama_cpp", "kld", "top1"}
    assert set(alone["results"][0]["metrics"]) == {"ppl", "ppl_llama_cpp"}
    assert second["kld"]["mean"] < first["kld"]["mean"]
    # Without the original no row is left out of the softmax, and these files have all of them.
    assert alone["results"][0]["metrics"]["ppl"]["value"] == pytest.approx(
        first["ppl"]["value"], rel=1e-6
    )


def test_the_table_says_what_comes_next(qtool):
    outcome = qtool("eval", "q8.gguf", "model", "--ctx", "32", "-n", "2")
    assert outcome.code == 0
    assert "gguf:Q8_0" in outcome.out
    assert outcome.out.splitlines()[-1] == "next: qtool eval q8.gguf --ref ORIGINAL"


def test_a_file_that_is_no_model_is_refused_with_its_exit_code(qtool, tmp_path):
    calibrated = qtool("calibrate", "model", "-o", "stats.gguf", "-n", "2", "-l", "32")
    assert calibrated.code == 0, calibrated.err
    for arguments in (("stats.gguf",), ("q8.gguf", "--ref", "stats.gguf")):
        outcome = qtool("eval", *arguments, "--ctx", "32", "--json")
        assert outcome.code == 5
        assert "an importance matrix" in json.loads(outcome.out)["error"]["message"]
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "q8.gguf").read_bytes()[:5000])
    assert qtool("eval", "cut.gguf", "--ctx", "32").code == 6


def test_statistics_are_merged_by_the_command(qtool, tmp_path):
    small = ("-l", "32", "--json")
    assert qtool("calibrate", "model", "-o", "one.gguf", "-n", "2", *small).code == 0
    both = qtool("calibrate", "model", "-o", "two.gguf", "-n", "4", *small, "--merge", "one.gguf")
    assert both.value["artifacts"][0]["tensors"] == 15
    reader = gguf.GGUFReader(tmp_path / "two.gguf")
    counts = [t.data.item() for t in reader.tensors if t.name.endswith(".counts")]
    assert counts == [6 * 32] * 15
    assert reader.fields["imatrix.chunk_count"].contents() == 6
    other = tiny_model("llama", tmp_path / "other", hidden=64)
    refused = qtool("calibrate", other, "-o", "x.gguf", "-n", "2", *small, "--merge", "one.gguf")
    assert refused.code == 2


def test_a_file_that_wants_more_memory_than_its_size_allows_is_refused_by_name(here, monkeypatch):
    llama_trial.check_runs(here / "q8.gguf", 1 << 12)
    monkeypatch.setattr(llama_trial, "FIXED_BYTES", 400 << 20)
    monkeypatch.setattr(llama_trial, "BYTES_PER_TOKEN", 0)
    with pytest.raises(CapacityError, match=r"too little memory for .*q8\.gguf"):
        llama_trial.check_runs(here / "q8.gguf", 1 << 22)
