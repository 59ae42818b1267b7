"""inspect describes GGUF files by their headers, says what their names hide, and works little."""

import functools
import hashlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from builders.gguf_containers import (
    LLAMA,
    ByHand,
    by_package,
    llama_keys,
    llama_weights,
    small,
    tensor,
)
from builders.work import calls_of, imported_by
from rich.console import Console

from qtool.checkpoint.locate import locate
from qtool.cli.inspect_model import next_command, render_inspection, run_inspect
from qtool.errors import UsageError
from qtool.ggml_types import GGML_TYPES
from qtool.json_text import json_text
from qtool.pipeline.gguf_warnings import NAMES, base_type
from qtool.pipeline.inspect_gguf import inspect_gguf

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "docs/reference/schemas/inspect.schema.json").read_text())


def inspected(path, **settings):
    """What inspect says, as its JSON: checked against the schema."""
    result = run_inspect(str(path), **settings)
    value = json.loads(json_text(result))
    whole = {"schema": "qtool.inspect/1", "ok": True, "exit_code": 0, "error": None} | value
    jsonschema.Draft202012Validator(SCHEMA).validate(whole)
    return value


def shown(result):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render_inspection(result))
    return console.export_text()


def codes(result):
    return [warning["code"] for warning in result["warnings"]]


def changed(*changes):
    """The keys of the small model with some methods' arguments replaced, or left out for None."""
    found = {method: arguments for method, *arguments in llama_keys()}
    found |= dict(changes)
    return [(method, *arguments) for method, arguments in found.items() if arguments is not None]


def test_a_float_file(tmp_path):
    weights = llama_weights()
    path = by_package(tmp_path / "Tiny-F32.gguf", weights, changed(("add_file_type", (0,))))
    result = inspected(path)
    total = sum(values.size for values in weights.values())
    assert result["model"] == {
        "id": str(path),
        "name": "Tiny-F32",
        "revision": None,
        "path": str(path),
        "parameters": total,
    }
    assert result["parameters"] == {"total": total, "active": total}
    assert result["quantization"] is None
    assert result["tensors"]["bits_per_weight"] == 32
    architecture = result["architecture"]
    assert architecture["model_type"] == "llama"
    sizes = {
        "layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "attention_heads": 4,
        "key_value_heads": 2,
        "head_dim": 16,
        "vocabulary": LLAMA["vocabulary"],
        "context_length": 64,
        "dtype": "F32",
        "tied_embeddings": False,
    }
    assert {name: architecture[name] for name in sizes} == sizes
    assert result["support"]["commands"] == ["inspect", "export", "eval"]
    assert result["gguf"]["file_type"] == "F32"
    assert codes(result) == []


def test_the_tokenizer_is_described_without_files(tmp_path):
    path = by_package(tmp_path / "x.gguf", llama_weights())
    tokenizer = inspected(path)["tokenizer"]
    template = "{{ messages }}"
    assert tokenizer["chat_template"] == {
        "sha256": hashlib.sha256(template.encode()).hexdigest(),
        "characters": len(template),
    }
    assert (tokenizer["class"], tokenizer["pre"], tokenizer["tokens"]) == ("llama", None, 40)
    assert tokenizer["special"] == {
        "bos_token": "<s>",
        "bos_token_id": 1,
        "eos_token": "</s>",
        "eos_token_id": 2,
    }


def test_types_are_counted_with_their_bits(tmp_path):
    weights = llama_weights(tied=True)
    types = {f"blk.{i}.{name}.weight": "Q4_0" for i in (0, 1) for name in ("ffn_up", "attn_q")}
    types["token_embd.weight"] = "Q8_0"
    path = by_package(tmp_path / "x.gguf", weights, changed(("add_file_type", (2,))), types=types)
    result = inspected(path, tensors=True)
    rows = {row["dtype"]: row for row in result["tensors"]["by_dtype"]}
    in_q4 = 2 * (96 * 64 + 64 * 64)
    assert rows["Q4_0"] == {
        "dtype": "Q4_0",
        "tensors": 4,
        "parameters": in_q4,
        "bytes": in_q4 * 18 // 32,
        "bits_per_weight": 4.5,
    }
    assert rows["Q8_0"]["bits_per_weight"] == 8.5
    quantization = result["quantization"]
    assert (quantization["method"], quantization["variant"]) == ("gguf", "Q4_0")
    assert quantization["bits_by_modules"] == {"4": 4, "8": 1}
    assert quantization["bits"] == 4
    in_q8 = 40 * 64
    expected = (in_q4 * 4.5 + in_q8 * 8.5) / (in_q4 + in_q8)
    assert quantization["bits_per_weight"] == pytest.approx(expected)
    assert result["architecture"]["tied_embeddings"] is True
    listed = {row["name"]: row for row in result["tensors"]["list"]}
    assert listed.keys() == weights.keys()
    assert listed["token_embd.weight"]["shape"] == [40, 64]
    assert sum(row["bytes"] for row in listed.values()) == result["tensors"]["bytes"]
    text = shown(result)
    assert "gguf Q4_0, 4 and 8 bits" in text
    assert "blk.1.ffn_down.weight" in text


