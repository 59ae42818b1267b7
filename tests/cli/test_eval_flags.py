"""`qtool eval` with everything it can be asked for; `value` checks the JSON by its schema."""

import json
import math
import re
import signal
import subprocess
import sys

import pytest
import torch
from builders.tiny_models import tiny_model
from safetensors.torch import load_file, save_file
from test_bad_requests import assert_refused
from test_streams_and_exit_codes import start
from tiny_tokenizer import CHATML, tiny_tokenizer

from qtool.errors import CapacityError

SMALL = ("--ctx", "32", "-n", "3")
REF = ("--ref", "./model")


@pytest.fixture
def other(here):
    """./other, a model of the same vocabulary with other weights."""
    tiny_model("llama", here / "other", hidden=128, intermediate=256, seed=5)
    return "./other"


# --- metrics -------------------------------------------------------------------------------------


def test_all_metrics_by_name(here, other, qtool):
    value = qtool("eval", other, *REF, *SMALL, "--metrics", "all", "--json").value
    metrics = value["results"][0]["metrics"]
    assert [*metrics] == ["ppl", "ppl_llama_cpp", "kld", "top1", "flips"]
    assert metrics["ppl"]["tokens"] == 3 * 31
    assert metrics["ppl_llama_cpp"]["tokens"] == 3 * 15
    assert value["reference"]["model"] == "./model"
    table = qtool("eval", other, *REF, *SMALL, "--metrics", "all").out
    titles = ("perplexity", "llama.cpp's", "ratio", "KL divergence", "99 % below", "same top")
    assert all(title in table.splitlines()[0] for title in (*titles, "flips"))
    assert "by llama.cpp's rule (second halves only)" in table
    # Every figure but the size has its standard error, to two digits of it.
    errors = [metrics[name]["se"] for name in ("ppl", "ppl_llama_cpp", "kld", "top1", "flips")]
    errors += [metrics["ppl"]["ratio_se"], metrics["kld"]["p99_se"]]
    row = table.splitlines()[1]
    assert row.count(" ± ") == sum(error > 0 for error in errors) >= 5
    kld = metrics["kld"]
    places = 1 - math.floor(math.log10(kld["se"]))
    assert f"{kld['mean']:.{places}f} ± {kld['se']:.{places}f}" in row


def test_perplexity_is_always_there_and_other_metrics_only_when_asked_for(here, other, qtool):
    value = qtool("eval", other, *REF, *SMALL, "--metrics", "flips", "--json").value
    assert [*value["results"][0]["metrics"]] == ["ppl", "flips"]


def test_the_noise_floor(here, qtool):
    value = qtool("eval", "./model", *REF, *SMALL, "--noise-floor", "--json").value
    assert value["results"][0]["metrics"]["kld"]["mean"] == 0
    assert value["noise_floor"]["dtype"] == "bfloat16"
    assert 0 < value["noise_floor"]["kld"]["mean"] < 0.01
    assert "noise floor" in qtool("eval", "./model", *REF, *SMALL, "--noise-floor").out


def test_long_context_by_position(here, other, qtool):
    value = qtool("eval", other, *REF, "--long-ctx", "16,32,64", "-n", "2", "--json").value
    assert value["data"]["context"] == 64
    buckets = value["results"][0]["positions"]
    assert [(b["start"], b["stop"]) for b in buckets] == [(0, 16), (16, 32), (32, 64)]
    assert sum(b["tokens"] for b in buckets) == value["results"][0]["metrics"]["ppl"]["tokens"]
    assert all(b["kld"] > 0 and b["reference_loss"] > 0 for b in buckets)
    alone = qtool("eval", other, "--long-ctx", "16,64", "-n", "2", "--json").value
    assert set(alone["results"][0]["positions"][0]) == {
        "start",
        "stop",
        "loss",
        "loss_se",
        "tokens",
    }
    assert "16 to 32" in qtool("eval", other, *REF, "--long-ctx", "16,32", "-n", "2").out


def test_a_context_longer_than_the_model_was_made_for_is_a_warning(here, qtool):
    value = qtool("eval", "./model", "--long-ctx", "128,512", "-n", "1", "--json").value
    assert [w["code"] for w in value["warnings"]] == ["beyond_context"]


def test_domains(here, other, qtool):
    arguments = ("eval", other, *REF, *SMALL, "--domains")
    value = qtool(*arguments, "--json").value
    assert [*value["results"][0]["domains"]] == ["prose", "code", "digits", "non-latin"]
    assert value["data"]["windows"] == 3
    assert "non-latin" in qtool(*arguments).out


def test_layers_come_from_the_report_beside_a_model(here, packed, qtool):
    value = qtool("eval", packed["gptq"], *REF, *SMALL, "--json").value
    layers = value["results"][0]["layers"]
    assert len(layers) == 14
    assert all(layer["relative_error"] > 0 for layer in layers)
    assert "layers" not in qtool("eval", "./model", *SMALL, "--json").value["results"][0]


