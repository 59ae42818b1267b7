"""What models say to tasks, against plain transformers: one text at a time, the whole model."""

import random

import pytest
import torch
from builders.tiny_models import tiny_model
from tiny_tokenizer import CHATML, tiny_tokenizer
from transformers import AutoModelForCausalLM

from qtool import device as devices
from qtool.checkpoint.locate import locate
from qtool.errors import CapacityError, NumericalError, UnsupportedError, UsageError
from qtool.evaluation.continuations import Request, bucket_of, covers
from qtool.evaluation.streamed_tasks import StreamedTasks
from qtool.evaluation.task_files import ChoiceItem, ExactItem, TaskFile
from qtool.evaluation.task_scoring import ACC, ACC_NORM, EXACT, Shortened, score_files
from qtool.evaluation.task_tokens import TaskTokenizer, shortened
from qtool.model.skeleton import Skeleton

CPU = torch.device("cpu")


def oracle(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """Of one continuation, and what greedy decoding would have put in each of its places."""
    ids = torch.tensor([[*context, *continuation]])
    scores = model(ids, use_cache=False).logits[0].double().log_softmax(-1)[:, :]
    rows = range(len(context) - 1, ids.shape[1] - 1)
    total = sum(float(scores[row, ids[0, row + 1]]) for row in rows)
    return total, tuple(int(scores[row].argmax()) for row in rows)


@torch.no_grad()
def greedy(model, ids, count):
    """So many tokens of greedy decoding, without a cache."""
    made = list(ids)
    for _ in range(count):
        made.append(int(model(torch.tensor([made]), use_cache=False).logits[0, -1].argmax()))
    return tuple(made[len(ids) :])


def runner(directory, tmp_path, dtype=torch.float32, **settings):
    return StreamedTasks(locate(str(directory)), CPU, dtype, tmp_path, **settings)


def random_requests(count, seed, longest=70):
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        ids = tuple(draw.randrange(256) for _ in range(draw.randint(2, longest)))
        cut = draw.randint(1, len(ids) - 1)
        found.append(Request(ids[:cut], ids[cut:]))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "phi3"])
def test_log_likelihoods_are_those_of_the_whole_model(tmp_path, family):
    directory = tiny_model(family, tmp_path / "model", seed=2)
    requests = random_requests(23, seed=3)
    # Choices of one token behind one context, and one text that begins another.
    context = requests[0].context
    requests += [Request(context, (token,)) for token in (5, 6, 7)]
    requests += [Request(requests[1].context, requests[1].continuation[:1])]
    model = oracle(directory)
    found = runner(directory, tmp_path).score(requests)
    for request, answer in zip(requests, found, strict=True):
        total, tokens = log_likelihood(model, request.context, request.continuation)
        assert answer.log_probability == pytest.approx(total, rel=1e-5, abs=1e-4)
        assert answer.greedy == tokens


def test_one_block_is_in_memory_at_a_time(tmp_path, monkeypatch):
    directory = tiny_model("llama", tmp_path / "model", layers=5)
    load, loaded = Skeleton.load, []

    def watched(skeleton, path, source):
        present = [
            index
            for index, block in enumerate(skeleton.blocks)
            if any(not parameter.is_meta for parameter in block.parameters())
        ]
        assert present == []
        loaded.append(path)
        return load(skeleton, path, source)

    monkeypatch.setattr(Skeleton, "load", watched)
    runner(directory, tmp_path).score(random_requests(30, seed=1, longest=150))
    # Every block once, for texts of all lengths; the embeddings are read again for each length.
    blocks = [path for path in loaded if "layers" in path]
    assert blocks == [f"model.layers.{index}" for index in range(5)]


def test_texts_in_one_another_are_read_once():
    draw = random.Random(1)
    texts = [tuple(draw.randrange(3) for _ in range(draw.randint(2, 7))) for _ in range(200)]
    requests = [Request(text[:1], text[1:]) for text in texts]
    found = covers(requests)
    assert sorted(index for _, indices in found for index in indices) == [*range(200)]
    for text, indices in found:
        assert all(text[: len(requests[i].read)] == requests[i].read for i in indices)
    sequences = [text for text, _ in found]
    for one in sequences:
        assert not any(other[: len(one)] == one for other in sequences if other is not one)
    assert covers([]) == []


def test_buckets_fill_up_little_and_never_cross_a_power_of_two():
    for length in range(1, 5000):
        found = bucket_of(length)
        assert found >= length
        assert found <= max(16, length * 9 / 8)
        assert found <= 16 or (found - 1).bit_length() == (length - 1).bit_length()
    assert len({bucket_of(length) for length in range(1, 4097)}) < 70


