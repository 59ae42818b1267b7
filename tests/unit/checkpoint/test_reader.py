"""Tensors are read as the safetensors library reads them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.checkpoint.header import read_header
from qtool.checkpoint.reader import CHUNK_BYTES, TORCH_DTYPES, TensorReader, check_finite
from qtool.errors import DamagedError, NumericalError


def of_dtype(dtype, shape=(5, 3)):
    generator = torch.Generator().manual_seed(0)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "model.safetensors"
    # The library's writer lacks float8_e8m0fnu in some versions, ours has its own test.
    dtypes = [dtype for name, dtype in TORCH_DTYPES.items() if name != "F8_E8M0"]
    tensors = {str(dtype): of_dtype(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    tensors["large"] = torch.arange(CHUNK_BYTES // 4 + 1000, dtype=torch.int32)
    save_file(tensors, path)
    return path


def test_every_dtype_and_shape_is_read_bit_for_bit(stored):
    expected = load_file(stored)
    with TensorReader({ref.name: ref for ref in read_header(stored)}) as reader:
        for name, tensor in expected.items():
            got = reader.read(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            same = got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            assert torch.equal(*same)


def test_chunks_put_together_are_the_tensor(stored):
    refs = {ref.name: ref for ref in read_header(stored)}
    content = stored.read_bytes()
    with TensorReader(refs) as reader:
        for name, ref in refs.items():
            assert b"".join(map(bytes, reader.chunks(name))) == content[ref.start : ref.stop]


def test_a_tensor_read_owns_its_memory(stored):
    refs = {ref.name: ref for ref in read_header(stored)}
    with TensorReader(refs) as reader:
        first = reader.read("scalar")
        first.zero_()
        assert reader.read("scalar") == 3.5


def test_a_closed_reader_opens_files_again(stored):
    refs = {ref.name: ref for ref in read_header(stored)}
    reader = TensorReader(refs)
    reader.read("scalar")
    reader.close()
    assert reader.read("scalar") == 3.5
    reader.close()


def test_an_unknown_name_is_refused(stored):
    with TensorReader({}) as reader, pytest.raises(DamagedError, match="no tensor 'nowhere'"):
        reader.read("nowhere")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(dtype, value):
    weight = torch.zeros(4, 6, dtype=dtype)
    weight[2, 3] = value
    weight[3, 5] = value
    with pytest.raises(NumericalError, match=r"'x.weight' has 2 values .* at \[2, 3\]") as caught:
        check_finite("x.weight", weight)
    assert caught.value.exit_code == 8


def test_float8_nan_is_found():
    weight = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    with pytest.raises(NumericalError, match=r"at \[1\]"):
        check_finite("x", weight)


@pytest.mark.parametrize(
    "weight",
    [
        torch.empty(0, 3),
        torch.tensor(1.0),
        torch.tensor([3e38, 3e38], dtype=torch.bfloat16),
        torch.tensor([1.7e308, 1.7e308], dtype=torch.float64),
        torch.tensor([65504.0] * 100, dtype=torch.float16),
        torch.tensor([1, 2]),
    ],
)
def test_large_finite_and_empty_tensors_pass(weight):
    check_finite("x", weight)
