"""Integer grids against brute force over all codes and hand counts."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from qtool.errors import NumericalError, UsageError
from qtool.grids.integer import IntegerGrid
from qtool.grids.protocol import QuantizedTensor

BITS = (2, 3, 4, 8)
# rows, columns, group size, granularity
SPREADS = [
    pytest.param(7, 33, 11, "group", id="33-by-11"),
    pytest.param(33, 100, 20, "group", id="100-by-20"),
    pytest.param(3, 576, 64, "group", id="576-by-64"),
    pytest.param(5, 576, 576, "group", id="one-group"),
    pytest.param(6, 33, 128, "channel", id="channel"),
    pytest.param(33, 100, 128, "tensor", id="tensor"),
    pytest.param(1, 1, 1, "group", id="one-weight"),
]
SCALE_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make(bits=4, symmetric=True, group=32, granularity="group", **options):
    return IntegerGrid(
        bits=bits, symmetric=symmetric, group_size=group, granularity=granularity, **options
    )


def heavy_tailed(rows, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, columns, generator=draw)
        * torch.randn(rows, columns, generator=draw).exp()
    )


def per_weight(values, shape, width):
    """Parameters [R, G] as float64, one for each weight."""
    return np.repeat(values.double().numpy(), width, axis=1)[:, : shape[1]]


def weighted_error(weight, grid, parameters, importance=None):
    """Sum over each group of importance * squared error, in float64 and by the definition."""
    width = grid.width(weight.shape[1])
    scale = per_weight(parameters.scale, weight.shape, width)
    zero = per_weight(parameters.zero, weight.shape, width)
    values = weight.double().numpy()
    codes = np.clip(np.rint(values / scale + zero), 0, 2**grid.bits - 1)
    squared = (scale * (codes - zero) - values) ** 2
    if importance is not None:
        squared = squared * importance.double().numpy()
    if grid.granularity == "tensor":
        return squared.sum(keepdims=True)
    return squared.reshape(weight.shape[0], -1, width).sum(axis=2)


@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group", "granularity"), SPREADS)
def test_no_other_code_is_nearer(rows, columns, group, granularity, bits, symmetric, search):
    grid = make(bits, symmetric, group, granularity, search=search)
    weight = heavy_tailed(rows, columns)
    parameters = grid.fit(weight)
    codes = grid.encode(weight, parameters)
    width = columns if granularity != "group" else group
    scale = per_weight(parameters.scale, weight.shape, width)
    zero = per_weight(parameters.zero, weight.shape, width)
    every_code = np.arange(2**bits)[:, None, None]
    distances = np.abs(scale * (every_code - zero) - weight.double().numpy())
    chosen = np.take_along_axis(distances, codes.numpy()[None].astype(int), axis=0)[0]
    assert codes.dtype == torch.uint8
    assert (chosen <= distances.min(axis=0) * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group", "granularity"), SPREADS)
def test_decode_is_scale_times_code_minus_zero(rows, columns, group, granularity, bits, symmetric):
    grid = make(bits, symmetric, group, granularity)
    weight = heavy_tailed(rows, columns, seed=1)
    parameters = grid.fit(weight)
    codes = grid.encode(weight, parameters)
    width = columns if granularity != "group" else group
    expected = per_weight(parameters.scale, weight.shape, width) * (
        codes.numpy() - per_weight(parameters.zero, weight.shape, width)
    )
    np.testing.assert_allclose(grid.decode(codes, parameters).numpy(), expected, rtol=1e-6)
    quantized = QuantizedTensor(codes, parameters, grid)
    assert torch.equal(quantized.dequantize(), grid.decode(codes, parameters))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group", "granularity"), SPREADS)
def test_minmax_rounds_no_weight_by_more_than_half_a_step(rows, columns, group, granularity, bits):
    for symmetric in (True, False):
        grid = make(bits, symmetric, group, granularity, scale_dtype=torch.float32)
        weight = heavy_tailed(rows, columns, seed=2)
        parameters = grid.fit(weight)
        off = (grid.decode(grid.encode(weight, parameters), parameters) - weight).abs()
        width = columns if granularity != "group" else group
        half = per_weight(parameters.scale, weight.shape, width) / 2
        assert (off.double().numpy() <= half * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", BITS)
def test_minmax_reproduces_both_ends_of_an_asymmetric_range(bits):
    """Whatever lies on a grid through zero comes back exactly, its smallest and largest too."""
    draw = torch.Generator().manual_seed(3)
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (33, 60), generator=draw)
    zero = torch.randint(0, top + 1, (33, 3), generator=draw)
    codes[:, ::20], codes[:, 1::20] = 0, top  # every group reaches both ends
    weight = (codes - zero.repeat_interleave(20, dim=1)) * 0.125
    grid = make(bits, symmetric=False, group=20)
    parameters = grid.fit(weight)
    assert torch.equal(parameters.zero, zero.float())
    assert torch.equal(grid.encode(weight, parameters), codes.to(torch.uint8))
    assert torch.equal(grid.decode(codes.to(torch.uint8), parameters), weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_comes_near_a_symmetric_grid_that_holds_the_weights_exactly(bits):
    """Its negative end is half a step further than min-max reaches, its positive end half short."""
    draw = torch.Generator().manual_seed(4)
    middle = 2 ** (bits - 1)
    weight = torch.randint(-middle, middle, (16, 64), generator=draw) * 0.0625
    found = make(bits, group=64, search=True, scale_dtype=torch.float32)
    plain = found.plain()
    before = weighted_error(weight, plain, plain.fit(weight)).sum()
    after = weighted_error(weight, found, found.fit(weight)).sum()
    assert after < 0.5 * before


@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
def test_zero_weights_stay_zero_exactly(bits, symmetric, search):
    grid = make(bits, symmetric, group=20, search=search)
    weight = heavy_tailed(33, 100, seed=5)
    weight[:, ::7] = 0
    weight[4] = weight[4].abs() + 1  # a range without zero is widened to it
    weight[4, ::7] = 0
    weight[5] = -weight[5].abs() - 1
    weight[5, ::7] = 0
    parameters = grid.fit(weight)
    rounded = grid.decode(grid.encode(weight, parameters), parameters)
    assert (rounded[:, ::7] == 0).all()
    if symmetric:
        assert (parameters.zero == 2 ** (bits - 1)).all()


@pytest.mark.parametrize(("rows", "columns", "group", "granularity"), SPREADS)
def test_parameters_have_one_entry_for_what_shares_a_scale(rows, columns, group, granularity):
    grid = make(4, False, group, granularity, search=True)
    weight = heavy_tailed(rows, columns, seed=6)
    parameters = grid.fit(weight, torch.rand(columns))
    groups = columns // group if granularity == "group" else 1
    assert parameters.scale.shape == parameters.zero.shape == (rows, groups)
    assert parameters.scale.dtype == parameters.zero.dtype == torch.float32
    assert parameters.scale.is_contiguous()
    assert parameters.zero.is_contiguous()
    if granularity == "tensor":
        assert len(parameters.scale.unique()) == len(parameters.zero.unique()) == 1


def test_a_scale_per_tensor_spans_all_rows_and_one_per_channel_only_its_own():
    weight = torch.ones(3, 10)
    weight[1] *= 10
    per_tensor = make(granularity="tensor", scale_dtype=torch.float32).fit(weight)
    per_channel = make(granularity="channel", scale_dtype=torch.float32).fit(weight)
    assert per_tensor.scale[:, 0].tolist() == pytest.approx([20 / 15] * 3)
    assert per_channel.scale[:, 0].tolist() == pytest.approx([2 / 15, 20 / 15, 2 / 15])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group", "granularity"), SPREADS)
def test_the_search_is_never_worse_than_minmax(
    rows, columns, group, granularity, bits, symmetric, weighted
):
    grid = make(bits, symmetric, group, granularity, search=True)
    for seed in range(4):
        weight = heavy_tailed(rows, columns, seed=seed)
        draw = torch.Generator().manual_seed(100 + seed)
        importance = torch.randn(columns, generator=draw).exp() if weighted else None
        found = weighted_error(weight, grid, grid.fit(weight, importance), importance)
        plain = weighted_error(weight, grid, grid.plain().fit(weight), importance)
        assert (found <= plain * (1 + 1e-4)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_pays_on_heavy_tails(bits):
    grid = make(bits, group=64, search=True)
    weight = heavy_tailed(33, 576, seed=7)
    found = weighted_error(weight, grid, grid.fit(weight)).sum()
    plain = weighted_error(weight, grid, grid.plain().fit(weight)).sum()
    assert found < 0.9 * plain


def best_by_trying(weight, bits, symmetric, importance):
    """Least error of one group [n] over ranges from 0.5 to 1.1 of min-max, by the definition."""
    values, importance = weight.double().numpy(), importance.double().numpy()
    low, high, top = min(values.min(), 0), max(values.max(), 0), 2**bits - 1
    errors = []
    for fraction in np.linspace(0.5, 1.1, 25):
        ends = (low * fraction, high * fraction)
        if symmetric:
            ends = (-max(-ends[0], ends[1]), max(-ends[0], ends[1]))
        scale = (ends[1] - ends[0]) / top
        zero = (top + 1) // 2 if symmetric else np.clip(np.rint(-ends[0] / scale), 0, top)
        codes = np.clip(np.rint(values / scale + zero), 0, top)
        errors.append((importance * (scale * (codes - zero) - values) ** 2).sum())
    return min(errors)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_the_search_finds_the_best_range_for_what_is_important(granularity, symmetric):
    grid = make(3, symmetric, 32, granularity, search=True, scale_dtype=torch.float32)
    weight = heavy_tailed(5, 96, seed=8)
    importance = torch.where(torch.arange(96) % 3 == 0, 1000.0, 0.5)
    found = weighted_error(weight, grid, grid.fit(weight, importance), importance)
    cut = {"group": (5, 3, 32), "channel": (5, 1, 96), "tensor": (1, 1, 480)}[granularity]
    groups = weight.reshape(cut)
    weights = importance.expand(5, 96).reshape(cut)
    best = np.array(
        [
            [best_by_trying(g, 3, symmetric, w) for g, w in zip(row, heavy, strict=True)]
            for row, heavy in zip(groups, weights, strict=True)
        ]
    )
    np.testing.assert_allclose(found, best, rtol=1e-3)
    blind = weighted_error(weight, grid, grid.fit(weight), importance)
    assert found.sum() <= blind.sum() * (1 + 1e-6)
    if granularity != "tensor":  # one scale for all can hardly choose
        assert found.sum() < 0.9 * blind.sum()


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
def test_the_unit_of_importance_does_not_matter(granularity):
    grid = make(4, False, 32, granularity, search=True)
    weight = heavy_tailed(16, 96, seed=9)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(9)) + 0.1
    fits = [grid.fit(weight, importance * unit) for unit in (1.0, 2.0**-30, 2.0**30)]
    assert all(torch.equal(fits[0].scale, fit.scale) for fit in fits)
    assert all(torch.equal(fits[0].zero, fit.zero) for fit in fits)


def test_a_group_of_inputs_never_seen_is_fitted_as_if_all_counted_alike():
    grid = make(4, False, 32, search=True)
    weight = heavy_tailed(16, 96, seed=10)
    importance = torch.ones(96)
    importance[32:64] = 0
    blind = grid.fit(weight, importance)
    plain = grid.fit(weight)
    assert torch.equal(blind.scale, plain.scale)
    nowhere = grid.fit(weight, torch.zeros(96))
    assert torch.equal(nowhere.scale, plain.scale)


def test_minmax_ignores_importance():
    grid = make(4, False, 32)
    weight = heavy_tailed(16, 96, seed=11)
    assert torch.equal(grid.fit(weight, torch.rand(96)).scale, grid.fit(weight).scale)


@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-38, 1e-6, 1.0, 1e4, 1e6])
def test_scales_are_numbers_that_the_file_can_hold(magnitude, dtype, search):
    for symmetric in (True, False):
        grid = make(4, symmetric, 20, search=search, scale_dtype=dtype)
        scale = grid.fit(heavy_tailed(7, 100, seed=12) * magnitude).scale
        assert torch.equal(scale, scale.to(dtype).to(torch.float32))
        assert (scale >= torch.finfo(dtype).smallest_normal).all()
        assert torch.isfinite(scale).all()


@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_strange_weights_give_finite_results(bits, dtype, symmetric, search):
    rows = {
        "zeros": torch.zeros(32),
        "one weight": torch.eye(32)[5],
        "subnormal": torch.full((32,), 1e-42),
        "tiny": torch.linspace(-1e-30, 1e-30, 32),
        "large": torch.linspace(-6e4, 6e4, 32),
        "huge": torch.linspace(-1, 1, 32) * 3e38,
        "huge and positive": torch.full((32,), 3e38),
        "mixed": torch.tensor([1e-40, 3e38] * 16),
        "negative": torch.linspace(-5, -4, 32),
        "constant": torch.full((32,), 0.3),
        "minus zero": torch.full((32,), -0.0),
    }
    grid = make(bits, symmetric, 16, search=search, scale_dtype=dtype)
    weight = torch.stack(list(rows.values()))
    for importance in (None, torch.zeros(32), torch.full((32,), 1e30)):
        parameters = grid.fit(weight, importance)
        codes = grid.encode(weight, parameters)
        rounded = grid.decode(codes, parameters)
        assert torch.isfinite(parameters.scale).all()
        assert ((parameters.zero >= 0) & (parameters.zero < 2**bits)).all()
        assert torch.equal(parameters.zero, parameters.zero.round())
        assert (codes <= 2**bits - 1).all()
        finite = dict(zip(rows, torch.isfinite(rounded).all(dim=1).tolist(), strict=True))
        assert all(finite.values()), finite
        assert (rounded[list(rows).index("zeros")] == 0).all()


def test_a_row_that_groups_do_not_divide_is_refused_with_the_sizes_that_do():
    with pytest.raises(UsageError) as caught:
        make(group=128).check_row(576)
    assert "128" in caught.value.message
    assert "576" in caught.value.message
    sizes = caught.value.hint.split(":")[1].split(";")[0].split(",")
    expected = [g for g in range(16, 577) if 576 % g == 0 and g % 8 == 0]
    assert (
        [int(size) for size in sizes]
        == expected
        == [16, 24, 32, 48, 64, 72, 96, 144, 192, 288, 576]
    )
    assert caught.value.exit_code == 2


def test_every_size_that_the_refusal_names_works():
    for columns in (33, 100, 576, 4864, 11008):
        with pytest.raises(UsageError) as caught:
            make(group=1000).check_row(columns)
        named = caught.value.hint.split(":")[1].split(";")[0].strip()
        for size in [] if named == "none" else named.split(","):
            make(group=int(size)).check_row(columns)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_other_granularities_take_any_row(granularity):
    make(granularity=granularity).check_row(33)


def test_fit_refuses_a_row_that_groups_do_not_divide():
    with pytest.raises(UsageError, match="does not divide"):
        make(group=32).fit(torch.ones(2, 33))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group", "granularity"), SPREADS)
def test_rounding_column_by_column_is_rounding_the_matrix(
    rows, columns, group, granularity, bits, symmetric
):
    grid = make(bits, symmetric, group, granularity)
    weight = heavy_tailed(rows, columns, seed=13)
    parameters = grid.fit(weight * 0.7)  # so that some weights lie outside the range
    codes = grid.encode(weight, parameters)
    values = grid.decode(codes, parameters)
    rounder = grid.columns(parameters)
    for index in reversed(range(columns)):
        column = weight[:, index].clone()
        chosen = rounder.encode(column, index)
        assert chosen.dtype == torch.float32
        assert torch.equal(chosen.to(torch.uint8), codes[:, index])
        assert torch.equal(rounder.decode(chosen, index), values[:, index])
        assert torch.equal(column, weight[:, index])


@pytest.mark.parametrize(("rows", "columns", "group", "granularity"), SPREADS)
def test_joined_matrices_come_apart_again(rows, columns, group, granularity):
    grid = make(4, False, group, granularity)
    heights = [rows, 2, rows + 3]
    parts = [heavy_tailed(height, columns, seed=seed) for seed, height in enumerate(heights)]
    fits = [grid.fit(part) for part in parts]
    joined = grid.join(fits)
    codes = grid.encode(torch.cat(parts), joined)
    separate = [grid.encode(part, fit) for part, fit in zip(parts, fits, strict=True)]
    assert torch.equal(codes, torch.cat(separate))
    taken = QuantizedTensor(codes, joined, grid).split_rows(heights)
    for part, fit, alone in zip(taken, fits, separate, strict=True):
        assert torch.equal(part.codes, alone)
        assert torch.equal(part.parameters.scale, fit.scale)
        assert torch.equal(part.parameters.zero, fit.zero)
    start = heights[0]
    middle = grid.rows(joined, start, start + 2)
    assert torch.equal(middle.scale, fits[1].scale)


@pytest.mark.parametrize(
    ("grid", "shape", "bits"),
    [
        # 4 bits, and per 32 weights 16 bits of scale.
        (make(4, True, 32), (64, 96), Fraction(4) + Fraction(16, 32)),
        # ... and 4 bits of zero point.
        (make(4, False, 32), (64, 96), Fraction(4) + Fraction(20, 32)),
        (make(3, False, 100), (7, 100), Fraction(3) + Fraction(19, 100)),
        (make(8, True, granularity="channel"), (7, 33), Fraction(8) + Fraction(16, 33)),
        (make(2, False, granularity="tensor"), (7, 33), Fraction(2) + Fraction(18, 7 * 33)),
        (make(4, True, 32, scale_dtype=torch.float32), (4, 64), Fraction(5)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_bits_per_weight_count_scales_and_zeros(grid, shape, bits):
    assert grid.bits_per_weight(*shape) == pytest.approx(float(bits), rel=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_a_lowest_zero_point_of_one_cuts_no_positive_weight_off(bits):
    """With the code below zero given up, the others reach as far with longer steps."""
    codes = torch.randint(0, 2**bits - 1, (33, 60), generator=torch.Generator().manual_seed(21))
    codes[:, ::20] = 2**bits - 2  # every group reaches its end
    weight = codes * 0.125
    grid = make(bits, symmetric=False, group=20, lowest_zero=1)
    parameters = grid.fit(weight)
    assert (parameters.zero == 1).all()
    assert torch.equal(grid.decode(grid.encode(weight, parameters), parameters), weight)


@pytest.mark.parametrize("bits", BITS)
def test_little_below_zero_is_rounded_by_half_a_step_whatever_the_lowest_zero_point(bits):
    weight = heavy_tailed(33, 100, seed=22).abs()
    weight[:, ::7] *= -0.01
    grid = make(bits, False, 20, scale_dtype=torch.float32, lowest_zero=1)
    parameters = grid.fit(weight)
    off = (grid.decode(grid.encode(weight, parameters), parameters) - weight).abs()
    half = per_weight(parameters.scale, weight.shape, 20) / 2
    assert (off.double().numpy() <= half * (1 + 1e-4)).all()


@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("symmetric", "lowest"), [(True, -3e38), (False, -1e38), (False, 0.0)])
def test_what_nears_the_limit_of_float32_is_rounded_like_any_other(
    symmetric, lowest, dtype, search
):
    unit = torch.linspace(lowest / 1e38, 3.0 if symmetric else 2.0, 64)
    weight = (unit * 1e38).expand(3, -1).contiguous()
    grid = make(8, symmetric, 64, search=search, scale_dtype=dtype)
    grid.check_range(weight)
    parameters = grid.fit(weight)
    off = grid.decode(grid.encode(weight, parameters), parameters).double() - weight.double()
    assert off.norm() < 0.01 * weight.double().norm()


@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (4, False), (3, True), (2, True)])
def test_what_a_code_could_carry_over_that_limit_is_refused(bits, symmetric):
    weight = (torch.linspace(-3.0, 3.0, 64) * 1e38).expand(3, -1).contiguous()
    with pytest.raises(NumericalError, match=f"beyond what {bits} bits"):
        make(bits, symmetric, scale_dtype=torch.bfloat16).check_range(weight)


def test_weights_that_only_a_lowest_zero_point_of_one_keeps_out_of_reach_are_refused():
    weight = torch.full((2, 32), 2.5 * 65504)
    make(2, symmetric=False).check_range(weight)
    with pytest.raises(NumericalError, match="beyond what 2 bits"):
        make(2, symmetric=False, lowest_zero=1).check_range(weight)


@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
def test_zero_points_stay_above_the_lowest_that_a_file_holds(search):
    weight = heavy_tailed(33, 100, seed=15).abs()  # min-max wants zero points of 0
    free = make(4, False, 20, search=search)
    bound = replace(free, lowest_zero=1)
    assert free.fit(weight).zero.min() == 0
    parameters = bound.fit(weight)
    assert parameters.zero.min() == 1
    rounded = bound.decode(bound.encode(weight, parameters), parameters)
    assert ((rounded - weight).norm() / weight.norm()) < 0.2


@pytest.mark.parametrize("granularity", ["group", "channel", "tensor"])
@pytest.mark.parametrize("search", [False, True], ids=["minmax", "search"])
def test_inputs_are_not_modified(search, granularity):
    grid = make(4, False, 20, granularity, search=search)
    weight, importance = heavy_tailed(7, 100, seed=16), torch.rand(100)
    before = weight.clone(), importance.clone()
    parameters = grid.fit(weight, importance)
    fitted = parameters.scale.clone(), parameters.zero.clone()
    codes = grid.encode(weight, parameters)
    kept = codes.clone()
    grid.decode(codes, parameters)
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])
    assert torch.equal(parameters.scale, fitted[0])
    assert torch.equal(parameters.zero, fitted[1])
    assert torch.equal(codes, kept)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16, -4])
def test_other_widths_are_refused(bits):
    with pytest.raises(UsageError, match="not a grid") as caught:
        make(bits)
    assert "2, 3, 4 or 8" in caught.value.hint


def test_names_say_what_the_grid_is():
    assert make(4, True, 128).name == "int4-sym-g128"
    assert make(8, False, granularity="channel").name == "int8-asym-channel"
    assert make(2, True, granularity="tensor").name == "int2-sym-tensor"


def test_plain_drops_only_the_search():
    grid = make(3, False, 24, search=True, scale_dtype=torch.bfloat16, lowest_zero=1)
    assert grid.plain() == replace(grid, search=False)
    assert grid.plain().plain() == grid.plain()