def test_generated_text_is_that_of_the_whole_model(tmp_path):
    directory = tiny_model("qwen2", tmp_path / "model", seed=4)
    prompts = [request.read for request in random_requests(21, seed=5, longest=40)]
    most = [1 + index % 9 for index in range(len(prompts))]
    model = oracle(directory)
    ended = lambda index, made: index % 3 == 0 and len(made) == 2  # noqa: E731
    found = runner(directory, tmp_path).generate(prompts, most, ended)
    for index, (prompt, made) in enumerate(zip(prompts, found, strict=True)):
        count = min(most[index], 2) if index % 3 == 0 else most[index]
        assert made == greedy(model, prompt, count)


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    directory = tiny_model("llama", tmp_path / "model")
    found = runner(directory, tmp_path)
    monkeypatch.setattr(devices, "free_memory", lambda _: 100_000)
    with pytest.raises(CapacityError, match="whole of model in memory"):
        found.generate([(1, 2)], [3], lambda *_: False)


def test_tokens_that_the_model_lacks_are_refused(tmp_path):
    directory = tiny_model("llama", tmp_path / "model")
    with pytest.raises(UnsupportedError, match="300 tokens"):
        runner(directory, tmp_path).score([Request((1, 300), (2,))])


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    directory = tiny_model("llama", tmp_path / "model")
    model = oracle(directory)
    model.model.norm.weight.data *= 1e9
    model.save_pretrained(directory)
    scorer = runner(directory, tmp_path, dtype=torch.float16)
    with pytest.raises(NumericalError, match="not finite"):
        scorer.score([Request((1, 2), (3,))])


# --- a person's own questions --------------------------------------------------------------------


def file_of(*items):
    exact = tuple(item for item in items if isinstance(item, ExactItem))
    choices = tuple(item for item in items if isinstance(item, ChoiceItem))
    return TaskFile("set", None, "", choices, exact)


def exact(prompt, *answers, stop=("\n",), ignore_case=False):
    return ExactItem(prompt, answers, stop, ignore_case, "set.jsonl:1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokenizer has more than one spelling of a text."""
    directory = tiny_model("llama", tmp_path_factory.mktemp("spelling") / "model", seed=9)
    merges = ((" ", "a"), ("t", "h"), ("th", "e"), ("Ġ", "th"))
    tokenizer = tiny_tokenizer(merges=tuple(m for m in merges if m[0] != " "))
    tokenizer.save_pretrained(directory)
    return directory, tokenizer


def scored(model, tmp_path, *items, **settings):
    directory, tokenizer = model
    cut = Shortened()
    files = [file_of(*items)]
    texts = TaskTokenizer(tokenizer)
    return score_files(files, runner(directory, tmp_path), texts, cut, **settings)[0], cut


def test_the_likeliest_choice_counts_plain_and_per_character(model, tmp_path):
    directory, tokenizer = model
    draw = random.Random(8)
    words = ["the", "them", "a", "oh the", "tthh", "zebra crossing", "x y", "then there"]
    items, right, normed = [], [], []
    whole = oracle(directory)
    for _ in range(12):
        prompt = "".join(draw.choice("theab ?") for _ in range(20)).strip() + ":"
        choices = tuple(draw.sample(words, 4))
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        values = []
        for choice in choices:
            ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False)["input_ids"]
            rest = ids[len(prompt_ids) :]
            values.append(log_likelihood(whole, prompt_ids, rest)[0])
        answer = draw.randrange(4)
        items.append(ChoiceItem(prompt, choices, answer, "set.jsonl:1"))
        right.append(float(max(range(4), key=values.__getitem__) == answer))
        per = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        normed.append(float(max(range(4), key=per.__getitem__) == answer))
    found, _ = scored(model, tmp_path, *items)
    assert found == {ACC: right, ACC_NORM: normed}
    assert right != normed  # or the second could be a copy of the first


