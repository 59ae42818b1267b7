"""`qtool eval --tasks`: lm_eval itself runs tasks with local data on our models.

Needs lm_eval beside qtool (pip install 'qtool-llm[tasks]'); skipped where it is not.
"""

import json

import pytest
import torch
from builders.command_line import Outcome
from builders.llama_gguf import llama_gguf
from builders.tiny_models import tiny_model

from qtool.cli.app import run

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")

CHOICES = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATED = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {until: ["e"], max_gen_toks: 7}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} and {{choices}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
GROUP = """
group: local_group
task: [local_choice, local_again]
aggregate_metric_list: [{metric: acc}]
"""
OURS = ("--task-path", "tasks", "--trust-remote-code")
REF = ("--ref", "model", "--metrics", "none")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """./model, ./other, ./other.gguf, questions in ./quiz.jsonl and definitions in ./tasks."""
    for name, seed in (("model", 0), ("other", 5)):
        tiny_model("llama", tmp_path / name, hidden=128, intermediate=256, seed=seed)
    llama_gguf(tmp_path / "other", tmp_path / "other.gguf", metadata={"general.file_type": 0})
    words = ["red", "a longer answer", "x", "the end"]
    lines = [
        {"question": f"Number {n} is", "choices": words[: 2 + n % 3], "answer": n % 2}
        for n in range(11)
    ]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tasks").mkdir()
    for name, text in (("choice", CHOICES), ("text", GENERATED), ("rolling", ROLLING)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text % (tmp_path / "quiz.jsonl"))
    again = (CHOICES % (tmp_path / "quiz.jsonl")).replace("local_choice", "local_again")
    (tmp_path / "tasks" / "again.yaml").write_text(again)
    (tmp_path / "tasks" / "group.yaml").write_text(GROUP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def qtool(capfd):
    def call(*arguments):
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def tasks_of(outcome):
    assert outcome.code == 0, outcome.err
    return outcome.value["results"][0]["metrics"]["tasks"]


@pytest.mark.parametrize("model", ["other", "other.gguf"])
def test_the_same_questions_score_alike_by_lm_eval_and_from_a_file(here, qtool, model):
    flags = ("--tasks", "local_choice", *OURS, "--task-file", "quiz.jsonl")
    outcome = qtool("eval", model, *REF, *flags, "--json")
    found = tasks_of(outcome)
    own, theirs = found["quiz"], found["local_choice"]
    assert (own.pop("source"), theirs.pop("source")) == ("file", "lm_eval")
    del own["sha256"]
    assert own == theirs
    assert theirs["samples"] == 11
    assert 0 < theirs["mcnemar_p"] <= 1
    assert "it/s" not in outcome.err
    assert "fatal" not in outcome.err


def test_figures_are_those_of_lm_evals_own_transformers_model(here, qtool):
    """Its HFLM is the oracle for prompts, likelihoods, windows, stops and metrics."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["local_choice", "local_text", "local_rolling"]
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(here / "other"), dtype="float32", device="cpu", batch_size=1),
        tasks=names,
        num_fewshot=2,
        task_manager=TaskManager(include_path=str(here / "tasks")),
        bootstrap_iters=0,
    )
    flags = ("--tasks", ",".join(names), *OURS, "--num-fewshot", "2")
    found = tasks_of(qtool("eval", "other", *REF, *flags, "--json"))
    theirs = expected["results"]
    assert found["local_choice"]["value"] == theirs["local_choice"]["acc,none"]
    assert (
        found["local_choice"]["other"]["acc_norm"]["value"]
        == (theirs["local_choice"]["acc_norm,none"])
    )
    assert found["local_text"]["value"] == theirs["local_text"]["exact_match,none"]
    rolling = {found["local_rolling"]["metric"]: found["local_rolling"]["value"]}
    rolling |= {name: one["value"] for name, one in found["local_rolling"]["other"].items()}
    assert len(rolling) == 2
    for name, value in rolling.items():
        assert value == pytest.approx(theirs["local_rolling"][f"{name},none"], rel=1e-4)


def test_what_is_generated_is_what_transformers_generates(here, qtool, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qtool.checkpoint.locate import locate
    from qtool.evaluation.harness import Harness, HarnessOptions
    from qtool.evaluation.streamed_tasks import StreamedTasks
    from qtool.evaluation.task_scoring import Shortened
    from qtool.evaluation.task_tokens import TaskTokenizer

    seen = {}

    class Watched(StreamedTasks):
        def generate(self, prompts, most, ended):
            made = super().generate(prompts, most, ended)
            seen.update(zip(prompts, made, strict=True))
            return made

    tokenizer = AutoTokenizer.from_pretrained(here / "other")
    place = locate(str(here / "other"))
    runner = Watched(place, torch.device("cpu"), torch.float32, tmp_path)
    options = HarnessOptions(("local_text",), here / "tasks", limit=4)
    warn = lambda *_: None  # noqa: E731
    Harness(options).run(runner, TaskTokenizer(tokenizer), Shortened(), warn)
    model = AutoModelForCausalLM.from_pretrained(here / "other", dtype=torch.float32)
    assert len(seen) == 4
    for prompt, made in seen.items():
        ids = torch.tensor([prompt])
        most = {"max_new_tokens": len(made), "do_sample": False, "pad_token_id": 0}
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **most)
        assert whole[0, len(prompt) :].tolist() == list(made)


def test_a_group_is_one_figure_over_all_its_samples(here, qtool):
    flags = ("--tasks", "local_group", *OURS, "--limit", "6")
    outcome = qtool("eval", "other", *REF, *flags, "--gate", "task:local_group>=0", "--json")
    found = tasks_of(outcome)
    assert [*found] == ["local_group"]
    assert found["local_group"]["samples"] == 12


def test_data_that_is_on_the_hub_only_is_a_hub_error_that_names_the_task(here, qtool):
    outcome = qtool("eval", "other", "--tasks", "hellaswag", "--metrics", "none")
    assert outcome.code == 7
    assert "task hellaswag" in outcome.err
    assert "--task-file" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "hellasvag"), "hellaswag"),
        (
            ("--tasks", "local_choice", "--task-path", "absent", "--trust-remote-code"),
            "absent is not a directory",
        ),
        (("--tasks", "broken", *OURS), "broken"),
        (("--tasks", "quiz", "--task-file", "quiz.jsonl"), "both called quiz"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(here, qtool, flags, words):
    broken = (CHOICES % (here / "absent.jsonl")).replace("local_choice", "broken")
    (here / "tasks" / "broken.yaml").write_text(broken)
    outcome = qtool("eval", "other", *flags, "--metrics", "none")
    assert outcome.code == 2, outcome.err
    assert words in outcome.err
    assert "Traceback" not in outcome.err


CODE = {
    "function": "doc_to_target: !function evil.f",
    "template": "doc_to_target: \"{{ cycler.__init__.__globals__.os.system('touch MARKER') }}\"",
    "metric": "metric_list: [{metric: ./evil.py}]",
}


@pytest.mark.parametrize("kind", CODE)
def test_code_of_definitions_runs_only_where_it_is_trusted(here, qtool, kind):
    (here / "tasks" / "evil.py").write_text("open('MARKER', 'w')\ndef f(doc): return 0\n")
    text = (CHOICES % (here / "quiz.jsonl")).replace("local_choice", "evil")
    key = CODE[kind].partition(":")[0]
    kept = [line for line in text.splitlines() if not line.startswith(key)]
    (here / "tasks" / "evil.yaml").write_text("\n".join([*kept, CODE[kind]]))
    flags = ("--tasks", "evil", "--metrics", "none")
    outcome = qtool("eval", "other", *flags, "--task-path", "tasks")
    assert outcome.code == 2
    assert "--trust-remote-code" in outcome.err
    assert not (here / "MARKER").exists()
    if kind == "function":
        assert tasks_of(qtool("eval", "other", *flags, *OURS, "--json"))["evil"]["samples"] == 11
        assert (here / "MARKER").exists()
