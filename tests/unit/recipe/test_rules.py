"""Rules: the first match wins, and a pattern means what it says."""

import pytest

from qtool.errors import UsageError
from qtool.recipe.rules import first_match, matches, parse_ignore, parse_override, unmatched
from qtool.recipe.schema import Rule

NAME = "model.layers.10.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (NAME, NAME, True),
        (NAME, f"{NAME}.weight", True),
        (f"{NAME}.weight", NAME, True),
        ("mlp.*_proj.weight", f"{NAME}.weight", True),
        ("mlp.*_proj.bias", f"{NAME}.weight", False),
        ("down_proj", NAME, True),
        ("mlp.down_proj", NAME, True),
        ("mlp.*_proj", NAME, True),
        ("proj", NAME, False),
        ("own_proj", NAME, False),
        ("down", NAME, False),
        ("model.layers.1.*", NAME, False),
        ("model.layers.10.*", NAME, True),
        ("model.layers.?.*", NAME, False),
        ("model.layers.1[0-3].*", NAME, True),
        ("*.down_proj", NAME, True),
        ("*", NAME, True),
        ("Down_proj", NAME, False),
        ("lm_head", "lm_head", True),
        ("lm_head", "lm_head.weight", True),
        ("lm_head", "model.lm_head_norm", False),
        (r"re:.*down_proj$", NAME, True),
        (r"re:down_proj$", NAME, False),
        (r"re:model\.layers\.(0|10)\.", NAME, True),
        (r"re:.*weight$", f"{NAME}.weight", False),
    ],
)
def test_a_pattern_is_a_glob_of_the_name_or_its_last_parts_or_an_expression(
    pattern, name, expected
):
    assert matches(pattern, name) is expected


def test_the_first_rule_that_matches_wins():
    rules = [Rule(match="model.layers.0.*", bits=8), Rule(match="down_proj", bits=3)]
    assert first_match(rules, "model.layers.0.mlp.down_proj") is rules[0]
    assert first_match(rules, "model.layers.1.mlp.down_proj") is rules[1]
    assert first_match(rules, "model.layers.1.mlp.up_proj") is None
    assert first_match([], NAME) is None


def test_rules_that_match_nothing_are_found_but_not_those_that_come_too_late():
    rules = [Rule(match="*", bits=8), Rule(match="down_proj", bits=3), Rule(match="dwn", bits=3)]
    assert unmatched(rules, iter([NAME, "lm_head"])) == [rules[2]]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("down_proj=bits:8", Rule(match="down_proj", bits=8)),
        ("a=bits:8,group_size:32", Rule(match="a", bits=8, group_size=32)),
        ("a=symmetric:false", Rule(match="a", symmetric=False)),
        ("a=group_size:-1", Rule(match="a", group_size=-1)),
        ("a=keep:true", Rule(match="a", keep=True)),
        ("re:a=b$= bits: 8", Rule(match="re:a=b$", bits=8)),
    ],
)
def test_an_override_is_a_rule(text, rule):
    assert parse_override(text) == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("down_proj", "not PATTERN=KEY:VALUE"),
        ("=bits:8", "not PATTERN=KEY:VALUE"),
        ("a=", "not PATTERN=KEY:VALUE"),
        ("a=bits", "'bits' is neither KEY:VALUE nor a type"),
        ("a=bits:", "'bits:' is neither KEY:VALUE nor a type"),
        ("a=bits:8,", "'' is neither KEY:VALUE nor a type"),
        ("a=bit:8", "unknown key 'bit'"),
        ("a=bits:5", "'bits' is 5, must be 2, 3, 4 or 8"),
        ("a=bits:four", "'bits' is 'four'"),
        ("a=bits:8,bits:4", "the key 'bits' stands twice"),
        ("a=match:b", "the key 'match' stands twice"),
        ("a=bits:[", "not YAML"),
        ("a=keep:true,bits:8", "either keep: true or"),
        ("re:(=bits:8", "must be a regular expression"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_by_name(text, said):
    with pytest.raises(UsageError) as caught:
        parse_override(text)
    assert caught.value.message.startswith(f"--override '{text}': ")
    assert said in caught.value.message
    assert caught.value.hint


def test_ignoring_keeps_what_matches():
    assert parse_ignore("lm_head") == Rule(match="lm_head", keep=True)
    for pattern in ("", "re:["):
        with pytest.raises(UsageError, match="--ignore"):
            parse_ignore(pattern)
