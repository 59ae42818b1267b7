"""Bytes of ggml's block types against a bit-by-bit description, PyPI gguf and llama.cpp."""

import gguf
import numpy as np
import pytest
import torch
from builders.ggml_tensors import HALVES, NAMES, random_bytes, random_parameters
from oracles import ggml_blocks_slow as slow

from qtool.errors import DamagedError, UnsupportedError
from qtool.formats.ggml_blocks import dequantize, is_finite, pack, unpack
from qtool.ggml_types import GGML_TYPES
from qtool.grids.ggml import GgmlGrid
from qtool.grids.protocol import QuantizedTensor

SCALE_ZEROS = {"Q3_K": 32, "IQ4_XS": 32}


def random_tensor(name, rows, blocks, seed):
    grid = GgmlGrid(name)
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, blocks * GGML_TYPES[name].block)
    codes = torch.randint(0, len(grid.layout.levels), shape, generator=generator)
    return QuantizedTensor(codes.to(torch.uint8), random_parameters(name, rows, blocks, seed), grid)


def stored_block(tensor, row, index):
    """What the slow writer wants to know about block `index` of a row."""
    name, parameters = tensor.grid.name, tensor.parameters
    weights = GGML_TYPES[name].block
    subs = weights // tensor.grid.layout.sub

    def stored(values, zero=0):
        part = values[row, index * subs : (index + 1) * subs]
        return [(int(value) + zero) % 256 for value in part]

    codes = tensor.codes[row, index * weights : (index + 1) * weights].tolist()
    if name == "Q8_0":
        codes = [(code - 128) % 256 for code in codes]
    return {
        "codes": codes,
        "scales": stored(parameters.scales, SCALE_ZEROS.get(name, 0)),
        "mins": stored(parameters.offsets),
        "d": float(parameters.super_scale[row, index]),
        "dmin": float(parameters.super_offset[row, index]) if len(HALVES.get(name, ())) == 2 else 0,
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_description_uses_every_bit_of_a_block_once(name):
    kind = slow.TYPES[name]
    used = [place for field in slow.positions(name).values() for bits in field for place in bits]
    for start in filter(lambda place: place is not None, (kind.d, kind.dmin)):
        used += [(start + byte, bit) for byte in (0, 1) for bit in range(8)]
    assert len(used) == len(set(used)) == 8 * kind.size == 8 * GGML_TYPES[name].block_bytes


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_is_written_where_it_belongs(name):
    tensor = random_tensor(name, rows=3, blocks=2, seed=1)
    written = pack(tensor).numpy()
    expected = [
        b"".join(slow.write_block(name, stored_block(tensor, row, index)) for index in range(2))
        for row in range(3)
    ]
    assert [row.tobytes() for row in written] == expected


@pytest.mark.parametrize("name", NAMES)
def test_packing_undoes_unpacking_of_any_bytes(name):
    data = random_bytes(name, rows=5, blocks=3, seed=2)
    assert torch.equal(pack(unpack(name, data, 3 * GGML_TYPES[name].block)), data)


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_undoes_packing(name):
    tensor = random_tensor(name, rows=4, blocks=3, seed=3)
    back = unpack(name, pack(tensor), tensor.shape[1])
    assert torch.equal(back.codes, tensor.codes)
    for field in ("super_scale", "super_offset", "scales", "offsets"):
        found, given = getattr(back.parameters, field), getattr(tensor.parameters, field)
        assert found.dtype == torch.float32
        assert torch.equal(found, given), field


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_of_several_chunks_is_packed_row_by_row(name):
    columns = 2048
    tensor = random_tensor(name, rows=131, blocks=columns // GGML_TYPES[name].block, seed=4)
    whole = pack(tensor)
    for row in (0, 63, 64, 130):
        alone = QuantizedTensor(
            tensor.codes[row : row + 1],
            tensor.grid.rows(tensor.parameters, row, row + 1),
            tensor.grid,
        )
        assert torch.equal(pack(alone)[0], whole[row])
    assert torch.equal(unpack(name, whole, columns).codes, tensor.codes)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_gguf_and_of_scalar_arithmetic_bit_for_bit(name):
    data = random_bytes(name, rows=3, blocks=2, seed=5)
    found = dequantize(name, data, 2 * GGML_TYPES[name].block).numpy()
    theirs = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(found.view(np.uint32), theirs.view(np.uint32))
    ours = slow.decode(name, data.numpy())
    assert np.array_equal(found.view(np.uint32), ours.view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpps_own_bytes_come_back_unchanged(name):
    llama_cpp = pytest.importorskip("oracles.llama_cpp")
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(6))
    data = torch.from_numpy(llama_cpp.quantize(weight.numpy(), name))
    tensor = unpack(name, data, 512)
    assert torch.equal(pack(tensor), data)
    assert (tensor.dequantize() - weight).norm() < 0.4 * weight.norm()


@pytest.mark.parametrize("name", NAMES)
def test_infinite_and_missing_scales_are_read_as_they_are(name):
    data = random_bytes(name, rows=2, blocks=2, seed=7)
    kind = GGML_TYPES[name]
    start = HALVES.get(name, (0,))[0]
    data[0, start : start + 2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
    data[1, start : start + 2] = torch.tensor([0x01, 0x7E], dtype=torch.uint8)
    scale = unpack(name, data, 2 * kind.block).parameters.super_scale
    assert scale[0, 0] == float("inf")
    assert scale[1, 0].isnan()
    assert scale[:, 1].isfinite().all()
    assert dequantize(name, data, 2 * kind.block)[1, 0].isnan()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_may_lie_anywhere_in_memory(name):
    data = random_bytes(name, rows=2, blocks=1, seed=8)
    buffer = torch.zeros(2, data.shape[1] + 3, dtype=torch.uint8)
    buffer[:, 1:-2] = data
    columns = GGML_TYPES[name].block
    assert torch.equal(
        unpack(name, buffer[:, 1:-2], columns).codes, unpack(name, data, columns).codes
    )
    one = torch.cat([torch.zeros(1, dtype=torch.uint8), data[0]])[1:][None]
    assert torch.equal(dequantize(name, one, columns), dequantize(name, data[:1], columns))


@pytest.mark.parametrize("name", NAMES)
def test_codes_may_lie_anywhere_in_memory(name):
    tensor = random_tensor(name, rows=2, blocks=1, seed=11)
    codes = torch.cat([torch.zeros(3, dtype=torch.uint8), tensor.codes.flatten()])[3:]
    moved = QuantizedTensor(codes.view(tensor.shape), tensor.parameters, tensor.grid)
    assert torch.equal(pack(moved), pack(tensor))


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_without_rows_has_no_bytes(name):
    kind = GGML_TYPES[name]
    empty = unpack(name, torch.empty((0, 2 * kind.block_bytes), dtype=torch.uint8), 2 * kind.block)
    assert empty.shape == (0, 2 * kind.block)
    assert pack(empty).shape == (0, 2 * kind.block_bytes)


@pytest.mark.parametrize("name", [*NAMES, "F16"])
def test_rows_of_another_width_are_refused(name):
    kind = GGML_TYPES[name]
    data = torch.zeros((2, 3 * kind.block_bytes), dtype=torch.uint8)
    with pytest.raises(DamagedError, match=name):
        dequantize(name, data, 2 * kind.block)


@pytest.mark.parametrize("name", NAMES)
def test_part_of_a_block_is_refused(name):
    kind = GGML_TYPES[name]
    data = torch.zeros((2, kind.block_bytes), dtype=torch.uint8)
    with pytest.raises(DamagedError, match=name):
        unpack(name, data, kind.block + 1)


@pytest.mark.parametrize(
    ("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_floats_are_read_exactly(name, dtype):
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(9)).to(dtype)
    data = torch.cat([torch.zeros(1, dtype=torch.uint8), weight.view(torch.uint8).flatten()])[1:]
    found = dequantize(name, data.reshape(3, -1), 7)
    assert torch.equal(found, weight.to(torch.float32))
    assert found.dtype == torch.float32


def test_types_without_a_grid_are_read_through_gguf():
    data = random_bytes("IQ2_S", rows=2, blocks=1, seed=10)
    theirs = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType.IQ2_S)
    assert np.array_equal(dequantize("IQ2_S", data, 256).numpy(), theirs)


@pytest.mark.parametrize("name", ["Q8_K", "I32"])
def test_types_that_nobody_reads_are_named(name):
    kind = GGML_TYPES[name]
    with pytest.raises(UnsupportedError, match=name):
        dequantize(name, torch.zeros((1, kind.block_bytes), dtype=torch.uint8), kind.block)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_seen_wherever_it_stands(name, bad):
    stored = pack(random_tensor(name, 3, 4, seed=11))
    assert is_finite(name, stored)
    for start in HALVES.get(name, (0,)):
        spoiled = stored.clone()
        block = spoiled.view(12, -1)[11]  # the last of the last row
        block[start : start + 2] = torch.tensor([bad], dtype=torch.float16).view(torch.uint8)
        assert not is_finite(name, spoiled)
        assert is_finite(name, spoiled[:2])
