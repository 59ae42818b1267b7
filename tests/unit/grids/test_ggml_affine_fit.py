"""Scales and offsets of Q4_1, Q5_1, Q2_K, Q4_K and Q5_K: against llama.cpp, at the edges."""

import gguf
import numpy as np
import pytest
import torch
from oracles import llama_cpp

from qtool.grids import ggml_affine, ggml_affine_integers
from qtool.grids.ggml import LAYOUTS, GgmlGrid

NAMES = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
WITH_INTEGERS = ("Q2_K", "Q4_K", "Q5_K")
# What may be left of llama.cpp's error: its own fit of floats is a good one.
MARGIN = {"Q4_1": 1.0, "Q5_1": 1.0, "Q2_K": 0.93, "Q4_K": 0.97, "Q5_K": 0.94}
# How far above the error of the best real scale and offset a fit may stay.
SLACK = {"Q4_1": 1.02, "Q5_1": 1.03, "Q2_K": 1.05, "Q4_K": 1.04, "Q5_K": 1.09}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=generator(seed)) * 0.02


def student(rows, columns, seed=1):
    draw = generator(seed)
    chi = torch.randn(rows, columns, 5, generator=draw).square().mean(dim=2)
    return torch.randn(rows, columns, generator=draw) / chi.sqrt() * 0.02


def lognormal(columns, seed=2, spread=1.0):
    return (torch.randn(columns, generator=generator(seed)) * spread).exp()


DRAWS = {
    "normal": normal,
    "student": student,
    "bfloat16": lambda rows, columns: normal(rows, columns, 3).bfloat16().float(),
    "positive": lambda rows, columns: normal(rows, columns, 4).abs(),
    "negative": lambda rows, columns: -normal(rows, columns, 5).abs() - 0.01,
    "sparse": lambda rows, columns: (
        normal(rows, columns, 6) * (torch.rand(rows, columns, generator=generator(7)) < 0.1)
    ),
}
# The same against the best integers for the fp16 numbers that were chosen.
INTEGER_SLACK = {"Q2_K": 1.015, "Q4_K": 1.02, "Q5_K": 1.08}
IMPORTANCE = {"alike": None, "lognormal": 1.0, "outliers": 2.5}


def importance_of(kind, columns):
    spread = IMPORTANCE[kind]
    return None if spread is None else lognormal(columns, spread=spread)


def error(weight, values, importance=None):
    squared = (weight.double() - values.double()).square()
    return float((squared if importance is None else squared * importance.double()).sum())


def fitted(name, weight, importance=None, search=True):
    """Values and parameters of a weight that is fitted and rounded to nearest."""
    grid = GgmlGrid(name, search=search)
    parameters = grid.fit(weight, importance)
    return grid.decode(grid.encode(weight, parameters), parameters), parameters


def of_llama_cpp(name, weight, importance=None):
    given = None if importance is None else importance.numpy()
    stored = llama_cpp.quantize(weight.numpy(), name, given)
    values = gguf.dequantize(stored, gguf.GGMLQuantizationType[name])
    return torch.from_numpy(values.copy()).reshape(weight.shape)


def least_error(x, weights, top, steps=48):
    """Least error of one sub-block over many ranges, each then solved for scale and offset."""
    low, high = x.min(), x.max()
    best = np.inf
    for below in np.linspace(-0.5, 2.0, steps):
        for above in np.linspace(-0.5, 2.0, steps):
            scale = (high - low) / (top + below + above)
            codes = np.clip(np.round((x - low) / scale - below), 0, top)
            for _ in range(3):
                design = np.stack([codes, np.ones_like(codes)], axis=1)
                root = np.sqrt(weights)[:, None]
                solved = np.linalg.lstsq(design * root, x * root[:, 0], rcond=None)[0]
                best = min(best, float((weights * (x - design @ solved) ** 2).sum()))
                if solved[0] <= 0:
                    break
                codes = np.clip(np.round((x - solved[1]) / solved[0]), 0, top)
    return best


@pytest.mark.parametrize("kind", IMPORTANCE)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_lower_than_llama_cpp_leaves(name, draw, kind):
    weight, importance = DRAWS[draw](67, 768), importance_of(kind, 768)
    values, _ = fitted(name, weight, importance)
    theirs = error(weight, of_llama_cpp(name, weight, importance), importance)
    assert error(weight, values, importance) < MARGIN[name] * theirs


@pytest.mark.parametrize("name", NAMES)
def test_error_comes_close_to_that_of_the_best_real_numbers(name):
    layout = LAYOUTS[name]
    weight, importance = normal(1, 256, seed=8), lognormal(256, seed=9)
    pieces = zip(
        weight.double().reshape(-1, layout.sub).numpy(),
        importance.double().reshape(-1, layout.sub).numpy(),
        strict=True,
    )
    best = sum(least_error(x, weights, layout.levels[-1], 24) for x, weights in pieces)
    values, _ = fitted(name, weight, importance)
    assert error(weight, values, importance) < SLACK[name] * best


