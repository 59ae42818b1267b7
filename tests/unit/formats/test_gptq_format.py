"""The GPTQ layout: bytes, versions, group order and per-module rules."""

import numpy as np
import pytest
import torch
from builders.quantized_tensors import layouts_of, make_grid, module_of, random_tensor, same
from oracles.packed_files import decode_gptq, resolve_dynamic, write_rows

from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.gptq import GPTQ
from qtool.formats.protocol import QuantizedModule, TensorLayout
from qtool.grids.integer import IntegerGrid

NAME = "model.layers.0.self_attn.o_proj"
MIDDLES = {2: 0x55555555, 4: 0x77777777, 8: 0x7F7F7F7F}  # zero points of the middle, minus one


def attention(bits=4, size=32, symmetric=True):
    """A decoder block's linears with one scheme each."""
    grid = make_grid("gptq", bits, symmetric, size)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
    return [
        QuantizedModule(f"model.layers.{i}.{n}", grid, (64, 64)) for i in (1, 11) for n in names
    ]


def with_bits(modules, chosen, bits):
    eight = make_grid("gptq", bits, True, 64)
    return [
        QuantizedModule(m.name, eight if m.name in chosen else m.grid, m.shape) for m in modules
    ]


@pytest.mark.parametrize("bits", MIDDLES)
def test_symmetric_zero_points_are_stored_minus_one(bits):
    quantized = random_tensor(make_grid("gptq", bits), (64, 64))
    assert (GPTQ.pack(NAME, quantized)[f"{NAME}.qzeros"] == MIDDLES[bits]).all()


def test_the_lowest_nibble_holds_the_first_input():
    quantized = random_tensor(make_grid("gptq", 4), (64, 64))
    first = GPTQ.pack(NAME, quantized)[f"{NAME}.qweight"][0, 5].item()
    assert [(first >> (4 * i)) & 15 for i in range(8)] == quantized.codes[5, :8].tolist()


def test_groups_are_listed_in_column_order():
    grouped = GPTQ.pack(NAME, random_tensor(make_grid("gptq", 4, group_size=16), (64, 64)))
    assert grouped[f"{NAME}.g_idx"].tolist() == [k // 16 for k in range(64)]
    single = GPTQ.pack(NAME, random_tensor(make_grid("gptq", 4, group_size=-1), (64, 64)))
    assert single[f"{NAME}.g_idx"].tolist() == [0] * 64


def version_2(quantized, bits):
    tensors = GPTQ.pack(NAME, quantized)
    zeros = quantized.parameters.zero.T.to(torch.int64).numpy()
    return tensors | {f"{NAME}.qzeros": torch.from_numpy(write_rows(zeros, bits).copy())}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_2_is_read(bits, symmetric):
    quantized = random_tensor(make_grid("gptq", bits, symmetric), (64, 64))
    tensors = version_2(quantized, bits)
    config = GPTQ.config([module_of(NAME, quantized)], []) | {"checkpoint_format": "gptq_v2"}
    grid = GPTQ.grids(config, layouts_of(tensors))[NAME]
    assert grid.lowest_zero == 0
    assert same(GPTQ.unpack(NAME, tensors, grid), quantized)
    decoded = decode_gptq(tensors, NAME, bits, version=2)
    assert np.array_equal(decoded, quantized.dequantize().numpy())


def test_symmetric_version_2_zero_points_under_a_version_1_label_are_understood():
    quantized = random_tensor(make_grid("gptq", 4), (64, 64))
    assert same(GPTQ.unpack(NAME, version_2(quantized, 4), quantized.grid), quantized)


def test_symmetric_zero_points_away_from_the_middle_are_damage():
    quantized = random_tensor(make_grid("gptq", 4), (64, 64))
    tensors = GPTQ.pack(NAME, quantized)
    tensors[f"{NAME}.qzeros"][0, 0] = 0x77777776
    with pytest.raises(DamagedError, match="declared symmetric"):
        GPTQ.unpack(NAME, tensors, quantized.grid)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_0_that_gptqmodel_borrowed_are_recovered(bits):
    grid = IntegerGrid(bits=bits, group_size=32, symmetric=False)  # reaches down to 0
    quantized = random_tensor(grid, (64, 64), seed=3)
    assert (quantized.parameters.zero == 0).any()
    shifted = IntegerGrid(bits=bits, group_size=32, symmetric=False, lowest_zero=1)
    tensors = GPTQ.pack(NAME, random_tensor(shifted, (64, 64), seed=3))
    straight = write_rows(quantized.parameters.zero.T.to(torch.int64).numpy(), bits)
    ones = sum(1 << i for i in range(0, 32, bits))  # taken off whole words, as GPTQModel does
    words = ((straight.astype(np.int64) - ones) % 2**32).astype(np.uint32).view(np.int32)
    tensors |= {f"{NAME}.qzeros": torch.from_numpy(words.copy())}
    zero = GPTQ.unpack(NAME, tensors, shifted).parameters.zero
    assert torch.equal(zero, quantized.parameters.zero)


def test_a_file_without_g_idx_or_version_is_read_as_version_1():
    quantized = random_tensor(make_grid("gptq", 4, symmetric=False), (64, 64))
    tensors = GPTQ.pack(NAME, quantized)
    config = GPTQ.config([module_of(NAME, quantized)], [])
    del tensors[f"{NAME}.g_idx"], config["checkpoint_format"], config["pack_dtype"], config["meta"]
    grid = GPTQ.grids(config, layouts_of(tensors))[NAME]
    assert same(GPTQ.unpack(NAME, tensors, grid), quantized)


def test_groups_in_activation_order_are_refused_when_seen():
    quantized = random_tensor(make_grid("gptq", 4), (64, 64))
    tensors = GPTQ.pack(NAME, quantized)
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].flip(0)
    with pytest.raises(UnsupportedError, match="activation order"):
        GPTQ.unpack(NAME, tensors, quantized.grid)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_format": "marlin"},
        {"checkpoint_format": "gptq_p"},
        {"is_marlin_format": True},
        {"pack_dtype": "int16"},
        {"bits": 5},
    ],
    ids=str,
)
def test_other_variants_are_refused_with_what_is_read(change):
    quantized = random_tensor(make_grid("gptq", 4), (64, 64))
    config = GPTQ.config([module_of(NAME, quantized)], []) | change
    with pytest.raises(UnsupportedError) as refused:
        GPTQ.grids(config, GPTQ.layout(module_of(NAME, quantized)))
    assert "read" in refused.value.hint