@pytest.mark.parametrize("missing", ["resvg_py", "matplotlib", None])
def test_a_report_without_png_files_says_what_they_need(here, other, qtool, monkeypatch, missing):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    run = qtool("eval", other, *REF, *SMALL, "--domains", "--report", "page")
    assert run.code == 0
    assert run.err.count("PNG files of the plots need: pip install 'qtool-llm[plots]'") == (
        1 if missing else 0
    )
    drawn = {path.name for path in (here / "page").iterdir() if "kl-by-domain" in path.name}
    assert drawn == {"kl-by-domain.svg", *([] if missing else ["kl-by-domain.png"])}
    figures = qtool("eval", other, "--ctx", "16", "-n", "2", "--report", "figures")
    assert "PNG" not in figures.err  # a perplexity alone has no plots


# --- the cache -----------------------------------------------------------------------------------


def test_a_second_run_takes_the_original_from_the_cache(here, other, qtool, monkeypatch):
    monkeypatch.setenv("QTOOL_LOGITS_CACHE", "kept")
    first = qtool("eval", other, *REF, *SMALL, "--json")
    assert "running model" in first.err
    second = qtool("eval", other, *REF, *SMALL, "--json")
    assert "running model" not in second.err
    figures = [run.value["results"][0]["metrics"] for run in (first, second)]
    assert figures[0] == figures[1]
    assert figures[0]["kld"]["tail_error_tokens"] == 3
    assert len([*(here / "kept").glob("*/*.logits")]) == 3
    shown = qtool("eval", other, *REF, *SMALL).out
    assert "divergence from the cache is off by" in shown
    monkeypatch.delenv("QTOOL_LOGITS_CACHE")
    exact = qtool("eval", other, *REF, *SMALL, "--json").value["results"][0]["metrics"]
    assert "tail_error" not in exact["kld"]
    assert exact["kld"]["mean"] == pytest.approx(figures[0]["kld"]["mean"], rel=0.02)
    assert exact["ppl"] == figures[0]["ppl"]