@pytest.mark.parametrize("kind", IMPORTANCE)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", NAMES)
def test_the_search_loses_to_the_range_in_no_block(name, draw, kind):
    weight, importance = DRAWS[draw](9, 512), importance_of(kind, 512)
    block = LAYOUTS[name].block
    searched, plain = (fitted(name, weight, importance, search)[0] for search in (True, False))
    weights = torch.ones(512) if importance is None else importance

    def of_blocks(values):
        squared = (weight.double() - values.double()).square() * weights.double()
        return squared.reshape(-1, block).sum(dim=1)

    assert (of_blocks(searched) <= of_blocks(plain) * 1.001 + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_search_does_not_lose_to_the_range_where_sums_cancel(name):
    weight, importance = -1 + normal(64, 1024, seed=11) * 5e-3, lognormal(1024, spread=8.0)
    searched, plain = (fitted(name, weight, importance, search)[0] for search in (True, False))
    least = error(weight, plain, importance)
    assert error(weight, searched, importance) < 1.01 * least


@pytest.mark.parametrize("name", WITH_INTEGERS)
def test_integers_come_close_to_the_best_for_their_fp16_numbers(name):
    weight, importance = student(6, 256, seed=12), lognormal(256, seed=13)
    layout = LAYOUTS[name]
    values, parameters = fitted(name, weight, importance)
    count, top = 256 // layout.sub, layout.levels[-1]
    integers = np.arange(layout.scales[1] + 1.0)
    best = 0.0
    for row in range(6):
        scale = integers[:, None, None] * float(parameters.super_scale[row, 0])
        offset = integers[None, :, None] * float(parameters.super_offset[row, 0])
        for j in range(count):
            part = slice(j * layout.sub, (j + 1) * layout.sub)
            x = weight[row, part].double().numpy()
            codes = np.round((x + offset) / np.maximum(scale, 1e-30)).clip(0, top)
            errors = (x - codes * scale + offset) ** 2 * importance[part].double().numpy()
            best += errors.sum(axis=2).min()
    assert best * 0.999 <= error(weight, values, importance) <= best * INTEGER_SLACK[name]


STEPS = {
    "_neighbours": lambda tile, chosen, most: (
        chosen,
        tile.at(chosen.scale(), chosen.offset() + tile.mean),
    ),
    "_solve": lambda tile, moments, chosen: chosen,
    "_reround": lambda tile, moments, chosen, most: chosen,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", WITH_INTEGERS)
def test_every_step_towards_integers_lowers_the_error(name, step, monkeypatch):
    weight, importance = DRAWS["sparse"](128, 768), lognormal(768)
    whole = error(weight, fitted(name, weight, importance)[0], importance)
    monkeypatch.setattr(ggml_affine_integers, step, STEPS[step])
    assert error(weight, fitted(name, weight, importance)[0], importance) > 1.002 * whole


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_the_range_fit_covers_the_range(name):
    # fp16 numbers near 1 lie further apart than these weights.
    weight = 1 + normal(40, 96) * 1e-2
    values, parameters = fitted(name, weight, search=False)
    steps = parameters.super_scale.repeat_interleave(32, dim=1)
    assert ((values - weight).abs() <= 0.51 * steps).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_dead_sub_block_is_fitted_all_the_same(name):
    weight, importance = normal(6, 512), lognormal(512)
    importance[64:128] = 0
    values, _ = fitted(name, weight, importance)
    dead, kept = (slice(64, 128), slice(128, 192))
    share = error(weight[:, dead], values[:, dead]) / error(weight[:, kept], values[:, kept])
    assert 0.3 < share < 2


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_what_the_file_can_hold(name, search):
    weight = student(6, 768) * torch.tensor([1e-40, 1e-9, 1e-6, 1.0, 1e5, 1e30])[:, None]
    layout = LAYOUTS[name]
    values, parameters = fitted(name, weight, lognormal(768), search=search)
    assert values.isfinite().all()
    for number in (parameters.super_scale, parameters.super_offset):
        assert number.shape == (6, 768 // layout.block)
        assert torch.equal(number.half().float(), number)
        assert number.isfinite().all()
    assert (parameters.super_scale >= 0).all()
    if name not in WITH_INTEGERS:
        assert parameters.scales.shape == parameters.offsets.shape == (6, 0)
        return
    assert (parameters.super_offset >= 0).all()
    for integers in (parameters.scales, parameters.offsets):
        assert integers.shape == (6, 768 // layout.sub)
        assert torch.equal(integers.round(), integers)
        assert integers.min() >= 0
        assert integers.max() <= layout.scales[1]


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_zero_blocks_stay_zero(name, search):
    weight = normal(3, 512)
    weight[0] = 0
    weight[1, 32:64] = 0
    values, _ = fitted(name, weight, search=search)
    assert not values[0].any()
    assert not values[1, 32:64].any()
    assert values[2].any()


@pytest.mark.parametrize("value", [0.03, -0.03, 700.0, -65504.0])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_constant_blocks_are_nearly_exact(name, search, value):
    values, _ = fitted(name, torch.full((2, 256), value), search=search)
    assert torch.allclose(values, torch.full((2, 256), value), rtol=2e-3)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_a_narrow_range_far_from_zero_is_not_lost(name):
    # fp16 numbers near 1 lie further apart than these weights.
    weight = 1 + normal(7, 96) * 1e-2
    values, _ = fitted(name, weight)
    theirs = error(weight, of_llama_cpp(name, weight))
    assert error(weight, values) < 0.8 * theirs


@pytest.mark.parametrize("name", NAMES)
def test_weights_too_small_for_fp16_are_no_worse_than_zero(name):
    weight = normal(4, 256) * torch.tensor([1e-3, 1e-5, 1e-8, 1e-40])[:, None]
    values, _ = fitted(name, weight)
    for row, rounded in zip(weight, values, strict=True):
        assert error(row, rounded) <= 1.0001 * error(row, torch.zeros_like(row))


@pytest.mark.parametrize("name", NAMES)
def test_weights_too_large_for_fp16_are_cut(name):
    weight = torch.full((1, 256), 3e38)
    weight[0, ::2] = -3e38
    values, parameters = fitted(name, weight)
    assert parameters.super_scale.max() > 30000
    assert torch.equal(values.sign(), weight.sign())


@pytest.mark.parametrize("name", NAMES)
def test_an_outlier_in_a_dead_column_costs_the_others_nothing(name):
    weight, importance = normal(40, 256), torch.ones(256)
    importance[::16] = 0
    without = error(weight, fitted(name, weight, importance)[0], importance)
    weight[:, ::16] *= 30
    values, _ = fitted(name, weight, importance)
    assert error(weight, values, importance) < 1.01 * without


@pytest.mark.parametrize("name", NAMES)
def test_importance_of_zero_everywhere_says_nothing(name):
    weight = normal(5, 512)
    given = fitted(name, weight, torch.zeros(512))[0]
    assert torch.equal(given, fitted(name, weight)[0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_only_ratios_of_importance_count(name, scale):
    weight, importance = normal(5, 512), lognormal(512)
    first = error(weight, fitted(name, weight, importance)[0], importance)
    second = error(weight, fitted(name, weight, importance * scale)[0], importance)
    assert second == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_importance_over_many_decades_is_survived(name):
    weight, importance = student(8, 512), lognormal(512, spread=12.0)
    values, _ = fitted(name, weight, importance)
    assert values.isfinite().all()
    zeros = error(weight, torch.zeros_like(weight), importance)
    assert error(weight, values, importance) < 0.01 * zeros


@pytest.mark.parametrize("kind", ["alike", "lognormal"])
@pytest.mark.parametrize("name", NAMES)
def test_tiles_do_not_matter(name, kind, monkeypatch):
    weight, importance = student(37, 1536), importance_of(kind, 1536)
    whole = error(weight, fitted(name, weight, importance)[0], importance)
    monkeypatch.setattr(ggml_affine, "TILE_WEIGHTS", 5 * 512)
    monkeypatch.setattr(ggml_affine, "TILE_COLUMNS", 512)
    # Sums are added in another order: a few blocks may choose differently.
    small = error(weight, fitted(name, weight, importance)[0], importance)
    assert small == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_fitted_without_regard_to_the_others(name):
    weight, importance = normal(6, 512), lognormal(512)
    together, _ = fitted(name, weight, importance)
    for row in range(6):
        alone, _ = fitted(name, weight[row : row + 1], importance)
        expected = error(weight[row], together[row], importance)
        assert error(weight[row], alone[0], importance) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_views_are_fitted_and_nothing_given_is_changed(name):
    wide, importance = normal(6, 1024), lognormal(512)
    weight = wide[:, 256:768]
    before, importance_before = wide.clone(), importance.clone()
    values, _ = fitted(name, weight, importance)
    assert torch.equal(wide, before)
    assert torch.equal(importance, importance_before)
    assert torch.equal(values, fitted(name, weight.contiguous(), importance)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_without_rows_has_no_parameters(name):
    values, _ = fitted(name, torch.empty((0, 512)))
    assert values.shape == (0, 512)