@pytest.mark.parametrize("change", [{"bits": "four"}, {"bits": None}, {"group_size": 0}], ids=str)
def test_an_absurd_configuration_is_damage(change):
    quantized = random_tensor(make_grid("gptq", 4), (64, 64))
    config = GPTQ.config([module_of(NAME, quantized)], []) | change
    with pytest.raises(DamagedError):
        GPTQ.grids(config, GPTQ.layout(module_of(NAME, quantized)))


@pytest.mark.parametrize("rules", [{"+:*": {"bits": 8}}, {"+:.*": 8}], ids=str)
def test_absurd_rules_are_damage(rules):
    quantized = random_tensor(make_grid("gptq", 4), (64, 64))
    config = GPTQ.config([module_of(NAME, quantized)], []) | {"dynamic": rules}
    with pytest.raises(DamagedError):
        GPTQ.grids(config, GPTQ.layout(module_of(NAME, quantized)))


@pytest.mark.parametrize(
    ("bits", "shape", "hint"),
    [
        (3, (40, 64), "4, 8 bits fit"),
        (4, (36, 64), "8 bits fit"),
        (8, (33, 64), "leave it unquantized with --ignore"),
    ],
)
def test_sizes_that_do_not_fill_words_are_refused_with_what_fits(bits, shape, hint):
    module = QuantizedModule(NAME, make_grid("gptq", bits, group_size=-1), shape)
    with pytest.raises(UnsupportedError, match="multiples of") as refused:
        GPTQ.check(module)
    assert hint in refused.value.hint


def test_an_asymmetric_grid_with_zero_points_of_0_is_refused():
    grid = IntegerGrid(bits=4, group_size=32, symmetric=False)
    with pytest.raises(UnsupportedError, match="zero point of 0"):
        GPTQ.check(QuantizedModule(NAME, grid, (64, 64)))


def test_a_zero_point_of_0_that_slips_through_is_refused_by_pack():
    quantized = random_tensor(make_grid("gptq", 4, symmetric=False), (64, 64))
    quantized.parameters.zero[3, 1] = 0
    with pytest.raises(UnsupportedError, match="zero point of 0"):
        GPTQ.pack(NAME, quantized)


def test_one_scheme_needs_no_rules():
    config = GPTQ.config(attention(), ["lm_head"])
    assert "dynamic" not in config
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert config["desc_act"] is False
    assert GPTQ.config(attention(size=-1), [])["group_size"] == -1


def test_rules_give_every_module_its_own_scheme():
    chosen = {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"}
    modules = with_bits(attention(), chosen, 8)
    kept = ["model.layers.1.mlp.down_proj", "lm_head"]
    config = GPTQ.config(modules, kept)
    assert (config["bits"], config["group_size"]) == (4, 32)
    for module in modules:
        expected = {"bits": module.grid.bits, "group_size": module.grid.group_size, "sym": True}
        assert resolve_dynamic(config, module.name) == expected
    assert resolve_dynamic(config, "model.layers.1.mlp.down_proj") is None
    assert resolve_dynamic(config, "model.layers.11.mlp.down_proj") is not None


def test_rules_hold_for_the_merged_linears_of_vllm():
    chosen = {f"model.layers.1.self_attn.{x}_proj" for x in "qkv"}
    config = GPTQ.config(with_bits(attention(), chosen, 8), [])
    assert resolve_dynamic(config, "model.layers.1.self_attn.qkv_proj")["bits"] == 8
    assert resolve_dynamic(config, "model.layers.11.self_attn.qkv_proj")["bits"] == 4


def test_mixed_bits_are_read_back():
    chosen = {"model.layers.1.self_attn.o_proj"}
    modules = with_bits(attention(), chosen, 8)
    config = GPTQ.config(modules, ["model.layers.1.mlp.down_proj"])
    headers = {k: v for module in modules for k, v in GPTQ.layout(module).items()}
    headers["model.layers.1.mlp.down_proj.weight"] = TensorLayout("BF16", (64, 64))
    found = GPTQ.grids(config, headers)
    assert {name: grid.bits for name, grid in found.items()} == {
        module.name: module.grid.bits for module in modules
    }


def test_a_shape_that_fits_only_other_bits_is_damage():
    quantized = random_tensor(make_grid("gptq", 8, group_size=32), (64, 64))
    config = GPTQ.config([module_of(NAME, quantized)], [])
    with pytest.raises(DamagedError, match=NAME):
        GPTQ.grids(config | {"bits": 4}, GPTQ.layout(module_of(NAME, quantized)))


def test_asymmetric_files_carry_the_mark_that_gptqmodel_asks_for():
    quantizers = GPTQ.config(attention(symmetric=False), [])["meta"]["quantizer"]
    assert quantizers[0].startswith("qtool:")
    producer, version = quantizers[1].split(":")[:2]
    assert (producer, version) == ("gptqmodel", "0.9.0")
    assert len(GPTQ.config(attention(), [])["meta"]["quantizer"]) == 1