def test_an_exact_answer_is_what_greedy_decoding_writes(model, tmp_path):
    """Texts that the model does write are found right, the same with one letter changed wrong."""
    directory, tokenizer = model
    whole = oracle(directory)
    draw = random.Random(4)
    items, expected = [], []
    while len(items) < 24:
        prompt = "".join(draw.choice("theab ?") for _ in range(draw.randint(3, 20))).strip() + ":"
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        made = greedy(whole, ids, 9)
        text = tokenizer.decode(made)
        if text != tokenizer.decode(made, skip_special_tokens=True):
            continue
        end = draw.randint(3, 5)
        answer, stop = text[:end], text[end : end + 1]
        if not answer.strip() or not stop.strip() or stop in answer or "\ufffd" in answer + stop:
            continue
        items.append(exact(prompt, answer.strip(), stop=(stop,)))
        items.append(exact(prompt, f"{answer.strip()}q", "other", stop=(stop,)))
        expected += [1.0, 0.0]
    found, _ = scored(model, tmp_path, *items)
    wrong = [
        (item, got)
        for item, got, wanted in zip(items, found[EXACT], expected, strict=True)
        if got != wanted
    ]
    assert not wrong


def test_any_of_several_answers_counts_and_case_if_it_is_to(model, tmp_path):
    directory, tokenizer = model
    ids = tokenizer("the:", add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(greedy(oracle(directory), ids, 12))
    place = next(i for i in range(3, 9) if text[i].isascii() and text[i].strip())
    answer, stop = text[:place].strip(), text[place]
    other = answer.swapcase()
    items = [
        exact("the:", "nothing", answer, stop=(stop,)),
        exact("the:", other, stop=(stop,)),
        exact("the:", other, stop=(stop,), ignore_case=True),
    ]
    found, _ = scored(model, tmp_path, *items)
    assert found[EXACT] == [1.0, float(other == answer), 1.0]


def test_a_prompt_longer_than_the_model_can_read_loses_its_beginning(model, tmp_path):
    long = "the " * 300 + "end:"
    short = long[-200:]
    items = [ChoiceItem(prompt, ("a b", "the"), 1, "set.jsonl:1") for prompt in (long, short)]
    found, cut = scored(model, tmp_path, items[0])
    assert cut.texts == 2
    assert len(found[ACC]) == 1
    with pytest.raises(UsageError, match=r"set.jsonl:1: an answer takes"):
        scored(model, tmp_path, ChoiceItem("the", ("x" * 400, "y"), 1, "set.jsonl:1"))
    with pytest.raises(UsageError, match=r"set.jsonl:1: an answer takes"):
        scored(model, tmp_path, exact("the", "x" * 400))


def test_an_empty_prompt_stands_behind_the_end_of_text(model, tmp_path):
    directory, tokenizer = model
    found, _ = scored(model, tmp_path, ChoiceItem("", ("the", "oh"), 0, "set.jsonl:1"))
    whole = oracle(directory)
    values = [
        log_likelihood(whole, [tokenizer.eos_token_id], tokenizer(text)["input_ids"])[0]
        for text in ("the", "oh")
    ]
    assert found[ACC] == [float(values[0] > values[1])]


# --- tokens --------------------------------------------------------------------------------------


def test_a_token_across_the_boundary_belongs_to_the_continuation():
    texts = TaskTokenizer(tiny_tokenizer(merges=(("t", "h"), ("Ġ", "th"))))
    request = texts.request("so ", "this")
    assert texts.decode(request.context) == "so"
    assert texts.decode(request.continuation) == " this"
    merged = texts.request("go t", "he")  # "th" swallows the prompt's last letter
    assert texts.decode(merged.context + merged.continuation) == "go the"
    assert merged.continuation


def test_a_model_that_wants_a_beginning_gets_one_and_only_one():
    texts = TaskTokenizer(tiny_tokenizer(bos=True))
    assert texts.encode("a")[0] == texts.prefix
    assert texts.encode("<bos>a") == texts.encode("a")
    assert texts.request("", "a").context == (texts.prefix,)
    plain = TaskTokenizer(tiny_tokenizer(eos=False))
    with pytest.raises(UsageError, match="empty prompt"):
        plain.request("", "a")


def test_the_chat_template_lays_prompts_out():
    texts = TaskTokenizer(tiny_tokenizer(chat_template=CHATML))
    shown = texts.conversation([{"role": "user", "content": "hi"}])
    assert shown == "<user>hi</user><assistant>"
    with pytest.raises(UsageError, match="no chat template"):
        TaskTokenizer(tiny_tokenizer()).conversation([{"role": "user", "content": "hi"}])


def test_shortening_keeps_the_continuation_and_something_before_it():
    request = Request(tuple(range(10)), (10, 11))
    assert shortened(request, 11) is request
    assert shortened(request, 5).read == (6, 7, 8, 9, 10)
    assert shortened(request, 2) == Request((9,), (10, 11))
