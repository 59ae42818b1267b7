"""The AWQ layout: interleave, zero points and refusals."""

import pytest
import torch
from builders.quantized_tensors import make_grid, module_of, random_tensor

from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.awq import AWQ
from qtool.formats.protocol import QuantizedModule

NAME = "model.layers.0.mlp.up_proj"


def test_even_columns_fill_the_low_half_of_a_word():
    quantized = random_tensor(make_grid("awq"), (64, 64))
    word = AWQ.pack(NAME, quantized)[f"{NAME}.qweight"][7, 2].item()
    nibbles = [(word >> (4 * i)) & 15 for i in range(8)]
    columns = quantized.codes[16:24, 7].tolist()
    assert nibbles == columns[0::2] + columns[1::2]


def test_symmetric_zero_points_are_stored_as_8():
    tensors = AWQ.pack(NAME, random_tensor(make_grid("awq"), (64, 64)))
    assert (tensors[f"{NAME}.qzeros"].view(torch.uint8) == 0x88).all()


def test_config_says_what_readers_ask_for():
    modules = [QuantizedModule(NAME, make_grid("awq", group_size=-1), (64, 64))]
    config = AWQ.config(modules, ["lm_head"])
    assert config == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": -1,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    kept = AWQ.config(modules, ["model.layers.3.mlp.down_proj", "lm_head"])
    assert kept["modules_to_not_convert"] == ["model.layers.3.mlp.down_proj", "lm_head"]
    assert list(kept["dynamic"]) == [r"-:^model\.layers\.3\.mlp\.down_proj$"]


def test_mixed_group_sizes_are_refused():
    one = QuantizedModule("model.layers.0.mlp.up_proj", make_grid("awq"), (64, 64))
    other = QuantizedModule("model.layers.1.mlp.up_proj", make_grid("awq", group_size=64), (64, 64))
    with pytest.raises(UnsupportedError, match=r"layers\.0.* has 32, .*layers\.1.* has 64"):
        AWQ.config([one, other], [])


def test_outputs_that_do_not_fill_words_are_refused():
    with pytest.raises(UnsupportedError, match="multiples of 8") as refused:
        AWQ.check(QuantizedModule(NAME, make_grid("awq"), (36, 64)))
    assert "compressed-tensors" in refused.value.hint


def test_older_spellings_are_read():
    quantized = random_tensor(make_grid("awq", symmetric=False), (64, 64))
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    assert AWQ.grids(config, AWQ.layout(module_of(NAME, quantized)))[NAME].group_size == 32


@pytest.mark.parametrize(
    "change",
    [{"version": "gemv"}, {"version": "gemv_fast"}, {"bits": 8}, {"zero_point": False}],
    ids=str,
)
def test_other_variants_are_refused_with_what_is_read(change):
    module = module_of(NAME, random_tensor(make_grid("awq"), (64, 64)))
    with pytest.raises(UnsupportedError) as refused:
        AWQ.grids(AWQ.config([module], []) | change, AWQ.layout(module))
    assert "version gemm, 4 bits, with zero points" in refused.value.hint


def test_a_group_size_that_contradicts_the_headers_is_damage():
    module = module_of(NAME, random_tensor(make_grid("awq"), (64, 64)))
    for size in (48, 64, -1):
        with pytest.raises(DamagedError, match=NAME):
            AWQ.grids(AWQ.config([module], []) | {"group_size": size}, AWQ.layout(module))
