"""The bit stream against Python's unbounded integers."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from oracles.packed_files import read_rows, write_rows

from qtool.formats.bitpack import count_unit, pack_words, unpack_words, words_for

WIDTHS = (2, 3, 4, 8)
COUNTS = (1, 7, 31, 32, 33, 40, 96, 264)


def draw(bits, count, rows=5):
    generator = torch.Generator().manual_seed(1000 * bits + count)
    return torch.randint(0, 2**bits, (rows, count), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_inverts_pack(bits, count):
    codes = draw(bits, count)
    assert torch.equal(unpack_words(pack_words(codes, bits), bits, count), codes)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_the_dense_little_endian_stream(bits, count):
    codes = draw(bits, count)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, words_for(count, bits))
    assert (words.numpy() == write_rows(codes.numpy(), bits)).all()
    assert (read_rows(words, bits, count) == codes.numpy()).all()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_packs_the_same_words(bits, count):
    codes = draw(bits, count)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))


def test_the_eleventh_3_bit_value_straddles_two_words():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b111
    assert pack_words(codes, 3).tolist() == [[-(2**30), 1, 0]]


def test_all_ones_fill_the_sign_bit():
    for bits in WIDTHS:
        codes = torch.full((2, 32), 2**bits - 1, dtype=torch.uint8)
        assert (pack_words(codes, bits) == -1).all()
        assert torch.equal(unpack_words(pack_words(codes, bits), bits, 32), codes)


def test_leading_dimensions_and_strides_do_not_matter():
    codes = draw(3, 64, rows=6)
    stacked = pack_words(codes.reshape(2, 3, 64), 3)
    assert torch.equal(stacked.reshape(6, -1), pack_words(codes, 3))
    strided = codes.T.contiguous().T
    assert torch.equal(pack_words(strided, 3), pack_words(codes, 3))


def test_unused_bits_are_zero():
    words = pack_words(torch.full((1, 3), 15, dtype=torch.uint8), 4)
    assert words.tolist() == [[0xFFF]]


def test_units_fill_whole_words():
    assert [count_unit(bits) for bits in WIDTHS] == [16, 32, 8, 4]


def test_inputs_are_not_modified():
    codes = draw(3, 40)
    before = codes.clone()
    words = pack_words(codes, 3)
    kept = words.clone()
    unpack_words(words, 3, 40)
    assert torch.equal(codes, before)
    assert torch.equal(words, kept)
