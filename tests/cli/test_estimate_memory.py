"""`qtool estimate-memory`: figures, answers, refusals, and no heavy imports."""

import json
import shlex
import shutil

import pytest
from builders.gguf_files import write_gguf
from builders.work import imported_by

from qtool.cli.app import EXAMPLES
from qtool.pipeline.estimate import USUAL_FORMATS

LLAMA_4K_CACHE = 32 * 2 * 8 * 128 * 2 * 4096


@pytest.fixture
def estimate(qtool):
    return lambda *arguments: qtool("estimate-memory", *arguments)


def rows(outcome):
    assert outcome.code == 0, outcome.err
    return {row["format"]: row for row in outcome.value["rows"]}


def test_a_size_names_the_model_that_it_assumes_and_others(estimate):
    value = estimate("8b", "--json").value
    assert value["model"] == {"name": "Llama-3.1-8B", "parameters": 8030261248, "assumed": True}
    assert "Qwen3-8B" in value["alternatives"]
    shown = estimate("8b").out
    assert "8b is taken for Llama-3.1-8B" in shown
    assert "Qwen3-8B" in shown


def test_rows_are_sums_sorted_by_size(estimate):
    value = estimate("llama-3.1-8b", "--ctx", "4096", "--json").value
    assert value["model"]["assumed"] is False
    assert value["kv"] == {"dtype": "f16", "bytes": LLAMA_4K_CACHE}
    totals = [row["total_bytes"] for row in value["rows"]]
    assert totals == sorted(totals, reverse=True)
    assert {row["format"] for row in value["rows"]} == set(USUAL_FORMATS)
    for row in value["rows"]:
        parts = row["weights_bytes"] + row["kv_bytes"] + row["overhead_bytes"]["likely"]
        assert row["total_bytes"] == parts
        assert row["fits"] is None
        assert row["max_context"] is None
        assert row["exact"]


def test_the_published_size_of_a_file(estimate):
    [row] = rows(estimate("llama-3.1-8b", "-f", "Q4_K_M", "--json")).values()
    assert row["file_bytes"] == pytest.approx(4_920_734_656, abs=100_000)  # bartowski's
    assert row["weights_bytes"] == pytest.approx(4403.49 * 2**20, abs=2**14)  # llama.cpp's log


def test_the_usual_context_is_not_the_models_longest(estimate):
    assert estimate("8b", "--json").value["context"] == 8192
    assert estimate("llama-2-7b", "--json").value["context"] == 4096


def test_sequences_multiply_the_cache(estimate):
    one, four = (
        estimate("8b", "--batch", n, "--kv-dtype", "q8_0", "--json").value["kv"] for n in (1, 4)
    )
    assert four["bytes"] == 4 * one["bytes"]
    assert "llama-server -c 32768 -np 4" in estimate("8b", "--batch", "4").out


def test_what_fits_and_how_much_context(estimate):
    value = estimate("70b", "--gpu", "48GB", "--json").value
    by_name = {row["format"]: row for row in value["rows"]}
    assert by_name["bf16"]["fits"] is False
    assert by_name["bf16"]["max_context"] == 0
    assert by_name["gguf:Q2_K"]["fits"] is True
    assert by_name["gguf:Q2_K"]["max_context"] > 8192
    assert value["machine"]["gpu"]["usable_bytes"] == 48 * 10**9
    assert value["next"].startswith("qtool quantize meta-llama/")


def test_blocks_that_fit_and_the_split_with_main_memory(estimate):
    alone = estimate("70b", "--gpu", "24GB", "-f", "Q4_K_M", "--json").value
    held = alone["details"][0]["blocks_on_gpu"]
    assert 0 < held < alone["details"][0]["blocks"] == 80
    assert alone["rows"][0]["fits"] is False
    assert f"{held}/80" in estimate("70b", "--gpu", "24GB", "-f", "Q4_K_M").out
    shown = estimate("70b", "--gpu", "24GB", "--ram", "64GB", "-f", "Q4_K_M").out
    assert f"llama-server -ngl {held + 1}" in shown


