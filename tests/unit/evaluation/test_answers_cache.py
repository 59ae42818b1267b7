"""Answers to tasks are kept: each is computed once, whatever is asked with it."""

import json
import random

import pytest

from qtool.errors import CapacityError, DamagedError, UsageError
from qtool.evaluation.answers_cache import ANSWERS_FILE, CachedTasks
from qtool.evaluation.continuations import Answer, Request

KEY = {"reference": "one", "dtype": "float32"}


class Model:
    """Answers from the ids alone, and notes what it was asked."""

    longest = 77

    def __init__(self, stops_after=None):
        self.asked, self.runs, self.closed, self._left = [], 0, False, stops_after

    def score(self, requests):
        self._run(requests)
        return [answer_to(request) for request in requests]

    def generate(self, prompts, most, ended):
        self._run(prompts)
        found = []
        for index, (prompt, count) in enumerate(zip(prompts, most, strict=True)):
            made = ()
            while len(made) < count and not (made and ended(index, made)):
                made += (written_after(prompt, len(made)),)
            found.append(made)
        return found

    def _run(self, items):
        if self._left == 0:
            raise KeyboardInterrupt
        if self._left is not None:
            self._left -= 1
        self.runs += 1
        self.asked += items
        self.last = items

    def close(self):
        self.closed = True


def answer_to(request):
    draw = random.Random(f"{request.context}{request.continuation}")
    return Answer(-draw.random() / 3, tuple(draw.randrange(99) for _ in request.continuation))


def written_after(prompt, place):
    return (sum(prompt) * 31 + place * 7) % 50


def some_requests(count, seed=4):
    draw = random.Random(seed)
    return [
        Request(
            tuple(draw.randrange(1000) for _ in range(draw.randint(1, 9))),
            tuple(draw.randrange(1000) for _ in range(draw.randint(1, 5))),
        )
        for _ in range(count)
    ]


def cached(directory, model, key=KEY, tokens_at_once=20):
    return CachedTasks(model, directory, key, tokens_at_once)


def lines_of(directory):
    (path,) = directory.glob(f"*/{ANSWERS_FILE}")
    return path, path.read_bytes().splitlines()


def test_what_was_answered_is_not_asked_again(tmp_path):
    requests = some_requests(23)
    first, second = Model(), Model()
    expected = [answer_to(request) for request in requests]
    assert cached(tmp_path, first).score(requests) == expected
    assert sorted(first.asked, key=repr) == sorted(set(requests), key=repr)
    more = [*some_requests(5, seed=9), *reversed(requests)]
    assert cached(tmp_path, second).score(more) == [answer_to(request) for request in more]
    assert sorted(second.asked, key=repr) == sorted(some_requests(5, seed=9), key=repr)


def test_a_question_that_comes_twice_is_asked_once(tmp_path):
    (request,) = some_requests(1)
    model = Model()
    assert cached(tmp_path, model).score([request, request]) == [answer_to(request)] * 2
    assert model.asked == [request]


def test_where_context_ends_matters(tmp_path):
    model = Model()
    pair = [Request((1, 2), (3,)), Request((1,), (2, 3))]
    assert cached(tmp_path, model).score(pair) == [answer_to(request) for request in pair]
    assert len(model.asked) == 2


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    requests = some_requests(30)
    stopped, resumed = Model(stops_after=3), Model()
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, stopped).score(requests)
    assert 0 < len(stopped.asked) < 30
    found = cached(tmp_path, resumed).score(requests)
    assert found == [answer_to(request) for request in requests]
    assert not set(stopped.asked) & set(resumed.asked)
    assert len(stopped.asked) + len(resumed.asked) == 30


def test_parts_hold_about_as_many_tokens_as_they_should(tmp_path):
    requests = some_requests(40)
    model = Model()
    cached(tmp_path, model, tokens_at_once=50).score(requests)
    tokens = sum(len(request.read) for request in requests)
    assert tokens / (50 + 13) <= model.runs <= tokens / 50 + 1


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"reference": "another"}])
def test_another_model_or_setting_shares_nothing(tmp_path, change):
    requests = some_requests(3)
    cached(tmp_path, Model()).score(requests)
    other = Model()
    cached(tmp_path, other, {**KEY, **change}).score(requests)
    assert len(other.asked) == 3


