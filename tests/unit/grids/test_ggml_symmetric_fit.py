"""Scales of block types without offsets: against llama.cpp, against brute force, at the edges."""

import gguf
import numpy as np
import pytest
import torch
from oracles import ggml_search_slow as slow
from oracles import llama_cpp

from qtool.grids import ggml_symmetric
from qtool.grids.ggml import LAYOUTS, GgmlGrid
from qtool.grids.ggml_levels import levels_of, nearest_codes, to_bytes, to_nearest_level

SEARCHED = ("Q4_0", "Q5_0", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS")
# How far above the least possible error a fit may stay: the finer the levels, the more the best
# scale of all is a matter of luck that a few starting points cannot all try.
FLOAT_SLACK = {"Q4_0": 1.03, "Q5_0": 1.03, "IQ4_NL": 1.03}
INTEGER_SLACK = {"Q3_K": 1.02, "Q6_K": 1.08, "IQ4_XS": 1.04}
ALL = (*SEARCHED, "Q8_0")


def normal(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def student(rows, columns, seed=1):
    draw = torch.Generator().manual_seed(seed)
    chi = torch.randn(rows, columns, 5, generator=draw).square().mean(dim=2)
    return torch.randn(rows, columns, generator=draw) / chi.sqrt() * 0.02


def lognormal(columns, seed=2, spread=1.0):
    return (torch.randn(columns, generator=torch.Generator().manual_seed(seed)) * spread).exp()


DRAWS = {
    "normal": normal,
    "student": student,
    "bfloat16": lambda rows, columns: normal(rows, columns, 3).bfloat16().float(),
}


def error(weight, values, importance=None):
    squared = (weight.double() - values.double()).square()
    return float((squared if importance is None else squared * importance.double()).sum())


def fitted(name, weight, importance=None, search=True):
    """Values, codes and parameters of a weight that is fitted and rounded to nearest."""
    grid = GgmlGrid(name, search=search)
    parameters = grid.fit(weight, importance)
    codes = grid.encode(weight, parameters)
    return grid.decode(codes, parameters), codes, parameters


def of_llama_cpp(name, weight, importance=None):
    given = None if importance is None else importance.numpy()
    stored = llama_cpp.quantize(weight.numpy(), name, given)
    values = gguf.dequantize(stored, gguf.GGMLQuantizationType[name])
    return torch.from_numpy(values.copy()).reshape(weight.shape)


def sub_blocks(name, weight, importance):
    """(sub-block, its importance) of every sub-block, row after row."""
    layout = LAYOUTS[name]
    weights = importance.expand_as(weight).reshape(-1, layout.sub).numpy()
    return list(zip(weight.reshape(-1, layout.sub).numpy(), weights, strict=True))


@pytest.mark.parametrize("importance", [None, lognormal(768)], ids=["alike", "lognormal"])
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", SEARCHED)
def test_error_is_lower_than_llama_cpp_leaves(name, draw, importance):
    weight = DRAWS[draw](131, 768)
    values, _, _ = fitted(name, weight, importance)
    theirs = error(weight, of_llama_cpp(name, weight, importance), importance)
    assert error(weight, values, importance) < 0.98 * theirs


@pytest.mark.parametrize("importance", [None, lognormal(96)], ids=["alike", "lognormal"])
def test_q8_0_is_no_worse_than_llama_cpp(importance):
    weight = student(57, 96)
    values, _, _ = fitted("Q8_0", weight, importance)
    theirs = error(weight, of_llama_cpp("Q8_0", weight, importance), importance)
    assert error(weight, values, importance) <= theirs


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_range_fit_stores_the_scales_of_llama_cpp(name):
    weight = normal(7, 96)
    _, _, parameters = fitted(name, weight, search=False)
    stored = llama_cpp.quantize(weight.numpy(), name).reshape(7 * 3, -1)
    theirs = stored[:, :2].copy().view(np.float16).astype(np.float32).reshape(7, 3)
    assert np.array_equal(parameters.super_scale.numpy(), theirs)


@pytest.mark.parametrize("name", FLOAT_SLACK)
def test_float_scales_come_close_to_the_best_of_all(name):
    weight, importance = student(9, 160), lognormal(160)
    levels = LAYOUTS[name].levels
    best = sum(slow.least_error(x, w, levels) for x, w in sub_blocks(name, weight, importance))
    values, _, _ = fitted(name, weight, importance)
    # fp16 scales can only lose against any real scale.
    assert best * 0.9999 <= error(weight, values, importance) <= best * FLOAT_SLACK[name]


@pytest.mark.parametrize("name", INTEGER_SLACK)
def test_integer_scales_come_close_to_free_scales(name):
    weight, importance = normal(4, 512), lognormal(512)
    levels = LAYOUTS[name].levels
    best = sum(slow.least_error(x, w, levels) for x, w in sub_blocks(name, weight, importance))
    values, _, _ = fitted(name, weight, importance)
    assert best * 0.9999 <= error(weight, values, importance) <= best * INTEGER_SLACK[name]


@pytest.mark.parametrize(("name", "slack"), [("Q3_K", 1.05), ("Q6_K", 1.18), ("IQ4_XS", 1.09)])
def test_the_unit_of_a_block_suits_the_sub_block_that_matters(name, slack):
    weight, importance = normal(60, 256, seed=8), torch.full((256,), 1e-4)
    importance[64:96] = 1
    weight[:, 64:96] *= 0.3  # so small a scale is a coarse multiple of most units
    values, _, _ = fitted(name, weight, importance)
    matters, alike, levels = weight[:, 64:96], torch.ones(32), LAYOUTS[name].levels
    best = sum(slow.least_error(x, w, levels) for x, w in sub_blocks(name, matters, alike))
    assert best * 0.9999 <= error(matters, values[:, 64:96]) <= best * slack


@pytest.mark.parametrize("name", INTEGER_SLACK)
def test_integers_come_close_to_the_best_for_their_unit(name):
    weight, importance = student(6, 256, seed=5), lognormal(256, seed=6)
    layout = LAYOUTS[name]
    values, _, parameters = fitted(name, weight, importance)
    units = parameters.super_scale.repeat_interleave(256 // layout.sub, dim=1).view(-1)
    best = sum(
        slow.best_integer(x, w, unit, layout.scales, layout.levels)[1]
        for (x, w), unit in zip(sub_blocks(name, weight, importance), units.tolist(), strict=True)
    )
    assert best <= error(weight, values, importance) <= best * INTEGER_SLACK[name]


@pytest.mark.parametrize("importance", [None, lognormal(768)], ids=["alike", "lognormal"])
@pytest.mark.parametrize("name", SEARCHED)
def test_search_lowers_the_error_of_the_range_fit(name, importance):
    weight = normal(20, 768)
    searched, _, _ = fitted(name, weight, importance)
    plain, _, _ = fitted(name, weight, importance, search=False)
    assert error(weight, searched, importance) < 0.95 * error(weight, plain, importance)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_parameters_are_what_the_file_can_hold(name, search):
    weight = student(5, 768) * torch.tensor([1e-9, 1e-6, 1.0, 1e5, 1e20])[:, None]
    layout = LAYOUTS[name]
    _, _, parameters = fitted(name, weight, lognormal(768), search=search)
    assert parameters.super_scale.shape == (5, 768 // layout.block)
    assert torch.equal(parameters.super_scale.half().float(), parameters.super_scale)
    assert parameters.super_scale.isfinite().all()
    assert parameters.super_offset.shape == parameters.offsets.shape == (5, 0)
    if layout.scales is None:
        assert parameters.scales.shape == (5, 0)
    else:
        assert parameters.scales.shape == (5, 768 // layout.sub)
        assert torch.equal(parameters.scales.round(), parameters.scales)
        assert parameters.scales.min() >= layout.scales[0]
        assert parameters.scales.max() <= layout.scales[1]


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_zero_blocks_stay_zero(name, search):
    weight = normal(3, 512)
    weight[0] = 0
    weight[1, 32:64] = 0
    values, _, parameters = fitted(name, weight, search=search)
    assert (parameters.scale(LAYOUTS[name])[0] == 0).all()
    assert not values[0].any()
    assert not values[1, 32:64].any()
    assert values[2].any()


@pytest.mark.parametrize("value", [0.03, -0.03, 700.0])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_constant_blocks_are_nearly_exact(name, search, value):
    weight = torch.full((2, 256), value)
    values, _, _ = fitted(name, weight, search=search)
    # Without a search the integers 31 and 32 of a largest scale are all there is.
    assert torch.allclose(values, weight, rtol=2e-3 if search else 0.02)


@pytest.mark.parametrize("name", ALL)
def test_weights_too_small_for_fp16_are_no_worse_than_zero(name):
    weight = normal(4, 256) * torch.tensor([1e-3, 1e-5, 1e-8, 1e-40])[:, None]
    values, _, _ = fitted(name, weight)
    for row, rounded in zip(weight, values, strict=True):
        assert rounded.isfinite().all()
        assert error(row, rounded) <= 1.0001 * error(row, torch.zeros_like(row))


@pytest.mark.parametrize("name", INTEGER_SLACK)
def test_weights_below_the_least_unit_use_smaller_integers(name):
    weight = normal(4, 256) * 1e-4  # the largest integer would need a unit that fp16 lacks
    values, _, _ = fitted(name, weight)
    assert error(weight, values) < 0.1 * error(weight, torch.zeros_like(weight))


@pytest.mark.parametrize("name", ALL)
def test_weights_too_large_for_fp16_scales_are_clipped(name):
    weight = torch.full((1, 256), 3e38)
    weight[0, ::2] = -3e38
    values, _, parameters = fitted(name, weight)
    assert parameters.super_scale.abs().max() == 65504
    assert torch.equal(values.sign(), weight.sign())


@pytest.mark.parametrize("name", ALL)
def test_importance_times_a_huge_weight_may_overflow(name):
    weight, importance = torch.full((1, 256), 3e36), torch.full((256,), 1e-3)
    weight[0, ::16] = 3e38
    importance[5] = 1
    values, _, _ = fitted(name, weight, importance)
    assert values.isfinite().all()
    assert (values[0, ::16] > 0).all()


@pytest.mark.parametrize("name", SEARCHED)
def test_an_outlier_in_a_dead_column_costs_the_others_nothing(name):
    weight, importance = normal(40, 256), torch.ones(256)
    importance[7] = 0
    before = error(weight, fitted(name, weight, importance)[0], importance)
    weight[:, 7] *= 30
    after = error(weight, fitted(name, weight, importance)[0], importance)
    assert after < 1.1 * before


@pytest.mark.parametrize("name", SEARCHED)
def test_a_sub_block_of_dead_columns_is_kept(name):
    weight, importance = normal(4, 256), torch.ones(256)
    importance[32:64] = 0
    values, _, _ = fitted(name, weight, importance)
    dead = weight[:, 32:64]
    assert error(dead, values[:, 32:64]) < 0.1 * error(dead, torch.zeros_like(dead))


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_of_zeros_counts_as_none(name):
    weight = normal(3, 256)
    _, _, without = fitted(name, weight)
    _, _, zeros = fitted(name, weight, torch.zeros(256))
    assert torch.equal(without.super_scale, zeros.super_scale)
    assert torch.equal(without.scales, zeros.scales)


@pytest.mark.parametrize("factor", [2.0**-120, 2.0**120])
@pytest.mark.parametrize("name", SEARCHED)
def test_the_unit_of_importance_does_not_matter(name, factor):
    weight, importance = normal(3, 256), lognormal(256)
    _, _, one = fitted(name, weight, importance)
    _, _, other = fitted(name, weight, importance * factor)
    assert torch.equal(one.super_scale, other.super_scale)
    assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_of_enormous_range_gives_finite_scales(name):
    weight, importance = student(6, 256), lognormal(256, spread=20)
    values, _, _ = fitted(name, weight, importance)
    assert values.isfinite().all()
    plain, _, _ = fitted(name, weight, importance, search=False)
    assert error(weight, values, importance) <= error(weight, plain, importance)


@pytest.mark.parametrize("importance", [None, lognormal(512)], ids=["alike", "lognormal"])
@pytest.mark.parametrize("name", ALL)
def test_rows_are_fitted_alike_in_chunks_of_any_size(name, importance, monkeypatch):
    weight = normal(11, 512)
    kept = weight.clone()
    whole, codes, _ = fitted(name, weight, importance)
    monkeypatch.setattr(ggml_symmetric, "WEIGHTS_AT_ONCE", 3 * 512)
    chunked, chunked_codes, _ = fitted(name, weight, importance)
    # torch adds in another order in narrower arrays, so that a near tie can go the other way.
    assert (codes == chunked_codes).float().mean() > 0.98
    assert error(weight, chunked, importance) == pytest.approx(
        error(weight, whole, importance), rel=1e-3
    )
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("name", ALL)
def test_a_transposed_weight_is_fitted_like_its_copy(name):
    weight = normal(256, 33).T
    _, codes, parameters = fitted(name, weight)
    _, copied_codes, copied = fitted(name, weight.contiguous())
    assert torch.equal(parameters.super_scale, copied.super_scale)
    assert torch.equal(codes, copied_codes)


@pytest.mark.parametrize("name", ALL)
def test_no_rows_give_no_scales(name):
    parameters = GgmlGrid(name).fit(torch.empty(0, 256))
    assert parameters.super_scale.shape == (0, 256 // LAYOUTS[name].block)


@pytest.mark.parametrize("name", ALL)
def test_codes_are_the_nearest_of_all_levels(name):
    layout = LAYOUTS[name]
    low = layout.levels[layout.least_code]
    draw = torch.Generator().manual_seed(9)
    scaled = (torch.rand(5, 1001, generator=draw) - 0.5) * 3 * layout.levels[-1]
    expected = slow.nearest(scaled.numpy(), layout.levels[layout.least_code :])
    codes = to_bytes(nearest_codes(scaled.clone(), layout))
    assert np.array_equal(codes.numpy(), expected + layout.least_code)
    values = levels_of(codes, layout)
    assert values.min() == low
    if not layout.least_code:
        assert torch.equal(to_nearest_level(scaled.clone(), layout), values)


@pytest.mark.parametrize("whole", [True, False], ids=["tensor", "column"])
def test_q8_0_never_uses_minus_128(whole):
    weight, grid = torch.full((1, 32), 1.0), GgmlGrid("Q8_0")
    parameters = grid.fit(weight)
    pushed = weight * -5  # error feedback can push a weight far out of the range
    if whole:
        codes = grid.encode(pushed, parameters)
    else:
        codes = grid.columns(parameters).encode(pushed[:, 3], 3)
    assert (codes == 1).all()
