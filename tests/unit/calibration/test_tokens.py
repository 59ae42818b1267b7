"""Windows of tokens, counted by hand with a tokenizer of one token per byte."""

import hashlib
import json
import logging
import struct

import pytest
import torch
from tiny_tokenizer import CHATML, tiny_tokenizer

from qtool.calibration import tokens
from qtool.calibration.datasets import DatasetSpec, parse_dataset
from qtool.calibration.tokens import evaluation_windows, shares, token_windows
from qtool.errors import UsageError


def text_file(path, text):
    path.write_text(text, encoding="utf-8")
    return DatasetSpec("file", str(path))


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return DatasetSpec("file", str(path))


def draw(tokenizer, *specs, windows=4, length=8, seed=0, **options):
    return token_windows(
        tokenizer, list(specs), windows=windows, length=length, seed=seed, **options
    )


PROSE = "".join(f"the {n}th theorem, then the other;\n" for n in range(60))


@pytest.mark.parametrize(("windows", "length"), [(3, 8), (10, 33), (1, 100)])
def test_a_text_file_gives_a_seeded_choice_of_its_consecutive_windows(windows, length, tmp_path):
    tokenizer = tiny_tokenizer(merges=(("t", "h"), ("th", "e")))
    got = draw(
        tokenizer, text_file(tmp_path / "a.txt", PROSE), windows=windows, length=length, seed=7
    )
    ids = torch.tensor(tokenizer(PROSE, add_special_tokens=False)["input_ids"])
    total = len(ids) // length
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(7))[:windows]
    assert torch.equal(got.ids, ids[: total * length].view(-1, length)[chosen])
    assert got.ids.dtype == torch.int64
    assert got.warnings == ()


