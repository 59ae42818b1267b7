"""What every integer format promises, over bits, symmetry, groups and awkward sizes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.quantized_tensors import layouts_of, make_grid, module_of, random_tensor, same
from oracles.packed_files import DECODERS

from qtool.errors import DamagedError, UnsupportedError, UsageError
from qtool.formats.protocol import FORMATS, QuantizedModule, TensorLayout, format_of

NAME = "model.layers.0.mlp.down_proj"

# Rows and columns that each width packs, and group sizes that divide the columns (-1: per channel,
# None: per tensor).
SIZES = {
    ("gptq", 2): ((48, 96), (16, 48, -1)),
    ("gptq", 3): ((96, 64), (32, 64, -1)),
    ("gptq", 4): ((40, 96), (8, 24, 96, -1)),
    ("gptq", 8): ((44, 100), (4, 20, -1)),
    ("awq", 4): ((264, 33), (11, 33, -1)),
    ("compressed-tensors", 4): ((33, 100), (20, 100, -1, None)),
    ("compressed-tensors", 8): ((33, 57), (19, 57, -1, None)),
}
CASES = [
    pytest.param(name, bits, symmetric, size, shape, id=f"{name}-{bits}-{symmetric}-{size}")
    for (name, bits), (shape, groups) in SIZES.items()
    for symmetric in (True, False)
    for size in groups
]


def make(name, bits, symmetric, size, shape):
    return random_tensor(make_grid(name, bits, symmetric, size), shape, seed=bits)


def test_every_format_is_covered():
    assert {name for name, _ in SIZES} == set(FORMATS)


@pytest.mark.parametrize(("name", "bits", "symmetric", "size", "shape"), CASES)
def test_unpack_inverts_pack(name, bits, symmetric, size, shape):
    quantized = make(name, bits, symmetric, size, shape)
    tensors = FORMATS[name].pack(NAME, quantized)
    assert same(FORMATS[name].unpack(NAME, tensors, quantized.grid), quantized)


@pytest.mark.parametrize(("name", "bits", "symmetric", "size", "shape"), CASES)
def test_layout_is_what_pack_returns(name, bits, symmetric, size, shape):
    quantized = make(name, bits, symmetric, size, shape)
    tensors = FORMATS[name].pack(NAME, quantized)
    assert layouts_of(tensors) == FORMATS[name].layout(module_of(NAME, quantized))
    assert all(value.is_contiguous() for value in tensors.values())


@pytest.mark.parametrize(("name", "bits", "symmetric", "size", "shape"), CASES)
def test_an_independent_decoder_reads_the_dequantized_weight(name, bits, symmetric, size, shape):
    quantized = make(name, bits, symmetric, size, shape)
    decoded = DECODERS[name](FORMATS[name].pack(NAME, quantized), NAME, bits)
    assert np.array_equal(decoded, quantized.dequantize().numpy())


@pytest.mark.parametrize(("name", "bits", "symmetric", "size", "shape"), CASES)
def test_config_and_headers_give_the_grid_back(name, bits, symmetric, size, shape):
    quantized = make(name, bits, symmetric, size, shape)
    dialect = FORMATS[name]
    module = module_of(NAME, quantized)
    config = json.loads(json.dumps(dialect.config([module], ["lm_head"])))
    assert format_of({"quantization_config": config}) is dialect
    tensors = dialect.pack(NAME, quantized)
    found = dialect.grids(
        config, layouts_of(tensors) | {"lm_head.weight": TensorLayout("F16", (9, 9))}
    )
    assert list(found) == [NAME]
    grid = found[NAME]
    assert (grid.bits, grid.granularity) == (bits, quantized.grid.granularity)
    assert grid.group_size == quantized.grid.group_size or grid.granularity != "group"
    assert grid.symmetric == (symmetric and name != "awq")
    assert grid.scale_dtype == torch.float16
    # What matters in the end: the grid that was read decodes the tensors to the same weight.
    again = dialect.unpack(NAME, tensors, grid).dequantize()
    assert torch.equal(again, quantized.dequantize())


@pytest.mark.parametrize(("name", "bits", "symmetric", "size", "shape"), CASES)
def test_inputs_are_not_modified(name, bits, symmetric, size, shape):
    quantized = make(name, bits, symmetric, size, shape)
    tensors = FORMATS[name].pack(NAME, quantized)
    kept = {key: value.clone() for key, value in tensors.items()}
    FORMATS[name].unpack(NAME, tensors, quantized.grid)
    assert same(quantized, make(name, bits, symmetric, size, shape))
    assert all(torch.equal(tensors[key], value) for key, value in kept.items())


@pytest.mark.parametrize("name", FORMATS)
def test_scales_are_stored_without_rounding(name):
    for model_dtype in (torch.float16, torch.bfloat16, torch.float32):
        dtype = FORMATS[name].scale_dtype(model_dtype)
        grid = make_grid(name, symmetric=False, scale_dtype=dtype)
        weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(5))
        parameters = grid.fit(weight)
        quantized = random_tensor(grid, (32, 64))
        quantized = type(quantized)(grid.encode(weight, parameters), parameters, grid)
        tensors = FORMATS[name].pack(NAME, quantized)
        assert same(FORMATS[name].unpack(NAME, tensors, grid), quantized)


@pytest.mark.parametrize("name", FORMATS)
def test_another_kind_of_grid_is_refused(name):
    module = QuantizedModule(NAME, SimpleNamespace(name="nf4", bits=4), (64, 64))
    with pytest.raises(UnsupportedError, match=f"{NAME}: the {name} format cannot hold nf4"):
        FORMATS[name].check(module)


@pytest.mark.parametrize(("name", "bits"), [("awq", 3), ("awq", 8), ("compressed-tensors", 3)])
def test_bits_that_readers_lack_are_refused_with_those_they_have(name, bits):
    with pytest.raises(UnsupportedError, match="cannot hold") as refused:
        FORMATS[name].check(QuantizedModule(NAME, make_grid(name, bits), (64, 64)))
    assert "it holds integers of 4" in refused.value.hint


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_scale_per_tensor_is_refused_with_what_works(name):
    module = QuantizedModule(NAME, make_grid(name, group_size=None), (64, 64))
    with pytest.raises(UnsupportedError, match="no scale per tensor") as refused:
        FORMATS[name].check(module)
    assert "--group-size -1" in refused.value.hint


@pytest.mark.parametrize("name", FORMATS)
def test_a_group_that_does_not_divide_the_row_is_refused(name):
    module = QuantizedModule(NAME, make_grid(name, group_size=48), (64, 64))
    with pytest.raises(UsageError, match="does not divide"):
        FORMATS[name].check(module)


@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_dtype_that_the_file_cannot_hold_is_refused(name):
    grid = make_grid(name, scale_dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="cannot store scales"):
        FORMATS[name].check(QuantizedModule(NAME, grid, (64, 64)))


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_or_misshapen_tensor_is_damage(name):
    dialect = FORMATS[name]
    quantized = random_tensor(make_grid(name, symmetric=False), (64, 64))
    config = dialect.config([module_of(NAME, quantized)], [])
    whole = layouts_of(dialect.pack(NAME, quantized))
    for key, layout in whole.items():
        if not key.endswith(("qweight", "weight_packed", "g_idx")):
            with pytest.raises(DamagedError, match=key.rpartition(".")[2]):
                dialect.grids(config, {k: v for k, v in whole.items() if k != key})
        wrong = TensorLayout(layout.dtype, (*layout.shape[:-1], layout.shape[-1] + 1))
        with pytest.raises(DamagedError, match=NAME):
            dialect.grids(config, whole | {key: wrong})
        with pytest.raises(DamagedError, match=NAME):
            dialect.grids(config, whole | {key: TensorLayout("F64", layout.shape)})


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_config_without_packed_tensors_is_damage(name):
    module = QuantizedModule(NAME, make_grid(name), (64, 64))
    config = FORMATS[name].config([module], [])
    with pytest.raises(DamagedError, match="no tensor is called"):
        FORMATS[name].grids(config, {f"{NAME}.weight": TensorLayout("BF16", (64, 64))})


def test_a_grid_that_is_not_integer_is_no_surprise_to_unpack():
    with pytest.raises(UnsupportedError, match="not an integer grid"):
        FORMATS["gptq"].unpack(NAME, {}, SimpleNamespace(name="nf4"))
