"""`qtool eval --task-file`: scores, pairs, gates and what is refused; `value` checks the schema."""

import importlib.util
import json

import pytest
from builders.tiny_models import tiny_model
from test_bad_requests import assert_refused
from tiny_tokenizer import CHATML, tiny_tokenizer

from qtool.evaluation.streamed_tasks import StreamedTasks

REF = ("--ref", "./model")
NONE = ("--metrics", "none")
LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def other(here):
    """./other, a model of the same vocabulary with other weights."""
    tiny_model("llama", here / "other", hidden=128, intermediate=256, seed=5)
    return "./other"


@pytest.fixture
def files(here):
    """quiz.jsonl of nine questions and exact.jsonl of two."""
    choices = ["red", "a long answer", "x"]
    lines = [{"question": f"Number {n}:", "choices": choices, "answer": n % 3} for n in range(9)]
    (here / "quiz.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"prompt": "The end of", "answer": "it"}, {"prompt": "No", "answer": ["way", "one"]}]
    (here / "exact.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ("--task-file", "quiz.jsonl", "--task-file", "exact.jsonl")


def tasks_of(outcome, index=0):
    return outcome.value["results"][index]["metrics"]["tasks"]


def test_every_figure_of_a_pair_is_in_the_object(files, other, qtool):
    outcome = qtool("eval", other, "./model", *REF, *files, *NONE, "--json")
    found = tasks_of(outcome)
    assert [*found] == ["quiz", "exact"]
    quiz = found["quiz"]
    assert (quiz["source"], quiz["samples"], quiz["metric"]) == ("file", 9, "acc")
    assert set(quiz["other"]) == {"acc_norm"}
    assert quiz["value"] - quiz["reference"] == pytest.approx(quiz["difference"])
    assert (quiz["won"] - quiz["lost"]) / 9 == pytest.approx(quiz["difference"])
    assert len(quiz["sha256"]) == 64
    assert found["exact"]["metric"] == "exact_match"
    itself = tasks_of(outcome, 1)["quiz"]
    assert (itself["difference"], itself["won"], itself["lost"]) == (0, 0, 0)
    assert itself["mcnemar_p"] == 1
    assert "data" not in outcome.value  # no text was run
    assert outcome.value["results"][0]["seconds"] > 0


def test_without_an_original_there_are_scores_alone_and_a_limit_cuts_them(files, qtool):
    found = tasks_of(qtool("eval", "./model", *files, *NONE, "--limit", "4", "--json"))
    assert found["quiz"]["samples"] == 4
    assert "reference" not in found["quiz"]
    one = tasks_of(qtool("eval", "./model", *files, *NONE, "--limit", "1", "--json"))
    assert one["quiz"]["se"] is None


def test_tasks_stand_beside_the_figures_of_text(files, other, qtool):
    arguments = ("eval", other, *REF, *files, "--ctx", "32", "-n", "2")
    value = qtool(*arguments, "--json").value
    assert [*value["results"][0]["metrics"]] == ["ppl", "kld", "top1", "tasks"]
    shown = qtool(*arguments).out
    assert "perplexity" in shown.splitlines()[0]
    line = next(line for line in shown.splitlines() if line.startswith("task "))
    assert all(name in line for name in ("metric", "original's", "won, lost", "p", "samples"))
    assert "acc_norm: the choice that is likeliest per character is right" in shown


def test_packed_models_answer_as_well(files, packed, qtool):
    for directory in packed.values():
        found = tasks_of(qtool("eval", directory, *REF, *files, *NONE, "--json"))
        assert 0 <= found["quiz"]["value"] <= 1


def test_gates_on_tasks(files, other, qtool):
    gates = ("task:quiz>=0", "task:quiz.acc_norm>=0%", "task_drop:quiz<=100%", "task:exact>50%")
    flags = [flag for gate in gates for flag in ("--gate", gate)]
    outcome = qtool("eval", other, *REF, *files, *NONE, *flags, "--json")
    assert outcome.code == 3
    assert [gate["pass"] for gate in outcome.value["gates"]] == [True, True, True, False]
    assert "task:exact>50% failed: task exact of ./other is 0 %" in outcome.err


def test_a_gate_on_text_has_it_measured_after_all(here, other, qtool):
    flags = ("--metrics", "none", "--ctx", "32", "-n", "2", "--gate", "kld<=99", "--json")
    metrics = qtool("eval", other, *REF, *flags).value["results"][0]["metrics"]
    assert [*metrics] == ["ppl", "kld"]


def test_without_text_and_tasks_sizes_and_tokenizers_are_looked_at(here, other, qtool):
    flags = ("--gate", "size<=1GB", "--gate", "template==same")
    outcome = qtool("eval", other, *REF, *NONE, *flags, "--json")
    assert outcome.code == 0
    assert outcome.value["results"][0]["metrics"] == {}
    assert "size" in qtool("eval", other, *REF, *NONE, *flags).out


def test_the_report_has_the_tasks(files, other, here, qtool):
    assert qtool("eval", other, *REF, *files, *NONE, "--report", "report").code == 0
    page = (here / "report" / "index.html").read_text()
    text = (here / "report" / "REPORT.md").read_text()
    assert "<h2>Tasks</h2>" in page
    assert "## Tasks" in text
    for words in ("quiz, acc: other", "exact, exact_match: other"):
        assert words in page
        assert words.replace("_", r"\_") in text


def test_prompts_go_through_the_chat_template(files, here, qtool):
    plain = tasks_of(qtool("eval", "./model", *files, *NONE, "--json"))
    outcome = qtool("eval", "./model", *files, *NONE, "--apply-chat-template")
    assert_refused(outcome, 2, "no chat template")
    tiny_tokenizer(chat_template=CHATML).save_pretrained(here / "model")
    found = tasks_of(qtool("eval", "./model", *files, *NONE, "--apply-chat-template", "--json"))
    assert found["quiz"]["sha256"] == plain["quiz"]["sha256"]


REFUSED = {
    "no such file": (("--task-file", "absent.jsonl"), 2, "absent.jsonl", "choices"),
    "a line that is no JSON": (("--task-file", "bad.jsonl"), 6, "bad.jsonl:2", "not JSON"),
    "an answer out of range": (("--task-file", "range.jsonl"), 2, "range.jsonl:1", "0 to 1"),
    "a gate on another task": (("--task-file", "quiz.jsonl", "--gate", "task:x>=1"), 2, "task 'x'"),
    "a drop without an original": (
        ("--task-file", "quiz.jsonl", "--gate", "task_drop:quiz<=1%"),
        2,
        "--ref",
    ),
    "a gate on a task where there is none": (("--gate", "task:x>=1"), 2, "--task-file"),
    "a limit of nothing": (("--limit", "3"), 2, "--limit"),
    "a template for nothing": (("--apply-chat-template",), 2, "--apply-chat-template"),
    "a path without names": (("--task-path", "."), 2, "--task-path"),
    "definitions that run code": (
        ("--tasks", "x", "--task-path", "."),
        2,
        "--task-path",
        "--trust-remote-code",
    ),
    "no names": (("--tasks", " , "), 2, "--tasks"),
    "domains without text": (("--metrics", "none", "--domains"), 2, "--domains"),
    "no text among metrics": (("--metrics", "none,kld"), 2, "'none'"),
}


@pytest.mark.parametrize("request_name", REFUSED)
def test_what_cannot_be_done_is_refused(here, files, qtool, request_name):
    (here / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": ')
    (here / "range.jsonl").write_text('{"prompt": "a", "choices": ["a", "b"], "answer": 2}')
    arguments, code, *words = REFUSED[request_name]
    assert_refused(qtool("eval", "./model", *arguments), code, *words)


@pytest.mark.skipif(LM_EVAL, reason="lm_eval is installed")
def test_lm_eval_that_is_missing_is_named_with_its_command(here, qtool):
    outcome = qtool("eval", "./model", "--tasks", "hellaswag")
    assert_refused(outcome, 5, "lm_eval", "pip install 'qtool-llm[tasks]'")


# --- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def scored_requests(monkeypatch):
    """How many requests went through a model, run by run."""
    counts, score = [], StreamedTasks.score

    def counting(runner, requests):
        counts.append(len(requests))
        return score(runner, requests)

    monkeypatch.setattr(StreamedTasks, "score", counting)
    return counts


def test_answers_come_from_the_cache_and_are_the_same(files, other, qtool, scored_requests):
    arguments = ("eval", other, *REF, *files, *NONE, "--json")
    plain = qtool(*arguments).value
    first = qtool(*arguments, "--logits-cache", "kept").value
    assert sum(scored_requests) > 2 * 27
    scored_requests.clear()
    second = qtool(*arguments, "--logits-cache", "kept").value
    assert sum(scored_requests) == 0
    for value in (first, second):
        assert value["results"][0]["metrics"] == plain["results"][0]["metrics"]


def test_a_higher_limit_asks_what_is_new(files, qtool, scored_requests):
    arguments = ("eval", "./model", "--task-file", "quiz.jsonl", *NONE, "--logits-cache", "kept")
    assert qtool(*arguments, "--limit", "4", "--json").code == 0
    assert sum(scored_requests) == 4 * 3
    scored_requests.clear()
    assert tasks_of(qtool(*arguments, "--json"))["quiz"]["samples"] == 9
    assert sum(scored_requests) == 5 * 3


def test_an_interrupted_run_of_tasks_says_what_is_kept(files, other, qtool, monkeypatch):
    score = StreamedTasks.score

    def interrupted(runner, requests):
        if "other" in str(runner._checkpoint.path):
            raise KeyboardInterrupt
        return score(runner, requests)

    arguments = ("eval", other, *REF, *files, *NONE, "--logits-cache", "kept")
    with monkeypatch.context() as patch:
        patch.setattr(StreamedTasks, "score", interrupted)
        outcome = qtool(*arguments)
    assert outcome.code == 130
    assert "what is known so far is kept in kept" in outcome.err
    assert qtool(*arguments).code == 0