def test_every_key_is_listed_as_the_file_has_it(tmp_path):
    result = inspected(by_package(tmp_path / "x.gguf", llama_weights()))
    listed = {row["key"]: row for row in result["gguf"]["metadata"]}
    assert listed["llama.block_count"]["value"] == 2
    tokens = listed["tokenizer.ggml.tokens"]
    assert (tokens["kind"], tokens["value"], tokens["items"]) == ("string", None, 40)
    assert listed.keys() == locate(str(tmp_path / "x.gguf"), gguf=True).gguf[0].metadata.keys()


def test_a_name_that_the_rows_do_not_allow_is_warned_of(tmp_path):
    """Rows of 64 cannot be Q4_K, whose blocks have 256 weights."""
    types = {f"blk.{i}.ffn_up.weight": "Q5_0" for i in (0, 1)}
    keys = changed(("add_file_type", (15,)))
    result = inspected(by_package(tmp_path / "x.gguf", llama_weights(), keys, types=types))
    (warning,) = result["warnings"]
    assert warning["code"] == "fallback_types"
    bits = result["tensors"]["bits_per_weight"]
    assert "called Q4_K_M, but 2 of 16 weights" in warning["message"]
    assert f"no multiple of 256 and are Q5_0 instead: it has {bits:.2f} bits" in warning["message"]


@pytest.mark.parametrize(
    ("number", "types", "expected"),
    [
        (7, {}, "called Q8_0, but no weight is Q8_0"),
        (0, {"output.weight": "Q8_0"}, "called F32, but has weights in Q8_0"),
    ],
)
def test_a_file_type_that_the_tensors_do_not_bear_out_is_warned_of(
    tmp_path, number, types, expected
):
    keys = changed(("add_file_type", (number,)))
    result = inspected(by_package(tmp_path / "x.gguf", llama_weights(), keys, types=types))
    (warning,) = result["warnings"]
    assert warning["code"] == "file_type"
    assert expected in warning["message"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("add_block_count", (3,)), "layers"),
        (("add_token_list", (["a", "b"],)), "embedding"),
        (("add_token_list", None), "no_tokenizer"),
    ],
)
def test_contradictions_are_warned_of(tmp_path, change, code):
    assert codes(inspected(by_package(tmp_path / "x.gguf", llama_weights(), changed(change)))) == [
        code
    ]


def test_bpe_without_its_parts_is_warned_of(tmp_path):
    keys = changed(("add_tokenizer_model", ("gpt2",)))
    path = by_package(tmp_path / "x.gguf", llama_weights(), keys)
    assert codes(inspected(path)) == ["pretokenizer", "no_merges"]


def test_bytes_after_the_last_tensor_are_warned_of(tmp_path):
    path = by_package(tmp_path / "x.gguf", llama_weights())
    with path.open("ab") as file:
        file.write(bytes(100))
    assert codes(inspected(path)) == ["extra_bytes"]


def test_experts_that_a_token_passes_by_are_not_active(tmp_path):
    weights = {
        "token_embd.weight": np.ones((40, 64), np.float32),
        "rope_freqs.weight": np.ones(8, np.float32),
        "blk.0.ffn_up_exps.weight": np.ones((4, 96, 64), np.float32),
        "blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32),
    }
    keys = changed(
        ("add_block_count", (1,)), ("add_expert_count", (4,)), ("add_expert_used_count", (1,))
    )
    result = inspected(by_package(tmp_path / "x.gguf", weights, keys, architecture="qwen3moe"))
    assert result["parameters"] == {
        "total": 40 * 64 + 4 * 96 * 64 + 4 * 64,  # what rope computes is no parameter
        "active": 40 * 64 + 96 * 64 + 4 * 64,
    }
    assert result["support"]["family"] is False
    assert "qwen3moe" in result["support"]["reason"]


def test_every_layer_may_have_its_own_size(tmp_path):
    keys = changed(("add_head_count_kv", ([2, 4],)))
    result = inspected(by_package(tmp_path / "x.gguf", llama_weights(), keys))
    assert result["architecture"]["key_value_heads"] == [2, 4]
    assert "2 to 4 key-value heads" in shown(result)


