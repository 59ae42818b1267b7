"""Structures are compared by what they do; what nothing in llama.cpp does is refused by name."""

import pytest
from builders.tokenizers_of_families import (
    BYTE_LEVEL,
    LLAMA3,
    QWEN2,
    TEKKEN,
    byte_level,
    digits,
    sequence,
    split,
)

from qtool.errors import DamagedError, UnsupportedError, UsageError
from qtool.formats.gguf_pretokenizers import (
    ALIASES,
    KNOWN_NAMES,
    TABLE,
    UNTABLED,
    by_name,
    canonical,
    pre_tokenizer_json,
    recognise,
    splits_of,
)


def name_of(structure, whole_words=False):
    return recognise(structure, whole_words=whole_words, where="tokenizer.json").name


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_every_family_is_recognised(family):
    name, structure, whole_words = BYTE_LEVEL[family]
    assert name_of(structure, whole_words) == name


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_what_is_written_for_a_row_is_recognised_as_it(row):
    assert name_of(pre_tokenizer_json(row), row.whole_words) == row.name


def test_no_two_rows_are_the_same():
    seen = {(tuple(map(canonical, row.splits)), row.whole_words) for row in TABLE}
    assert len(seen) == len(TABLE)


def test_names_stand_in_one_list_only():
    names = [row.name for row in TABLE] + list(ALIASES) + list(UNTABLED)
    assert len(names) == len(set(names)) == len(KNOWN_NAMES)
    assert set(ALIASES.values()) <= {row.name for row in TABLE}


@pytest.mark.parametrize(
    "spelling",
    [
        QWEN2.replace(r"\r", "\r").replace(r"\n", "\n"),
        QWEN2.replace(r"\p{N}|", r"\p{N}{1}|"),
        QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)"),
        QWEN2.replace(
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
            "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
        ),
        QWEN2.replace(r"\p{L}+", r"\p{L}++").replace(r"\p{N}]?", r"\p{N}]?+"),
    ],
)
def test_another_spelling_of_the_same_expression_is_recognised(spelling):
    assert name_of(sequence(split(spelling), byte_level(False))) == "qwen2"


def test_removing_what_does_not_match_is_isolating_what_does():
    removed = split(LLAMA3) | {"behavior": "Removed", "invert": True}
    assert name_of(sequence(removed, byte_level(False))) == "dbrx"


@pytest.mark.parametrize(
    "change",
    [
        {"behavior": "Removed"},
        {"behavior": "MergedWithPrevious"},
        {"invert": True},
        {"pattern": {"String": " "}},
        {"pattern": {"Regex": QWEN2.replace(r"\p{N}|", r"\p{N}{1,2}|")}},
    ],
)
def test_a_split_that_does_something_else_is_not_recognised(change):
    with pytest.raises(UnsupportedError) as refusal:
        name_of(sequence(split(QWEN2) | change, byte_level(False)))
    assert "--pre" in refusal.value.hint


def test_the_refusal_shows_the_expression():
    with pytest.raises(UnsupportedError, match=r"cat\s+then\s+dog"):
        name_of(sequence(split("cat"), split("dog"), byte_level(False)))


def test_nested_sequences_and_their_order_count():
    nested = sequence(sequence(digits(True)), byte_level(True))
    assert name_of(nested) == "refact"
    with pytest.raises(UnsupportedError):
        name_of(sequence(byte_level(True), digits(True)))


def test_taking_whole_words_decides_between_equal_splits():
    structure = sequence(split(LLAMA3), byte_level(False))
    assert name_of(structure, whole_words=True) == "llama-bpe"
    assert name_of(structure, whole_words=False) == "dbrx"
    # Where there is only one, it is taken, and the vocabulary says what that means.
    assert name_of(sequence(split(TEKKEN), byte_level(False)), whole_words=False) == "tekken"


def test_a_leading_space_is_refused():
    with pytest.raises(UnsupportedError, match="space before every text"):
        name_of(byte_level(True) | {"add_prefix_space": True})


def test_byte_level_uses_its_expression_unless_told_otherwise():
    assert splits_of({"type": "ByteLevel"}, "x") == splits_of(byte_level(True), "x")
    assert splits_of(byte_level(False), "x") == ()


@pytest.mark.parametrize(
    "structure",
    [
        "ByteLevel",
        sequence("ByteLevel"),
        {"type": "Sequence"},
        {"type": ["ByteLevel"]},
        sequence({"type": "Split", "behavior": "Isolated"}),
        sequence({"type": "Split", "pattern": {"Regex": 3}}),
    ],
)
def test_a_malformed_structure_is_damage(structure):
    with pytest.raises(DamagedError):
        name_of(structure)


def test_names_are_checked():
    assert by_name("smollm").splits == by_name("refact").splits
    assert by_name("smollm").name == "smollm"
    assert by_name("kimi-k2") is None
    with pytest.raises(UsageError, match="qwen7"):
        by_name("qwen7")
