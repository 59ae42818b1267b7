"""What lm_eval gets for its three questions; lm_eval itself is not needed for that."""

import pytest
import torch
from builders.tiny_models import tiny_model
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import AutoModelForCausalLM

from qtool.checkpoint.locate import locate
from qtool.errors import UnsupportedError, UsageError
from qtool.evaluation import harness
from qtool.evaluation.harness_model import HarnessModel, rolling
from qtool.evaluation.streamed_tasks import StreamedTasks
from qtool.evaluation.task_scoring import Shortened
from qtool.evaluation.task_tokens import TaskTokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("harness") / "model"
    return tiny_model("llama", path, seed=6, max_position_embeddings=64)


@pytest.fixture(scope="module")
def whole(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def model(directory, tmp_path, warnings):
    runner = StreamedTasks(locate(str(directory)), CPU, torch.float32, tmp_path)
    tokenizer = TaskTokenizer(tiny_tokenizer(chat_template=CHATML))
    return HarnessModel(runner, tokenizer, Shortened(), lambda *said: warnings.append(said))


def ids_of(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def total_of(whole, ids, start):
    """Log probability of ids from number `start` on, and whether greedy decoding gives them."""
    scores = whole(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    total = sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids)))
    return total, all(int(scores[i - 1].argmax()) == ids[i] for i in range(start, len(ids)))


@torch.no_grad()
def greedy(whole, ids, count):
    made = list(ids)
    for _ in range(count):
        made.append(int(whole(torch.tensor([made])).logits[0, -1].argmax()))
    return made[len(ids) :]


def test_likelihoods_and_whether_they_are_greedy(model, whole):
    prompt = "What is it? "
    best = greedy(whole, ids_of("What is it?"), 1)
    pairs = [(prompt, "a cat"), ("", "alone"), ("What is it?", " "), ("x", "")]
    found = model.loglikelihood(pairs)
    eos = tiny_tokenizer().eos_token_id
    expected = [
        total_of(whole, ids_of("What is it? a cat"), 11),
        total_of(whole, [eos, *ids_of("alone")], 1),
        (total_of(whole, ids_of("What is it? "), 11)[0], best == ids_of(" ")),
        (0.0, True),
    ]
    for (value, is_greedy), (total, wanted) in zip(found, expected, strict=True):
        assert value == pytest.approx(total, abs=1e-3)
        assert is_greedy == wanted


def test_a_whole_text_is_predicted_token_by_token_once(model, whole):
    texts = ["short", "a text that is longer than the model can read " * 4, ""]
    found = model.loglikelihood_rolling(texts)
    eos = tiny_tokenizer().eos_token_id
    assert found[0] == pytest.approx(total_of(whole, [eos, *ids_of("short")], 1)[0], abs=1e-3)
    # Windows of 64 tokens; the last reaches back as far as it may.
    ids = [eos, *ids_of(texts[1])]
    expected = 0.0
    for start in range(1, len(ids), 64):
        stop = min(start + 64, len(ids))
        begin = max(0, stop - 65)
        expected += total_of(whole, ids[begin:stop], start - begin)[0]
    assert found[1] == pytest.approx(expected, rel=1e-4)
    assert found[2] == 0.0


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 40])
def test_rolling_windows_predict_every_token_once(count):
    ids = tuple(range(1, count + 1))
    found = rolling(ids, 0, 8)
    assert [token for request in found for token in request.continuation] == list(ids)
    assert all(len(request.read) <= 8 for request in found)
    assert all(request.context for request in found)


def test_text_is_generated_up_to_a_stop(model, whole, warnings):
    prompt = "Once upon a time"
    made = greedy(whole, ids_of(prompt), 20)
    text = tiny_tokenizer().decode(made)
    stop = next(c for i, c in enumerate(text) if i > 2 and c.isascii() and c not in text[:i])
    found = model.generate_until(
        [
            (prompt, {"until": [stop], "max_gen_toks": 20}),
            (prompt, {"until": stop, "max_new_tokens": 20, "do_sample": True}),
            (prompt, {"until": [], "max_gen_toks": 5}),
        ]
    )
    assert found[0] == found[1] == text[: text.find(stop)]
    assert found[2] == tiny_tokenizer().decode(made[:5], skip_special_tokens=True)
    assert [code for code, _ in warnings] == ["sampling"]


def test_a_prompt_leaves_room_for_what_is_generated(model):
    long = "word " * 50
    found = model.generate_until([(long, {"until": [], "max_gen_toks": 10})])
    again = model.generate_until([(long[-54:], {"until": [], "max_gen_toks": 10})])
    assert found == again
    assert model._cut.texts == 1


def test_what_makes_no_sense_is_refused(model):
    with pytest.raises(UnsupportedError, match="an answer of 100 tokens"):
        model.loglikelihood([("x", "y" * 100)])
    with pytest.raises(UsageError, match="generate many tokens"):
        model.generate_until([("x", {"max_gen_toks": "many"})])


def test_conversations_are_laid_out(model):
    history = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(history) == "<user>hi</user><assistant>"
    assert len(model.template_name) == 16
    assert model.template == CHATML


# --- what is made of lm_eval's results -----------------------------------------------------------


def sample(doc, kind="none", **metrics):
    return {"doc_id": doc, "filter": kind, "metrics": [*metrics], **metrics}


def test_parts_of_a_group_are_pooled():
    results = {
        "results": {},
        "samples": {
            "a": [sample(0, acc=1.0, acc_norm=0), sample(1, acc=0.0, acc_norm=1)],
            "b": [sample(0, acc=1.0)],
        },
    }
    found = harness._scores(results, ["a", "b"])
    assert (found.samples, found.count) == ({"acc": [1.0, 0.0, 1.0]}, 3)


def test_filters_stand_apart_and_the_main_metric_comes_first():
    results = {
        "results": {"g": {"alias": "g", "ppl,none": 7.5, "ppl_stderr,none": "N/A"}},
        "samples": {
            "g": [
                sample(0, "strict", f1=0.5, exact_match=True, ppl=(1, 2)),
                sample(0, "flexible", f1=0.7, exact_match=False, ppl=(1, 2)),
            ]
        },
    }
    found = harness._scores(results, ["g"])
    assert found.samples == {
        "exact_match,strict": [1.0],
        "exact_match,flexible": [0.0],
        "f1,strict": [0.5],
        "f1,flexible": [0.7],
    }
    assert found.summaries == {"ppl": 7.5}
    assert found.count == 1


def test_without_lm_eval_the_command_to_get_it_is_named(monkeypatch):
    monkeypatch.setattr(harness, "PACKAGE", "no_such_package")
    with pytest.raises(UnsupportedError) as caught:
        harness.check_installed()
    assert "pip install 'qtool-llm[tasks]'" in caught.value.hint
