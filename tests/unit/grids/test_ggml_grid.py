"""ggml's block types as grids, with parameters that no fit has chosen."""

from dataclasses import fields

import pytest
import torch
from builders.ggml_tensors import NAMES, random_parameters
from oracles import ggml_blocks_slow as slow

from qtool.errors import UsageError
from qtool.ggml_types import GGML_TYPES
from qtool.grids.ggml import LAYOUTS, GgmlGrid
from qtool.grids.ggml_parameters import BlockParameters

BITS = {"Q8_0": 8, "Q5_0": 5, "Q5_1": 5, "Q2_K": 2, "Q3_K": 3, "Q5_K": 5, "Q6_K": 6}


def every_value(name, parameters):
    """What each code stands for in each sub-block, [codes, R, S]."""
    layout = LAYOUTS[name]
    scale, offset = parameters.scale(layout), parameters.offset(layout)
    return torch.stack([level * scale - offset for level in layout.levels])


def drawn(name, rows=3, blocks=2, seed=0):
    """A grid, random parameters and weights that reach a little beyond what they cover."""
    grid = GgmlGrid(name)
    parameters = random_parameters(name, rows, blocks, seed)
    values = every_value(name, parameters)
    low, high = values.amin(dim=0)[..., None], values.amax(dim=0)[..., None]
    share = torch.rand(
        (*low.shape[:2], grid.layout.sub), generator=torch.Generator().manual_seed(seed + 9)
    )
    weight = low + (high - low) * (1.2 * share - 0.1)
    return grid, parameters, weight.reshape(rows, -1).contiguous()


def distances(name, weight, parameters):
    """Distance of every weight to every value it could take, [codes, R, C]."""
    values = every_value(name, parameters).repeat_interleave(LAYOUTS[name].sub, dim=2)
    return (weight - values).abs()


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest_of_all(name):
    grid, parameters, weight = drawn(name, rows=40)
    far = distances(name, weight, parameters)
    codes = grid.encode(weight, parameters)
    assert codes.dtype == torch.uint8
    # Q8_0 declines its lowest code, which llama.cpp never writes.
    least = far[grid.layout.least_code :].amin(dim=0)
    chosen = far.gather(0, codes[None].long())[0]
    assert (chosen <= least + 1e-5 * weight.abs().max()).all()
    assert len(codes.unique()) == len(grid.layout.levels) - grid.layout.least_code


@pytest.mark.parametrize("name", NAMES)
def test_values_are_scale_times_level_minus_offset(name):
    grid, parameters, _ = drawn(name, rows=1, blocks=1, seed=3)
    count, subs = GGML_TYPES[name].block, GGML_TYPES[name].block // grid.layout.sub
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, len(grid.layout.levels), (1, count), generator=generator)
    table = every_value(name, parameters)[:, 0].repeat_interleave(count // subs, dim=1)
    expected = table.gather(0, codes)
    found = grid.decode(codes.to(torch.uint8), parameters)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_those_of_the_format(name):
    kind, layout = slow.TYPES[name], LAYOUTS[name]
    codes = range(2**kind.code_bits)
    # ggml stores the codes of Q8_0 in two's complement: ours start at the lowest value.
    shift = 128 if name == "Q8_0" else kind.level_zero
    assert layout.levels == (kind.table or tuple(code - shift for code in codes))
    assert layout.sub == (kind.sub or kind.weights)
    if kind.scale_bits:
        zero = 128 if kind.scale_zero == 256 else kind.scale_zero
        assert layout.scales == (-zero, 2**kind.scale_bits - 1 - zero)
    assert (layout.offset == "none") == (kind.dmin is None)
    assert (layout.offset == "integer") == bool(kind.min_bits)


@pytest.mark.parametrize("name", NAMES)
def test_single_columns_are_rounded_as_the_matrix_is(name):
    grid, parameters, weight = drawn(name, rows=5, seed=5)
    codes = grid.encode(weight, parameters)
    values = grid.decode(codes, parameters)
    columns = grid.columns(parameters)
    for index in range(weight.shape[1]):
        column = columns.encode(weight[:, index], index)
        assert column.dtype == torch.float32
        assert torch.equal(column, codes[:, index].to(torch.float32)), index
        assert torch.equal(columns.decode(column, index), values[:, index]), index


@pytest.mark.parametrize("name", NAMES)
def test_nothing_given_is_changed(name):
    grid, parameters, weight = drawn(name, seed=6)
    before = weight.clone()
    kept = BlockParameters(*(getattr(parameters, f.name).clone() for f in fields(BlockParameters)))
    codes = grid.encode(weight, parameters)
    codes_before = codes.clone()
    grid.decode(codes, parameters)
    columns = grid.columns(parameters)
    column = weight[:, 3].clone()
    columns.decode(columns.encode(column, 3), 3)
    assert torch.equal(weight, before)
    assert torch.equal(column, before[:, 3])
    assert torch.equal(codes, codes_before)
    for f in fields(BlockParameters):
        assert torch.equal(getattr(parameters, f.name), getattr(kept, f.name))


@pytest.mark.parametrize("name", NAMES)
def test_joined_parameters_come_apart_again(name):
    grid = GgmlGrid(name)
    first, second = random_parameters(name, 2, 3, 7), random_parameters(name, 4, 3, 8)
    joined = grid.join([first, second])
    for part, (start, stop) in ((first, (0, 2)), (second, (2, 6))):
        for f in fields(BlockParameters):
            rows = getattr(grid.rows(joined, start, stop), f.name)
            assert torch.equal(rows, getattr(part, f.name)), f.name


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_of_several_chunks_is_rounded_row_by_row(name):
    grid, parameters, weight = drawn(name, rows=140, blocks=4096 // GGML_TYPES[name].block)
    codes = grid.encode(weight, parameters)
    values = grid.decode(codes, parameters)
    for row in (0, 63, 64, 139):
        part = grid.rows(parameters, row, row + 1)
        assert torch.equal(grid.encode(weight[row : row + 1], part)[0], codes[row])
        assert torch.equal(grid.decode(codes[row : row + 1], part)[0], values[row])


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_scale_leaves_only_the_offset(name):
    grid, parameters, weight = drawn(name, seed=10)
    parameters = BlockParameters(
        torch.zeros_like(parameters.super_scale),
        parameters.super_offset,
        parameters.scales,
        parameters.offsets,
    )
    values = grid.decode(grid.encode(weight, parameters), parameters)
    offset = parameters.offset(grid.layout).repeat_interleave(grid.layout.sub, dim=1)
    assert torch.equal(values, -offset)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_whole_blocks_are_refused(name):
    grid, block = GgmlGrid(name), GGML_TYPES[name].block
    grid.check_row(3 * block)
    with pytest.raises(UsageError, match=f"{name} stores {block} weights together"):
        grid.check_row(3 * block - 16)
    with pytest.raises(UsageError, match=name):
        grid.fit(torch.zeros(2, block + 16))


@pytest.mark.parametrize("name", NAMES)
def test_size_is_known_beforehand(name):
    grid = GgmlGrid(name)
    assert grid.bits == BITS.get(name, 4)
    kind = slow.TYPES[name]
    assert grid.bits_per_weight(3, 512) == 8 * kind.size / kind.weights


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_grid_holds_the_same_values_without_a_search(name):
    plain = GgmlGrid(name).plain()
    assert (plain.name, plain.search, plain.layout) == (name, False, LAYOUTS[name])