def test_solving_for_a_format_or_a_context(estimate):
    shown = estimate("8b", "--gpu", "rtx4090", "--solve", "format").out
    best = next(line for line in shown.splitlines() if line.startswith("Best that fits"))
    fitting = [
        row for row in rows(estimate("8b", "--gpu", "rtx4090", "--json")).values() if row["fits"]
    ]
    assert max(fitting, key=lambda row: row["bits_per_weight"])["format"] in best
    shown = estimate("8b", "--gpu", "8GB", "--solve", "ctx", "-f", "Q4_K_M").out
    most = rows(estimate("8b", "--gpu", "8GB", "-f", "Q4_K_M", "--json"))["gguf:Q4_K_M"]
    assert f"Largest context: {most['max_context']:,} tokens" in shown


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("-f", "Q4_K_M", "--gpu", "24GB"), 0),
        (("-f", "bf16", "--gpu", "8GB"), 4),
        (("-f", "bf16", "-f", "Q4_K_M", "--gpu", "8GB"), 4),  # each that is named
        (("--gpu", "8GB"), 0),  # one of all
        (("--gpu", "2GB"), 4),
        (("--phase", "qlora", "--gpu", "4GB"), 4),
        (("--phase", "quantize", "--gpu", "1GB"), 4),
    ],
)
def test_scripts_can_ask_whether_it_fits(estimate, arguments, code):
    outcome = estimate("8b", *arguments, "--fail-if-not-fit", "--json")
    assert (outcome.code, outcome.value["exit_code"]) == (code, code)
    assert outcome.value["rows"]
    assert (outcome.value["error"] is None) == (code == 0)
    assert ("error:" in outcome.err) == (code == 4)


def test_a_row_is_explained_term_by_term(estimate):
    row = rows(estimate("8b", "-f", "Q4_K_M", "--ctx", "4096", "--json"))["gguf:Q4_K_M"]
    shown = estimate("8b", "--explain", "q4_k_m", "--ctx", "4096").out
    for key in ("file_bytes", "weights_bytes", "kv_bytes", "total_bytes"):
        assert f"{row[key]:,}" in shown
    assert "32 blocks x 4,096 cells x 4,096" in shown
    assert "rule" in shown


def test_a_directory_needs_no_weights(estimate, here):
    config = (here / "model" / "config.json").read_text()
    whole = rows(estimate("./model", "--json"))
    shutil.rmtree(here / "model")
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(config)
    bare = rows(estimate("./model", "--json"))
    for name, row in whole.items():
        assert bare[name]["weights_bytes"] == row["weights_bytes"]
        assert bare[name]["kv_bytes"] == row["kv_bytes"]


def test_a_float_directory_is_exact_to_the_byte(estimate, here):
    size = sum(path.stat().st_size for path in (here / "model").glob("*.safetensors"))
    assert rows(estimate("./model", "--json"))["bf16"]["file_bytes"] == pytest.approx(size, abs=512)