def test_without_the_flag_nothing_is_kept(here, other, qtool):
    before = sorted(path.name for path in here.iterdir())
    assert qtool("eval", other, *REF, *SMALL).code == 0
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.slow
def test_an_interrupted_run_ends_with_130_and_its_windows_are_kept(here):
    tiny_model("llama", here / "deep", layers=24, hidden=128, intermediate=256)
    arguments = ("eval", "./model", "--ref", "./deep", "--logits-cache", "kept", "--ctx", "256")
    arguments = (*arguments, "--all", "--json")
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("caching deep" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    error = json.loads(out)["error"]
    assert (error["code"], error["resumable"]) == ("interrupted", True)
    assert "kept" in error["hint"]
    assert "Traceback" not in err
    kept = [*(here / "kept").rglob("*")]
    assert any(path.suffix == ".logits" for path in kept)
    assert not any(path.name.startswith(".") for path in kept)


def test_a_report_that_cannot_be_written_leaves_one_object_on_stdout(here, qtool, monkeypatch):
    def full(*_):
        raise CapacityError("cannot write page: No space left on device")

    monkeypatch.setattr("qtool.evaluation.report.write_report", full)
    outcome = qtool("eval", "./model", *SMALL, "--report", "page", "--json")
    assert outcome.code == 4
    assert "No space left" in outcome.err
    assert outcome.value["results"]  # which is one JSON object, and the figures are not lost


# --- gates ---------------------------------------------------------------------------------------


def test_gates_that_hold(here, other, qtool):
    gates = ("--gate", "kld<=9", "--gate", "flips<=100%", "--gate", "size<=5GB")
    outcome = qtool("eval", other, *REF, *SMALL, *gates, "--json")
    assert outcome.code == 0
    assert [gate["pass"] for gate in outcome.value["gates"]] == [True] * 3
    assert "flips" in outcome.value["results"][0]["metrics"]  # measured because a gate asks
    assert "gate kld<=9 passed" in qtool("eval", other, *REF, *SMALL, *gates).out


def test_a_failed_gate_is_exit_code_3_after_the_result(here, other, qtool):
    arguments = ("eval", other, "./model", *REF, *SMALL, "--gate", "kld<=1e-6", "--gate", "top1>=0")
    outcome = qtool(*arguments, "--json")
    assert outcome.code == 3
    value = outcome.value
    assert (value["ok"], value["exit_code"], value["error"]["code"]) == (False, 3, "gate")
    assert [gate["pass"] for gate in value["gates"]] == [False, True, True, True]
    assert len(value["results"]) == 2
    error = value["gates"][0]["se"]
    assert f"kld of ./other is {value['gates'][0]['value']:.4g} ± {error:.4g}" in outcome.err
    shown = qtool(*arguments)
    assert shown.code == 3
    assert shown.out.splitlines()[0].startswith("model")
    assert "gate kld<=1e-6 failed" in shown.out
    assert "gate kld<=1e-6 passed" in shown.out  # the model itself
    assert "error: kld<=1e-6 failed" in shown.err


# --- tokenizer and template ----------------------------------------------------------------------


def test_another_template_is_a_loud_warning_and_fails_its_gate(here, other, qtool):
    tiny_tokenizer(chat_template=CHATML).save_pretrained(here / "other")
    gates = ("--gate", "template==same", "--gate", "tokenizer==same")
    outcome = qtool("eval", other, *REF, *SMALL, *gates, "--json")
    assert outcome.code == 3
    value = outcome.value
    assert value["results"][0]["tokenizer"]["template"] == "different"
    assert value["results"][0]["tokenizer"]["same"] is True
    assert [gate["pass"] for gate in value["gates"]] == [False, True]
    assert [w["code"] for w in value["warnings"]] == ["tokenizer_differs"]
    assert "warning: THE TOKENIZER OR CHAT TEMPLATE OF other IS NOT THAT OF model" in outcome.err
    assert "TOKENIZER OF ./other DIFFERS" in qtool("eval", other, *REF, *SMALL).out


# --- what cannot be done -------------------------------------------------------------------------

REFUSED = {
    "unknown metric": ((*REF, "--metrics", "ppl,kdl"), 2, "'kdl'", "'kld'"),
    "a metric without an original": (("--metrics", "kld"), 2, "--ref"),
    "unknown figure": ((*REF, "--gate", "speed>=9"), 2, "'speed'", "kld_p99"),
    "no gate at all": ((*REF, "--gate", "good"), 2, "'good' is not a gate", "kld<=0.05"),
    "a gate without an original": (("--gate", "kld<=0.05"), 2, "--ref"),
    "a noise floor without an original": (("--noise-floor",), 2, "--ref"),
    "a noise floor above itself": (
        (*REF, "--noise-floor", "--dtype", "bfloat16"),
        2,
        "already runs in bfloat16",
    ),
    "lengths that fall": (("--long-ctx", "8k,4k"), 2, "does not rise"),
    "lengths that contradict": (("--ctx", "32", "--long-ctx", "16,64"), 2, "different lengths"),
    "domains of another text": (("--domains", "--data", "some.txt"), 2, "builtin"),
    "a cache that is a file": ((*REF, *SMALL, "--logits-cache", "model/config.json"), 2, "cache"),
    "wikitext-2 without a network": (("--data", "wikitext-2", *SMALL), 7, "wikitext", "builtin"),
    "an empty text": (("--data", "empty.txt", *SMALL), 2, "empty"),
    "a text shorter than a window": (("--data", "short.txt", *SMALL), 2, "not one window of 32"),
}


@pytest.mark.parametrize("request_name", REFUSED)
def test_what_cannot_be_done_is_refused(here, qtool, request_name):
    (here / "empty.txt").write_text("")
    (here / "short.txt").write_text("too short")
    arguments, code, *words = REFUSED[request_name]
    assert_refused(qtool("eval", "./model", *arguments), code, *words)


def test_a_reference_with_another_vocabulary_is_refused(here, qtool):
    tiny_model("llama", here / "larger", vocab_size=320)
    outcome = qtool("eval", "./larger", *REF, *SMALL)
    assert_refused(outcome, 5, "320 tokens", "the reference 300")


@pytest.mark.parametrize("cached", [(), ("--logits-cache", "kept")])
def test_logits_that_are_no_numbers_are_a_numerical_failure(here, other, qtool, cached):
    weights = load_file(here / "other" / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    save_file(weights, here / "other" / "model.safetensors", metadata={"format": "pt"})
    outcome = qtool("eval", other, *REF, *SMALL, *cached)
    assert_refused(outcome, 8, "other gives logits that are not finite")
    outcome = qtool("eval", "./model", "--ref", other, *SMALL, *cached)
    assert outcome.code == 8
    assert "other gives logits that are not finite" in outcome.err
    assert "more bits" not in outcome.err  # that would not mend an original


# --- progress ------------------------------------------------------------------------------------


def test_progress_tells_the_time_left_and_the_result_stands_alone(here, qtool):
    tiny_model("llama", here / "deep", layers=20)
    outcome = qtool("eval", "./deep", *SMALL, "--json")
    assert re.search(r"^running deep: block 10 of 20, \d+ s, \d+ s left$", outcome.err, re.M)
    assert "measuring deep" in outcome.err
    assert outcome.out.count("\n") == 1
    assert outcome.value["ok"]
