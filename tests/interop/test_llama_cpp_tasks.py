"""Tasks on GGUF files: llama.cpp's own figures, by a binding that shares no code with ours."""

import random

import numpy as np
import pytest
import torch
from builders.llama_gguf import llama_gguf
from builders.tiny_models import tiny_model
from oracles import llama_cpp as oracle

from qtool.checkpoint.locate import locate
from qtool.errors import UnsupportedError
from qtool.evaluation.continuations import Request
from qtool.evaluation.gguf_model import GgufTokenizer
from qtool.evaluation.llama_cpp import TOKENS_AT_ONCE
from qtool.evaluation.llama_tasks import LlamaTasks
from qtool.evaluation.task_tokens import TaskTokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    sizes = {"hidden": 128, "intermediate": 256, "max_position_embeddings": 1024}
    tiny_model("llama", directory / "model", seed=3, **sizes)
    return llama_gguf(directory / "model", directory / "model.gguf", "Q8_0")


@pytest.fixture
def runner(path):
    found = LlamaTasks(locate(str(path), gguf=True))
    yield found
    found.close()


@pytest.fixture(scope="module")
def whole(path):
    found = oracle.Model(path, n_ctx=1024)
    yield found
    found.close()


def log_likelihood(whole, request):
    """From the logits of a text of its own, nothing kept from another."""
    ids = [*request.context, *request.continuation]
    scores = torch.from_numpy(whole.logits(ids)).double().log_softmax(-1)
    rows = range(len(request.context) - 1, len(ids) - 1)
    total = sum(float(scores[row, ids[row + 1]]) for row in rows)
    return total, tuple(int(scores[row].argmax()) for row in rows)


def random_ids(count, seed):
    draw = random.Random(seed)
    return tuple(draw.randrange(256) for _ in range(count))


def test_likelihoods_are_llama_cpps_whatever_texts_share(runner, whole):
    shared = random_ids(40, 1)
    requests = [Request(shared, random_ids(1 + n % 5, n)) for n in range(9)]
    requests += [Request(shared[: 10 + n], random_ids(3, 20 + n)) for n in range(5)]
    requests += [Request(shared, (token,)) for token in (5, 6, 7)]
    requests += [Request(shared[:1], shared[1:30])]
    requests += [Request(random_ids(TOKENS_AT_ONCE + 9, 7), random_ids(4, 8))]
    requests += [Request(random_ids(5, 9), random_ids(TOKENS_AT_ONCE + 3, 10))]
    for request, answer in zip(requests, runner.score(requests), strict=True):
        total, tokens = log_likelihood(whole, request)
        # Keys and values are kept in 16 bits, in batches of another size.
        assert answer.log_probability == pytest.approx(total, rel=2e-3, abs=0.02)
        assert np.mean(np.equal(answer.greedy, tokens)) > 0.9
    assert runner.score([]) == []


def test_generated_text_is_the_greedy_one(runner, whole):
    prompts = [random_ids(12, 3), random_ids(3, 4)]
    found = runner.generate(prompts, [6, 4], lambda index, made: index == 0 and len(made) == 5)
    for prompt, made, count in zip(prompts, found, (5, 4), strict=True):
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(whole.logits(ids)[-1].argmax()))
        assert made == tuple(ids[len(prompt) :])


def test_only_tokens_that_both_models_have_are_chosen(path):
    first = LlamaTasks(locate(str(path), gguf=True), vocabulary=20)
    made = first.generate([random_ids(12, 3)], [5], lambda *_: False)[0]
    first.close()
    assert max(made) < 20


def test_tokens_that_the_model_lacks_are_refused(runner):
    with pytest.raises(UnsupportedError, match="tokenized with more"):
        runner.score([Request((1, 5000), (2,))])


def test_the_tokenizer_of_a_file_reads_back_what_it_wrote(path):
    with GgufTokenizer(locate(str(path), gguf=True)) as tokenizer:
        texts = TaskTokenizer(tokenizer)
        for text in ("A question?", "Zwölf Äpfel", "日本", ""):
            assert texts.decode(texts.pieces(text)) == text
        request = texts.request("The end: ", "it is")
        assert texts.decode(request.context) == "The end:"
        assert texts.decode(request.continuation) == " it is"
        assert texts.decode((*request.context, texts.eos)) == "The end:"
