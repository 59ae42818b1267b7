"""The compressed-tensors layout, with the package itself as the oracle."""

import pytest
import torch
from builders.quantized_tensors import layouts_of, make_grid, module_of, random_tensor
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.compressed_tensors import COMPRESSED_TENSORS
from qtool.formats.protocol import QuantizedModule

NAME = "model.layers.0.mlp.up_proj"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCHEMES = [
    (bits, symmetric, size)
    for bits in (4, 8)
    for symmetric in (True, False)
    for size in (20, -1, None)
]


def pack(bits, symmetric, size, dtype=torch.float32, shape=(33, 100)):
    grid = make_grid("compressed-tensors", bits, symmetric, size, dtype)
    quantized = random_tensor(grid, shape, seed=bits)
    return quantized, COMPRESSED_TENSORS.pack(NAME, quantized)


def scheme_in(config):
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.quantization_status == "compressed"
    return parsed.config_groups["group_0"]


@pytest.mark.parametrize(("bits", "symmetric", "size"), SCHEMES)
def test_the_package_decompresses_to_the_dequantized_weight(bits, symmetric, size):
    quantized, tensors = pack(bits, symmetric, size)
    config = COMPRESSED_TENSORS.config([module_of(NAME, quantized)], [])
    local = {key.removeprefix(f"{NAME}."): value for key, value in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    weight = compressor.decompress(local, scheme_in(config))["weight"]
    assert torch.equal(weight, quantized.dequantize())


@pytest.mark.parametrize(("bits", "symmetric", "size"), SCHEMES)
def test_the_package_compresses_to_the_same_tensors(bits, symmetric, size):
    quantized, tensors = pack(bits, symmetric, size)
    config = COMPRESSED_TENSORS.config([module_of(NAME, quantized)], [])
    signed = quantized.parameters.zero - 2 ** (bits - 1)
    scale, zero = quantized.parameters.scale, signed.to(torch.int8)
    if size is None:
        scale, zero = scale[0], zero[0]
    state = {"weight": quantized.dequantize(), "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    theirs = compressor.compress(state, scheme_in(config))
    assert set(theirs) == {key.removeprefix(f"{NAME}.") for key in tensors}
    for key, value in theirs.items():
        assert value.dtype == tensors[f"{NAME}.{key}"].dtype
        assert torch.equal(value, tensors[f"{NAME}.{key}"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_keep_the_dtype_of_the_model(dtype):
    assert COMPRESSED_TENSORS.scale_dtype(dtype) == dtype
    quantized, tensors = pack(4, False, 20, dtype)
    assert tensors[f"{NAME}.weight_scale"].dtype == dtype
    config = COMPRESSED_TENSORS.config([module_of(NAME, quantized)], [])
    assert COMPRESSED_TENSORS.grids(config, layouts_of(tensors))[NAME].scale_dtype == dtype


def test_symmetric_modules_store_no_zero_points():
    assert set(pack(4, True, 20)[1]) == {f"{NAME}.{part}" for part in PARTS[:3]}
    assert set(pack(4, False, 20)[1]) == {f"{NAME}.{part}" for part in PARTS}


@pytest.mark.parametrize(("bits", "size"), [(4, 20), (4, -1), (8, None)])
def test_symmetric_modules_may_come_with_zero_points_that_say_nothing(bits, size):
    quantized, tensors = pack(bits, True, size)
    config = COMPRESSED_TENSORS.config([module_of(NAME, quantized)], [])
    zeros = torch.zeros_like(tensors[f"{NAME}.weight_scale"], dtype=torch.int8)
    tensors[f"{NAME}.weight_zero_point"] = zeros
    grid = COMPRESSED_TENSORS.grids(config, layouts_of(tensors))[NAME]
    found = COMPRESSED_TENSORS.unpack(NAME, tensors, grid)
    assert torch.equal(found.dequantize(), quantized.dequantize())
    zeros.flatten()[-1] = 1
    with pytest.raises(DamagedError, match="declared symmetric"):
        COMPRESSED_TENSORS.unpack(NAME, tensors, grid)


class Block(torch.nn.Module):
    """Linears with the names of a decoder block and its head."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "o_proj", "down_proj", "lm_head"):
            setattr(self, name, torch.nn.Linear(40, 40, bias=False))


def test_the_package_gives_every_module_its_own_scheme():
    wide = make_grid("compressed-tensors", 8, False, -1)
    narrow = make_grid("compressed-tensors", 4, True, 20)
    grids = {
        "q_proj": wide,
        "k_proj": wide,
        "o_proj": narrow,
        "down_proj": narrow,
        "up_proj": narrow,
    }
    modules = [QuantizedModule(name, grid, (40, 40)) for name, grid in grids.items()]
    config = COMPRESSED_TENSORS.config(modules, [])
    block = Block()
    apply_quantization_config(block, QuantizationConfig.model_validate(config))
    for name in ("q_proj", "k_proj", "o_proj", "down_proj"):
        weights = getattr(block, name).quantization_scheme.weights
        assert weights.num_bits == grids[name].bits
        assert weights.symmetric == grids[name].symmetric
        assert weights.strategy == grids[name].granularity
    assert not hasattr(block.lm_head, "quantization_scheme")


def test_modules_left_alone_are_ignored_by_name():
    module = QuantizedModule(NAME, make_grid("compressed-tensors"), (64, 64))
    config = COMPRESSED_TENSORS.config([module], ["model.layers.0.mlp.down_proj"])
    assert config["ignore"] == ["model.layers.0.mlp.down_proj", "lm_head"]
    assert COMPRESSED_TENSORS.config([module], ["lm_head"])["ignore"] == ["lm_head"]


def test_mixed_schemes_are_read_back():
    wide = make_grid("compressed-tensors", 8, False, -1)
    narrow = make_grid("compressed-tensors", 4, True, 20)
    names = {f"model.layers.{i}.mlp.{x}_proj": narrow for i in range(12) for x in ("up", "down")}
    names["model.layers.1.mlp.down_proj"] = wide
    modules = [QuantizedModule(name, grid, (40, 40)) for name, grid in names.items()]
    headers = {k: v for module in modules for k, v in COMPRESSED_TENSORS.layout(module).items()}
    found = COMPRESSED_TENSORS.grids(COMPRESSED_TENSORS.config(modules, []), headers)
    assert {name: grid.name for name, grid in found.items()} == {
        name: grid.name for name, grid in names.items()
    }


def test_a_module_named_outright_beats_a_pattern_and_a_pattern_beats_the_class():
    module = QuantizedModule(NAME, make_grid("compressed-tensors", 8, True, -1), (40, 40))
    config = COMPRESSED_TENSORS.config([module], [])
    group = config["config_groups"]["group_0"]
    four = group | {"weights": group["weights"] | {"num_bits": 4}, "targets": ["Linear"]}
    headers = COMPRESSED_TENSORS.layout(module)
    for target in (NAME, "re:.*up_proj$"):
        groups = {"group_0": four, "group_1": group | {"targets": [target]}}
        assert COMPRESSED_TENSORS.grids(config | {"config_groups": groups}, headers)[NAME].bits == 8


def changed(**weights):
    module = QuantizedModule(NAME, make_grid("compressed-tensors", 4, True, 20), (40, 40))
    config = COMPRESSED_TENSORS.config([module], [])
    group = config["config_groups"]["group_0"]
    group["weights"].update(weights)
    return config, COMPRESSED_TENSORS.layout(module)


@pytest.mark.parametrize(
    "weights",
    [{"type": "float"}, {"num_bits": 3}, {"actorder": "group"}, {"strategy": "block"}],
    ids=str,
)
def test_other_schemes_are_refused_with_what_is_read(weights):
    config, headers = changed(**weights)
    with pytest.raises(UnsupportedError) as refused:
        COMPRESSED_TENSORS.grids(config, headers)
    assert "pack-quantized weights of 4 and 8 bits" in refused.value.hint


@pytest.mark.parametrize("variant", ["int-quantized", "float-quantized", "nvfp4-pack-quantized"])
def test_other_variants_are_refused_by_name(variant):
    config, headers = changed()
    config["config_groups"]["group_0"]["format"] = None
    with pytest.raises(UnsupportedError, match=variant):
        COMPRESSED_TENSORS.grids(config | {"format": variant}, headers)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_status": "frozen"},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"transform_config": {"config_groups": {"R1": {}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
    ],
    ids=str,
)
def test_what_would_change_the_function_is_refused(change):
    config, headers = changed()
    with pytest.raises(UnsupportedError):
        COMPRESSED_TENSORS.grids(config | change, headers)


def test_quantized_activations_are_refused():
    config, headers = changed()
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    with pytest.raises(UnsupportedError, match="input_activations"):
        COMPRESSED_TENSORS.grids(config, headers)


def test_groups_in_activation_order_are_refused():
    config, headers = changed()
    headers[f"{NAME}.weight_g_idx"] = headers[f"{NAME}.weight_shape"]
    with pytest.raises(UnsupportedError, match="activation order"):
        COMPRESSED_TENSORS.grids(config, headers)


@pytest.mark.parametrize(
    "groups", [None, {}, {"W4A16": ["Linear"]}, {"group_0": {"targets": ["Linear"]}}], ids=str
)
def test_config_groups_that_state_no_scheme_are_damage(groups):
    config, headers = changed()
    with pytest.raises(DamagedError, match=r"config.group"):
        COMPRESSED_TENSORS.grids(config | {"config_groups": groups}, headers)


def test_a_packed_module_without_a_scheme_is_damage():
    config, headers = changed()
    config["config_groups"]["group_0"]["targets"] = ["re:.*down_proj"]
    with pytest.raises(DamagedError, match="no config group targets it"):
        COMPRESSED_TENSORS.grids(config, headers)


def test_a_weight_shape_that_contradicts_the_weight_is_damage():
    quantized, tensors = pack(4, True, 20)
    tensors[f"{NAME}.weight_shape"] = torch.tensor([33, 200])
    with pytest.raises(DamagedError, match="weight_shape says 33 x 200"):
        COMPRESSED_TENSORS.unpack(NAME, tensors, quantized.grid)


def test_rows_that_no_longer_share_one_scale_are_refused():
    quantized, _ = pack(4, True, None)
    quantized.parameters.scale[3] *= 2
    with pytest.raises(UnsupportedError, match="no longer share one scale"):
        COMPRESSED_TENSORS.pack(NAME, quantized)