def test_a_gguf_file_is_exact_to_the_byte(estimate, here):
    path = write_gguf(here / "model", here / "model.gguf", vocabulary=256)
    [row] = rows(estimate("model.gguf", "--json")).values()
    assert row["file_bytes"] == path.stat().st_size
    assert row["exact"]
    assert "term by term" in estimate("model.gguf", "--explain", "stored").out
    (here / "alone").mkdir()
    path.rename(here / "alone" / "model.gguf")
    assert rows(estimate("./alone", "--json")).popitem()[1]["file_bytes"] == row["file_bytes"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M"])
def test_the_gguf_of_a_directory_is_exact_to_the_byte(qtool, estimate, here, kind):
    made = qtool("export", "./model", "-f", f"gguf:{kind}", "-o", "made.gguf")
    assert made.code == 0, made.err
    row = rows(estimate("./model", "-f", f"gguf:{kind}", "--json"))[f"gguf:{kind}"]
    assert row["exact"]
    assert row["file_bytes"] == (here / "made.gguf").stat().st_size


def test_a_quantized_directory_has_one_row(estimate, packed):
    for name, directory in packed.items():
        found = rows(estimate(directory, "--json"))
        assert list(found) == [name]
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        assert found[name]["file_bytes"] == size
        assert 0 < found[name]["bits_per_weight"] < 16


def test_an_unknown_architecture_is_a_labelled_range(estimate, tmp_path):
    config = {
        "model_type": "brand_new", "num_hidden_layers": 4, "hidden_size": 256,
        "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    value = estimate(tmp_path, "--json").value
    assert not any(row["exact"] for row in value["rows"])
    assert value["warnings"][0]["code"] == "unknown_architecture"
    overhead = value["rows"][0]["overhead_bytes"]
    fixed = value["rows"][0]["weights_bytes"] + value["rows"][0]["kv_bytes"]
    assert overhead["high"] - overhead["low"] >= 0.4 * fixed
    assert "~" in estimate(tmp_path).out


def test_names_from_files_do_not_reach_the_terminal(estimate, tmp_path):
    config = {
        "model_type": "\x1b[31mevil", "num_hidden_layers": 1, "hidden_size": 64,
        "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100,
    }  # fmt: skip
    place = tmp_path / "a\x1b[2Jb"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    outcome = estimate(place)
    assert outcome.code == 0
    assert "\x1b" not in outcome.out + outcome.err


def test_tuning_is_a_range(estimate):
    value = estimate("8b", "--phase", "qlora", "--gpu", "24GB", "--json").value
    [row] = value["rows"]
    assert value["context"] == 2048
    assert row["exact"] is False
    assert (
        row["overhead_bytes"]["low"]
        < row["overhead_bytes"]["likely"]
        < row["overhead_bytes"]["high"]
    )
    assert "logits and their gradient" in {part["name"] for part in value["details"][0]["parts"]}


def test_quantizing_has_a_row_for_every_method(estimate):
    value = estimate("8b", "--phase", "quantize", "--gpu", "rtx4090", "-n", "32", "--json").value
    assert {row["format"] for row in value["rows"]} == {"rtn", "awq", "gptq", "awq+gptq"}
    for details in value["details"]:
        assert sum(part["likely"] for part in details["ram"]) == details["ram_bytes"]
        assert details["disk_bytes"] > 5 * 10**9
    assert value["next"] == "qtool quantize meta-llama/Llama-3.1-8B -m awq"


def test_machines_with_one_memory_quantize_on_the_processor(estimate):
    shown = estimate("8b", "--phase", "quantize", "--gpu", "m3max-36gb")
    assert shown.code == 0
    assert "vram" not in shown.out
    assert "on the CPU" in shown.out


def test_experts_may_stay_in_main_memory(estimate):
    shown = estimate("qwen3-30b-a3b", "--gpu", "24GB", "--ram", "64GB", "-f", "Q8_0").out
    assert "llama-server -ncmoe" in shown


def test_phases_explain_their_rows(estimate):
    assert "logits and their gradient" in estimate("8b", "--phase", "qlora", "--explain", "x").out
    shown = estimate("8b", "--phase", "quantize", "--gpu", "24GB", "--explain", "gptq").out
    assert "factors and rounding" in shown
    assert "the GPU's memory" in shown


def test_quantizing_what_qtool_cannot_quantize_says_so(estimate):
    outcome = estimate("deepseek-v3", "--phase", "quantize")
    assert "does not do the architecture deepseek2" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("70x",), 2, "such as 8b"),
        (("8b", "--gpu", "24 bananas"), 2, "2x24GB"),
        (("8b", "--gpu", "rtx4099"), 2, "rtx4090"),
        (("8b", "--ram", "lots"), 2, "24GB"),
        (("8b", "--ctx", "0"), 2, "--ctx"),
        (("8b", "--ctx", "99999999999"), 2, "absurd"),
        (("8b", "--batch", "0"), 2, "--batch"),
        (("8b", "--kv-dtype", "q9"), 2, "q8_0"),
        (("8b", "-f", "Q4_K_X"), 2, "Q4_K"),
        (("8b", "--phase", "train"), 2, "infer"),
        (("8b", "--solve", "all", "--gpu", "8GB"), 2, "format"),
        (("8b", "--solve", "ctx"), 2, "--gpu"),
        (("8b", "--fail-if-not-fit"), 2, "--gpu"),
        (("8b", "--phase", "quantize", "-f", "bf16"), 2, "awq"),
        (("./nowhere",), 2, "by hand"),
        (("nowhere.gguf",), 2, "by hand"),
        (("",), 2, "by hand"),
        (("some-org/some-model",), 7, "by hand"),
        (("meta-llama/Llama-3.1-8B",), 7, "Llama-3.1-8B is known"),
    ],
)
def test_bad_requests_say_what_to_do(estimate, arguments, code, said):
    outcome = estimate(*arguments)
    assert (outcome.code, outcome.out) == (code, "")
    assert len(outcome.err.splitlines()) == 2
    assert said in outcome.err


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": None}, {"hidden_size": -5}, {"num_hidden_layers": 10**9},
        {"vocab_size": 0}, {"num_attention_heads": "many"}, {"model_type": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_absurd_config_is_damaged(estimate, here, changed):
    path = here / "model" / "config.json"
    config = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (here / "model" / "model.safetensors").unlink()
    outcome = estimate("./model")
    assert outcome.code == 6, outcome.err
    assert next(iter(changed)) in outcome.err


def test_failures_are_json_objects_too(estimate):
    value = estimate("70x", "--json").value
    assert (value["ok"], value["exit_code"], value["error"]["code"]) == (False, 2, "usage")


def test_the_examples_of_the_help_run(qtool, here):
    for line in EXAMPLES["estimate-memory"]:
        outcome = qtool(*shlex.split(line)[1:])
        assert outcome.code == 0, outcome.err
        assert outcome.out.splitlines()[-1].startswith("next: qtool ")


@pytest.mark.parametrize(
    "arguments",
    [("70b", "--gpu", "24GB"), ("./model", "--json"), ("8b", "--phase", "quantize")],
    ids=" ".join,
)
def test_little_is_imported_and_nothing_heavy(here, arguments):
    code, modules, heavy = imported_by("estimate-memory", *arguments)
    assert (code, heavy) == (0, [])
    assert modules < 500  # 414
