"""Task files: what a line may look like, and what is said about one that is wrong."""

import json

import pytest

from qtool.errors import DamagedError, UsageError
from qtool.evaluation.task_files import LONGEST_LINE, read_task_file, read_task_files

CHOICES = {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}
EXACT = {"prompt": "The capital of France is", "answer": "Paris"}


def written(directory, *lines, name="set.jsonl"):
    path = directory / name
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw))
    return path


def test_a_file_of_choices(tmp_path):
    found = read_task_file(written(tmp_path, CHOICES, b"", CHOICES))
    assert (found.name, len(found), found.exact) == ("set", 2, ())
    item = found.choices[1]
    assert (item.prompt, item.choices, item.answer) == ("2 + 2 =", ("3", "4"), 1)
    assert item.place.endswith("set.jsonl:3")


def test_a_file_of_exact_answers(tmp_path):
    lines = [EXACT, {**EXACT, "answer": ["Paris", " Paris, France "], "ignore_case": True}]
    one, two = read_task_file(written(tmp_path, *lines)).exact
    assert (one.answers, one.stop, one.ignore_case) == (("Paris",), ("\n",), False)
    assert two.answers == ("Paris", "Paris, France")
    assert two.folded("  PARIS ") == "paris"
    assert one.folded("  PARIS ") == "PARIS"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ({"question": "q", "options": ["x", "y", "z"], "label": 2}, 2),
        ({"query": "q", "choices": ["x", "y"], "gold": "1"}, 1),
        ({"ctx": "q", "endings": ["x", "y"], "label": "0"}, 0),
        ({"prompt": "q", "choices": ["x", "y"], "target": "y"}, 1),
        ({"prompt": "q", "choices": ["x", "y"], "answer": "B"}, 1),
        ({"prompt": "q", "choices": ["B", "A"], "answer": "B"}, 0),  # the text, not the letter
        ({"prompt": "q", "choices": ["7", "1"], "answer": "1"}, 1),  # likewise, not the number
        ({"prompt": "q", "choices": {"A": "x", "B": "y"}, "answer": "B"}, 1),
        ({"prompt": "q", "choices": ["x", "y"], "answer": [1]}, 1),
        (
            {
                "question": "q",
                "choices": {"text": ["x", "y"], "label": ["1", "2"]},
                "answerKey": "2",
            },
            1,
        ),
    ],
)
def test_names_and_answers_that_other_data_sets_have(tmp_path, line, answer):
    assert read_task_file(written(tmp_path, line)).choices[0].answer == answer


def test_a_number_may_be_an_exact_answer(tmp_path):
    item = read_task_file(written(tmp_path, {"prompt": "6 * 7 =", "answer": 42})).exact[0]
    assert item.answers == ("42",)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    raw = b"\xef\xbb\xbf" + json.dumps(CHOICES).encode() + b"\r"
    assert len(read_task_file(written(tmp_path, raw, CHOICES))) == 2


def test_a_limit_takes_the_first_but_all_is_checked(tmp_path):
    path = written(tmp_path, CHOICES, {**CHOICES, "answer": 0}, CHOICES)
    assert [item.answer for item in read_task_file(path, 2).choices] == [1, 0]
    with pytest.raises(UsageError, match=r"set.jsonl:2"):
        read_task_file(written(tmp_path, CHOICES, {**CHOICES, "answer": 7}), 1)


WRONG = {
    "not JSON": (b"{", DamagedError, "not JSON"),
    "nested without end": (b"[" * 100_000, DamagedError, "not JSON"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', DamagedError, "0xe9 at offset 15"),
    "a list": (b"[1]", UsageError, "a list where an object was expected"),
    "no prompt": ({"choices": ["a", "b"], "answer": 0}, UsageError, "no prompt"),
    "a prompt that is a number": ({**CHOICES, "prompt": 5}, UsageError, "a number, not a text"),
    "half a character": (b'{"prompt": "\\ud800", "answer": "x"}', UsageError, "lone surrogate"),
    "no answer": ({"prompt": "q", "choices": ["a", "b"]}, UsageError, "no answer"),
    "no choices": ({**CHOICES, "choices": []}, UsageError, "0 choices"),
    "one choice": ({**CHOICES, "choices": ["a"]}, UsageError, "1 choices"),
    "choices in one text": ({**CHOICES, "choices": "ab"}, UsageError, "not a list of texts"),
    "an empty choice": ({**CHOICES, "choices": ["a", " "]}, UsageError, "choice 1"),
    "a choice twice": ({**CHOICES, "choices": ["a", "a"]}, UsageError, "twice"),
    "a choice that is null": ({**CHOICES, "choices": ["a", None]}, UsageError, "null"),
    "labels that are missing": (
        {**CHOICES, "choices": {"text": ["a", "b"], "label": ["A"]}},
        UsageError,
        "2 choices and 1 labels",
    ),
    "an answer out of range": ({**CHOICES, "answer": 2}, UsageError, "choices are 0 to 1"),
    "a negative answer": ({**CHOICES, "answer": -1}, UsageError, "choices are 0 to 1"),
    "an answer that is a fraction": ({**CHOICES, "answer": 0.5}, UsageError, "a number"),
    "an answer that is true": ({**CHOICES, "answer": True}, UsageError, "true or false"),
    "an answer that is no choice": ({**CHOICES, "answer": "C"}, UsageError, "which is no choice"),
    "an empty exact answer": ({**EXACT, "answer": " "}, UsageError, "empty"),
    "no exact answer": ({**EXACT, "answer": []}, UsageError, "empty list"),
    "an answer with a stop in it": ({**EXACT, "answer": "a\nb"}, UsageError, "ends what"),
    "a stop that is a number": ({**EXACT, "stop": 3}, UsageError, "'stop' is a number"),
    "a long line": (b"x" * (LONGEST_LINE + 1), UsageError, "4 MiB"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_line_that_is_wrong_is_named(tmp_path, case):
    line, kind, words = WRONG[case]
    with pytest.raises(kind) as caught:
        read_task_file(written(tmp_path, b"", line))
    assert words in caught.value.message
    assert "set.jsonl:2" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_kinds_are_not_mixed(tmp_path):
    with pytest.raises(UsageError, match=r"set.jsonl:2: .* another kind"):
        read_task_file(written(tmp_path, CHOICES, EXACT))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    with pytest.raises(UsageError, match="no questions"):
        read_task_file(written(tmp_path, content))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        read_task_file(tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="not a file"):
        read_task_file(tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [written(tmp_path, CHOICES), written(tmp_path / "other", EXACT)]
    with pytest.raises(UsageError, match="both called set"):
        read_task_files(paths)


def test_a_name_can_be_written_in_a_gate(tmp_path):
    assert (
        read_task_file(written(tmp_path, EXACT, name="my set<2>.v1.jsonl")).name == "my_set_2_.v1"
    )