def test_parts_are_described_together(tmp_path):
    weights = llama_weights()
    by_package(tmp_path / "whole.gguf", weights)
    by_package(tmp_path / "Tiny.gguf", weights, split_max_tensors=7)
    whole = inspected(tmp_path / "whole.gguf")
    part = tmp_path / "Tiny-00002-of-00003.gguf"
    parts = inspected(part, diff=str(tmp_path / "whole.gguf"))
    assert parts["tensors"] == whole["tensors"] | {"files": 3}
    assert parts["tokenizer"] == whole["tokenizer"]
    assert parts["diff"]["tokenizer"]["same"]
    assert parts["diff"]["config"] == []
    assert "in 3 parts" in shown(parts)


def test_two_files_are_compared_and_a_file_with_a_directory_is_not(tmp_path):
    left = by_package(tmp_path / "left.gguf", llama_weights())
    keys = changed(("add_context_length", (128,)), ("add_eos_token_id", (3,)))
    keys += [("add_tokenizer_pre", "x")]
    right = by_package(tmp_path / "right.gguf", llama_weights(), keys)
    diff = inspected(left, diff=str(right))["diff"]
    assert diff["config"] == [{"key": "llama.context_length", "left": 64, "right": 128}]
    assert [row["key"] for row in diff["special_tokens"]] == ["eos_token", "eos_token_id"]
    assert not diff["tokenizer"]["same"]
    assert diff["chat_template"]["same"]
    other = tmp_path / "model.safetensors"
    other.write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UsageError, match="do not compare"):
        run_inspect(str(left), diff=str(other))


def test_statistics_are_described_as_such(tmp_path):
    keys = [
        ("add_type", "imatrix"),
        ("add_array", "imatrix.datasets", ["wiki.txt"]),
        ("add_uint32", "imatrix.chunk_count", 12),
        ("add_uint32", "imatrix.chunk_size", 512),
    ]
    names = [f"blk.{i}.attn_q.weight" for i in range(3)]
    weights = {f"{n}.in_sum2": np.ones((1, 64), np.float32) for n in names}
    weights |= {f"{n}.counts": np.ones((1, 1), np.float32) for n in names}
    path = by_package(tmp_path / "statistics.gguf", weights, keys)
    result = inspected(path)
    assert result["gguf"]["statistics"] == {
        "entries": 3,
        "datasets": ["wiki.txt"],
        "chunks": 12,
        "chunk_size": 512,
    }
    assert result["parameters"]["total"] == 0
    assert result["support"]["commands"] == ["inspect"]
    assert result["warnings"] == []
    assert "3 linears over 12 chunks of 512 tokens" in shown(result)
    assert next_command(result) == f"next: qtool quantize MODEL --statistics {path}"


def test_what_is_no_language_model_says_so(tmp_path):
    keys = changed(("add_type", ("adapter",)))
    support = inspected(by_package(tmp_path / "x.gguf", llama_weights(), keys))["support"]
    assert (support["commands"], "adapter" in support["reason"]) == (["inspect"], True)
    vocabulary = inspected(by_package(tmp_path / "y.gguf", {}))
    assert "vocabulary" in vocabulary["support"]["reason"]
    assert shown(vocabulary)


def test_odd_but_readable_files_are_described(tmp_path):
    for i, made in enumerate(
        (
            small(),
            ByHand(),
            ByHand(tensors=[tensor("token_embd.weight", (), 0, 0)], data=bytes(32)),
        )
    ):
        result = inspected(made.at(tmp_path / f"{i}.gguf"), tensors=True)
        assert shown(result)


def test_every_file_type_has_a_base_type():
    assert all(base_type(name) in GGML_TYPES for name in NAMES.values())


def test_inspecting_a_file_imports_nothing_heavy(tmp_path):
    path = by_package(tmp_path / "x.gguf", llama_weights())
    code, _, heavy = imported_by("inspect", str(path))
    assert (code, heavy) == (0, [])


def test_a_huge_file_is_described_in_few_calls_for_each_token(tmp_path):
    n = 128_256
    keys = changed(
        ("add_token_list", ([f"token{i}" for i in range(n)],)),
        ("add_token_scores", ([0.0] * n,)),
        ("add_token_types", ([1] * n,)),
        ("add_token_merges", ([f"a{i} b{i}" for i in range(2 * n)],)),
    )
    path = by_package(tmp_path / "x.gguf", llama_weights(), keys)
    with path.open("r+b") as file:
        file.truncate(1 << 37)
    listed = functools.partial(inspect_gguf, list_tensors=True)
    assert calls_of(listed, locate(str(path), gguf=True)) < 40 * n
