"""Defaults: what a recipe leaves open is decided by one table."""

import pydantic
import pytest

from qtool.recipe.schema import Recipe, resolved


def decided(*, rules=(), export=(), **quantize):
    recipe = resolved(
        Recipe.model_validate(
            {
                "version": 1,
                "model": {"id": "a"},
                "quantize": quantize,
                "rules": list(rules),
                "export": [{"format": name} for name in export],
            }
        )
    )
    return recipe.quantize, [entry.format for entry in recipe.export]


@pytest.mark.parametrize(
    ("quantize", "method", "symmetric", "format_name"),
    [
        ({}, "awq", False, "awq"),
        ({"bits": 8}, "rtn", True, "compressed-tensors"),
        ({"bits": 3}, "awq", False, "gptq"),
        ({"bits": 2}, "awq", False, "gptq"),
        ({"method": "rtn"}, "rtn", True, "compressed-tensors"),
        ({"method": "rtn", "bits": 3}, "rtn", True, "gptq"),
        ({"method": "gptq"}, "gptq", True, "gptq"),
        ({"method": "gptq", "bits": 8}, "gptq", True, "gptq"),
        ({"method": "gptq", "symmetric": False}, "gptq", False, "gptq"),
        ({"method": "awq+gptq"}, "awq+gptq", True, "gptq"),
        ({"method": "awq", "symmetric": True}, "awq", True, "compressed-tensors"),
        ({"method": "awq", "bits": 8}, "awq", False, "compressed-tensors"),
        ({"method": "awq", "group_size": 0}, "awq", False, "compressed-tensors"),
        ({"method": "awq", "group_size": -1}, "awq", False, "awq"),
    ],
)
def test_method_symmetry_and_format_follow_from_each_other(
    quantize, method, symmetric, format_name
):
    got, formats = decided(**quantize)
    assert (got.method, got.symmetric, formats) == (method, symmetric, [format_name])


def test_a_rule_that_changes_the_scheme_leaves_the_format_of_one_scheme():
    assert decided(rules=[{"match": "a", "bits": 8}])[1] == ["compressed-tensors"]
    assert decided(rules=[{"match": "a", "keep": True}])[1] == ["awq"]


def test_the_awq_format_asks_for_zero_points():
    assert decided(method="rtn", export=["awq"])[0].symmetric is False
    assert decided(method="gptq", export=["gptq", "awq"])[0].symmetric is False
    assert decided(method="gptq", export=["gptq"])[0].symmetric is True


def test_what_is_said_is_kept():
    got, formats = decided(
        method="awq", symmetric=True, clip=False, export=["gptq", "compressed-tensors"]
    )
    assert (got.method, got.symmetric, got.clip) == ("awq", True, False)
    assert formats == ["gptq", "compressed-tensors"]


@pytest.mark.parametrize(
    ("method", "clip"), [("rtn", False), ("gptq", True), ("awq", True), ("awq+gptq", True)]
)
def test_scales_are_searched_unless_the_method_is_the_baseline(method, clip):
    assert decided(method=method)[0].clip is clip


def test_resolving_twice_changes_nothing():
    once = resolved(Recipe.model_validate({"version": 1, "model": {"id": "a"}}))
    assert resolved(once) == once


def test_a_recipe_cannot_be_modified():
    recipe = Recipe.model_validate({"version": 1, "model": {"id": "a"}})
    with pytest.raises(pydantic.ValidationError):
        recipe.quantize.bits = 8
    assert hash(recipe.quantize) == hash(recipe.quantize)
