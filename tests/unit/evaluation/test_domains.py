"""The texts of the domains are what they are called, and short ones are not stretched."""

import unicodedata

import pytest
import torch
from builders.tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from qtool.calibration.builtin import builtin_pieces
from qtool.calibration.tokens import DatasetSource, Windows
from qtool.checkpoint.locate import locate
from qtool.evaluation.domain_texts import OTHER_SCRIPTS, digit_text
from qtool.evaluation.domains import by_domain, domain_json, domain_texts, domain_windows
from qtool.pipeline.evaluate import Extent, evaluate_fully
from qtool.pipeline.progress import Silent


def share(text, belongs):
    letters = [character for character in text if not character.isspace()]
    return sum(map(belongs, letters)) / len(letters)


def test_every_domain_is_what_it_is_called():
    texts = domain_texts()
    assert [*texts] == ["prose", "code", "digits", "non-latin"]
    assert share(texts["digits"], str.isdigit) > 0.6
    latin = share(texts["non-latin"], lambda c: c.isascii() and c.isalpha())
    assert latin == 0
    definitions = {name: text.count("\n    def ") for name, text in texts.items()}
    assert definitions["code"] > 50 > 10 * definitions["prose"] / len(texts["prose"]) * 1e4
    assert len(texts["prose"]) > 20_000
    assert len(texts["code"]) > 20_000


def test_prose_and_code_are_what_calibration_never_sees():
    calibration = "\n\n".join(builtin_pieces("calibration", None))
    texts = domain_texts()
    for name in ("prose", "code"):
        paragraphs = [p for p in texts[name].split("\n\n") if len(p) > 300]
        seen = sum(paragraph in calibration for paragraph in paragraphs)
        assert seen == 0, name


def test_the_other_scripts_are_many():
    scripts = {
        unicodedata.name(character).split()[0]
        for text in OTHER_SCRIPTS
        for character in text
        if character.isalpha()
    }
    assert {"CYRILLIC", "GREEK", "CJK", "HIRAGANA", "ARABIC", "DEVANAGARI", "HANGUL"} <= scripts
    assert {"HEBREW", "THAI"} <= scripts


def test_the_sums_are_right():
    products = [line for line in digit_text().splitlines() if " * " in line]
    assert len(products) > 50
    for line in products:
        for equation in line.split("; "):
            left, right = equation.split(" = ")
            first, operator, second = left.split()
            found = {"*": int(first) * int(second), "+": int(first) + int(second)}[operator]
            assert found == int(right)


@pytest.mark.parametrize("bos", [False, True])
def test_windows_begin_as_the_model_wants_it(bos):
    windows = domain_windows(tiny_tokenizer(bos=bos), 64)
    assert windows.ids.shape == (4, 64)
    assert windows.lengths == (64,) * 4
    assert (windows.ids[:, 0] == 256).all().item() is bos


def test_a_text_that_is_too_short_is_filled_up_and_the_filling_changes_nothing(tmp_path):
    tokenizer = tiny_tokenizer()
    texts = domain_texts()
    length = 256
    full = domain_windows(tokenizer, length)
    short = type(full)(full.names, full.ids.clone(), (length, 100, length, 37))
    for row, count in enumerate(short.lengths):
        short.ids[row, count:] = 5
    other = type(full)(full.names, short.ids.clone(), short.lengths)
    for row, count in enumerate(short.lengths):
        other.ids[row, count:] = 200
    tiny_model("llama", tmp_path / "one", seed=1)
    tiny_model("llama", tmp_path / "two", seed=2)
    both = [locate(str(tmp_path / name)) for name in ("one", "two")]
    main = Windows(full.ids[:2], (DatasetSource("text", "", 2),), "")

    def measured(windows):
        extent = Extent(domains=windows)
        return evaluate_fully(both[:1], both[1], main, torch.device("cpu"), Silent(), extent)

    first, second = (domain_json(measured(w).results[0].domains) for w in (short, other))
    assert [row["tokens"] for row in first.values()] == [255, 99, 255, 36]
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=1e-5)
    # What is measured apart does not change the figures of the text itself.
    alone = evaluate_fully(both[:1], both[1], main, torch.device("cpu"), Silent(), Extent())
    found = measured(short).results[0].comparison
    assert found.divergence.tokens == alone.results[0].comparison.divergence.tokens
    assert found.divergence.value == pytest.approx(
        alone.results[0].comparison.divergence.value, rel=1e-5
    )
    assert texts["digits"] == digit_text()


def test_scores_without_a_reference_have_a_perplexity_only(tmp_path):
    windows = domain_windows(tiny_tokenizer(), 32)
    model = locate(str(tiny_model("llama", tmp_path / "one")))
    main = Windows(windows.ids[:1], (DatasetSource("text", "", 1),), "")
    extent = Extent(domains=windows)
    found = evaluate_fully([model], None, main, torch.device("cpu"), Silent(), extent).results[0]
    assert set(domain_json(found.domains)["code"]) == {"ppl", "tokens"}
    assert by_domain([], type(windows)((), windows.ids[:0], ())) == {}