def test_a_text_too_long_for_one_call_is_cut_at_line_ends_only(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer(merges=(("t", "h"), ("th", "e")))
    spec = text_file(tmp_path / "a.txt", PROSE)
    whole = evaluation_windows(tokenizer, spec, length=16)
    monkeypatch.setattr(tokens, "LONGEST_CALL", 100)
    assert torch.equal(evaluation_windows(tokenizer, spec, length=16).ids, whole.ids)


def test_rows_are_joined_by_the_end_token_without_padding(tmp_path):
    tokenizer = tiny_tokenizer()
    spec = jsonl(tmp_path / "r.jsonl", {"text": "abc"}, {"text": ""}, {"text": "defgh"})
    got = draw(tokenizer, spec, windows=1, length=10).ids[0].tolist()
    end = tokenizer.eos_token_id
    assert tokenizer.decode(got) in {"abc<eos>defgh<eos>", "defgh<eos>abc<eos>"}
    assert got.count(end) == 2


def test_rows_are_joined_by_nothing_if_there_is_no_end_token(tmp_path):
    tokenizer = tiny_tokenizer(eos=False)
    spec = jsonl(tmp_path / "r.jsonl", {"text": "abc"}, {"text": "defgh"})
    assert tokenizer.decode(draw(tokenizer, spec, windows=1).ids[0]) in {"abcdefgh", "defghabc"}


def test_no_more_rows_are_tokenized_than_needed(monkeypatch):
    calls = []
    monkeypatch.setattr(
        tokens, "_encode", lambda _, texts: calls.append(len(texts)) or [[1] * 40 for _ in texts]
    )
    draw(tiny_tokenizer(), parse_dataset("builtin"), windows=2, length=16)
    assert sum(calls) == tokens.BATCH


def test_the_seed_decides_everything():
    tokenizer, spec = tiny_tokenizer(), parse_dataset("builtin")
    one, again, other = (draw(tokenizer, spec, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.ids, again.ids)
    assert one.sha256 == again.sha256
    assert one.sha256 != other.sha256


def test_hashes_are_of_the_ids_as_little_endian_64_bit_integers(tmp_path):
    specs = [text_file(tmp_path / f"{name}.txt", PROSE * n) for n, name in ((1, "a"), (2, "b"))]
    got = draw(tiny_tokenizer(), *specs, windows=6)
    flat = got.ids.flatten().tolist()
    by_hand = [struct.pack(f"<{len(x)}q", *x) for x in (flat, flat[:24], flat[24:])]
    hashes = [hashlib.sha256(data).hexdigest() for data in by_hand]
    assert [got.sha256, *(source.sha256 for source in got.sources)] == hashes
    assert [(s.name, s.windows) for s in got.sources] == [(s.name, 3) for s in specs]


def test_a_tokenizer_that_starts_texts_with_bos_gets_it_at_every_window(tmp_path):
    spec = text_file(tmp_path / "a.txt", PROSE)
    with_bos, without = (draw(tiny_tokenizer(bos=bos), spec, seed=3) for bos in (True, False))
    assert (with_bos.ids[:, 0] == tiny_tokenizer(bos=True).bos_token_id).all()
    assert torch.equal(with_bos.ids[:, 1:], without.ids[:, 1:])
    evaluated = evaluation_windows(tiny_tokenizer(bos=True), spec, length=8)
    assert (evaluated.ids[:, 0] == tiny_tokenizer(bos=True).bos_token_id).all()


def test_no_warning_about_the_models_context_is_given(tmp_path, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        draw(tiny_tokenizer(), text_file(tmp_path / "a.txt", PROSE))
        draw(tiny_tokenizer(bos=True), parse_dataset("builtin"))
    assert not caplog.records
    assert "longer than" not in capfd.readouterr().err


# --- chats

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
RENDERED = "<user>hi</user><assistant>ho</assistant>"


@pytest.mark.parametrize(
    ("template", "mode", "expected"),
    [
        (CHATML, "auto", RENDERED),
        (CHATML, "on", RENDERED),
        (CHATML, "off", "hi\n\nho<eos>"),
        (None, "auto", "hi\n\nho<eos>"),
        (None, "off", "hi\n\nho<eos>"),
    ],
)
def test_a_chat_goes_through_the_template_if_there_is_one(template, mode, expected, tmp_path):
    tokenizer = tiny_tokenizer(chat_template=template)
    spec = jsonl(tmp_path / "r.jsonl", *[{"messages": CHAT}] * 3)
    length = len(tokenizer(expected)["input_ids"])
    got = draw(tokenizer, spec, windows=3, length=length, chat_template=mode)
    assert [tokenizer.decode(row) for row in got.ids] == [expected] * 3


def test_a_text_row_is_left_alone_by_the_template(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    got = draw(tokenizer, jsonl(tmp_path / "r.jsonl", {"text": "plain"}), windows=1, length=6)
    assert tokenizer.decode(got.ids[0]) == "plain<eos>"


def test_insisting_on_a_template_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="has no chat template"):
        draw(tiny_tokenizer(), parse_dataset("builtin"), chat_template="on")


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    refusing = "{{ raise_exception('System role not supported') }}"
    spec = jsonl(tmp_path / "r.jsonl", {"messages": CHAT})
    with pytest.raises(UsageError, match=r"r\.jsonl:1: .*System role not supported"):
        draw(tiny_tokenizer(chat_template=refusing), spec)


# --- too little text


@pytest.mark.parametrize(("text", "count"), [("x", "1 token:"), ("1234567", "7 tokens:")])
def test_less_than_one_window_is_refused_with_the_count(text, count, tmp_path):
    spec = text_file(tmp_path / "a.txt", text)
    for call in (
        lambda: draw(tiny_tokenizer(), spec),
        lambda: evaluation_windows(tiny_tokenizer(), spec, length=8),
        lambda: draw(tiny_tokenizer(eos=False), jsonl(tmp_path / "r.jsonl", {"text": text})),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.exit_code == 2
        assert f"holds {count} not one window of 8" in caught.value.message
        assert "builtin" in caught.value.hint


def test_fewer_windows_than_asked_for_are_used_with_a_warning(tmp_path):
    spec = text_file(tmp_path / "a.txt", "0123456789" * 2)
    got = draw(tiny_tokenizer(), spec, windows=5)
    assert got.ids.shape == (2, 8)
    assert got.sources[0].windows == 2
    assert got.warnings == (
        f"{spec.source} holds 20 tokens: 2 of the 5 windows of 8 tokens asked for",
    )


def test_one_short_dataset_of_two_is_a_warning(tmp_path):
    specs = [text_file(tmp_path / "a.txt", "x"), text_file(tmp_path / "b.txt", PROSE)]
    got = draw(tiny_tokenizer(), *specs)
    assert [source.windows for source in got.sources] == [0, 2]
    assert "a.txt holds 1 tokens: 0 of the 2" in got.warnings[0]


@pytest.mark.parametrize(("windows", "length"), [(0, 8), (-1, 8), (4, 1), (4, 0)])
def test_absurd_numbers_are_refused(windows, length):
    with pytest.raises(UsageError, match=f"is {windows if windows < 1 else length}"):
        draw(tiny_tokenizer(), parse_dataset("builtin"), windows=windows, length=length)


# --- several datasets


@pytest.mark.parametrize(
    ("asked", "windows", "expected"),
    [
        ([None], 7, [7]),
        ([None, None, None], 8, [3, 3, 2]),
        ([5, None, None], 8, [5, 2, 1]),
        ([96, 32], 128, [96, 32]),
        ([3, 4], 128, [3, 4]),
    ],
)
def test_a_fixed_number_is_kept_and_the_rest_is_shared(asked, windows, expected):
    assert shares([DatasetSpec("builtin", windows=n) for n in asked], windows) == expected


@pytest.mark.parametrize(("asked", "windows"), [([], 4), ([4, None], 4), ([None, None], 1)])
def test_a_dataset_left_without_windows_is_refused(asked, windows):
    with pytest.raises(UsageError):
        shares([DatasetSpec("builtin", windows=n) for n in asked], windows)


# --- evaluation


def test_evaluation_windows_are_the_first_ones_in_file_order(tmp_path):
    spec = text_file(tmp_path / "a.txt", "0123456789" * 5)
    got = evaluation_windows(tiny_tokenizer(), spec, length=12, limit=3)
    assert tiny_tokenizer().decode(got.ids.flatten()) == ("0123456789" * 5)[:36]
    assert evaluation_windows(tiny_tokenizer(), spec, length=12).ids.shape == (4, 12)


def test_evaluation_rows_are_joined_by_blank_lines_in_file_order(tmp_path):
    spec = jsonl(tmp_path / "r.jsonl", {"text": "ab"}, {"text": ""}, {"text": "cdef"})
    got = evaluation_windows(tiny_tokenizer(), spec, length=10)
    assert tiny_tokenizer().decode(got.ids[0]) == "ab\n\n\n\ncdef"


def test_the_number_of_windows_of_a_spec_limits_evaluation(tmp_path):
    text_file(tmp_path / "a.txt", PROSE)
    spec = parse_dataset(f"{tmp_path}/a.txt:n=2")
    assert evaluation_windows(tiny_tokenizer(), spec, length=8).ids.shape == (2, 8)


def test_builtin_evaluates_on_text_that_calibration_never_sees():
    tokenizer = tiny_tokenizer(eos=False)
    seen = draw(tokenizer, parse_dataset("builtin"), windows=10_000, length=64).ids
    calibrated = tokenizer.decode(seen.flatten())
    evaluated = evaluation_windows(tokenizer, parse_dataset("builtin"), length=256).ids
    assert len(evaluated) > 100
    assert sum(tokenizer.decode(row) in calibrated for row in evaluated) == 0