def test_generated_text_serves_other_lengths_and_stops(tmp_path):
    prompts = [(1, 2, 3), (9,), (4, 4)]
    whole = [tuple(written_after(prompt, place) for place in range(12)) for prompt in prompts]

    def generate(model, most, ended):
        return cached(tmp_path, model).generate(prompts, most, ended)

    first, shorter, stopping, longer = (Model() for _ in range(4))
    assert generate(first, [6] * 3, lambda *_: False) == [made[:6] for made in whole]
    assert generate(shorter, [4, 6, 1], lambda *_: False) == [
        whole[0][:4],
        whole[1][:6],
        whole[2][:1],
    ]
    assert not shorter.asked
    at_three = lambda index, made: index == 1 and len(made) == 3  # noqa: E731
    assert generate(stopping, [5] * 3, at_three) == [whole[0][:5], whole[1][:3], whole[2][:5]]
    assert not stopping.asked
    # What ends behind what is known has to be written anew, with the stop of its own prompt.
    at_eight = lambda index, made: index == 2 and len(made) == 8  # noqa: E731
    assert generate(longer, [6, 6, 12], at_eight) == [whole[0][:6], whole[1][:6], whole[2][:8]]
    assert longer.asked == [prompts[2]]
    again = Model()
    assert generate(again, [6, 6, 8], lambda *_: False)[2] == whole[2][:8]
    assert not again.asked


DAMAGE = {
    "cut in the middle of a line": lambda raw: raw[:-9],
    "a flipped digit": lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
    "not text": lambda raw: b"\xff\x00\x1b]8;;" + raw[8:],
    "empty": lambda _: b"",
    "one endless line": lambda raw: raw.replace(b"\n", b" "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_lines_that_are_not_what_was_written_count_as_absent(tmp_path, damage):
    requests = some_requests(9)
    cached(tmp_path, Model()).score(requests)
    path, _ = lines_of(tmp_path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    again, last = Model(), Model()
    expected = [answer_to(request) for request in requests]
    assert cached(tmp_path, again).score(requests) == expected
    assert 0 < len(again.asked) <= 9
    assert cached(tmp_path, last).score(requests) == expected
    assert not last.asked  # the line behind a torn one is whole


WRONG = {
    "a probability that is none": {"p": "high"},
    "an infinite probability": {"p": float("-inf")},
    "tokens of another number": {"tokens": [1] * 9},
    "tokens that are none": {"tokens": [-1]},
    "no tokens": {"tokens": None},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_line_with_the_right_checksum_and_a_wrong_shape_counts_as_absent(tmp_path, wrong):
    from qtool.evaluation import answers_cache

    request = Request((1, 2), (3,))
    cached(tmp_path, Model()).score([request])
    path, lines = lines_of(tmp_path)
    entry = json.loads(lines[-1].partition(b" ")[2])
    path.write_bytes(answers_cache._line({**entry, **WRONG[wrong]}))
    model = Model()
    assert cached(tmp_path, model).score([request]) == [answer_to(request)]
    assert model.asked == [request]


def test_a_link_or_a_pipe_in_place_of_the_file_is_neither_followed_nor_waited_for(tmp_path):
    import os

    requests = some_requests(2)
    cached(tmp_path / "kept", Model()).score(requests)
    path, _ = lines_of(tmp_path / "kept")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(UsageError, match=r"answers\.jsonl"):
        cached(tmp_path / "kept", Model()).score(requests)
    assert victim.read_text() == "mine"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match=r"answers\.jsonl"):
        cached(tmp_path / "kept", Model()).score(requests)


def test_a_full_disk_says_so_and_keeps_what_was_there(tmp_path, monkeypatch):
    import errno
    import os

    from qtool.evaluation import answers_cache

    requests = some_requests(12)
    cached(tmp_path, Model()).score(requests[:6])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(answers_cache.os, "open", full)
        with pytest.raises(CapacityError, match="No space left"):
            cached(tmp_path, Model()).score(requests[6:])
    model = Model()
    cached(tmp_path, model).score(requests)
    assert sorted(model.asked, key=repr) == sorted(requests[6:], key=repr)


def test_nothing_is_kept_of_a_model_that_was_changed_meanwhile(tmp_path):
    requests = some_requests(30)

    def check():
        if model.runs == 3:
            raise DamagedError("the model was changed")

    model = Model()
    with pytest.raises(DamagedError):
        CachedTasks(model, tmp_path, KEY, 20, check).score(requests)
    again = Model()
    cached(tmp_path, again).score(requests)
    assert len(again.asked) == 30 - len(model.asked) + len(model.last)


def test_the_model_is_freed_and_its_length_is_told(tmp_path):
    model = Model()
    cache = cached(tmp_path, model)
    assert cache.longest == 77
    cache.close()
    assert model.closed
