"""Hidden states come back as they were put, wherever they lie."""

import resource

import pytest
import torch

from qtool.calibration.activations import HiddenStates

CPU = torch.device("cpu")
BATCH_BYTES = 2 * 3 * 5 * 4  # of one float32 batch below
EVERYTHING, NOTHING = 1 << 30, 0


def batch(seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 5, generator=draw).to(dtype)


def states(spill, memory_bytes):
    return HiddenStates(CPU, memory_bytes=memory_bytes, device_bytes=0, spill=spill)


PLACES = pytest.mark.parametrize(
    "memory_bytes",
    [EVERYTHING, NOTHING, 2 * BATCH_BYTES],
    ids=["memory", "disk", "some-in-memory"],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@PLACES
def test_batches_come_back_in_order(memory_bytes, dtype, tmp_path):
    held = states(tmp_path, memory_bytes)
    for seed in range(4):
        held.append(batch(seed, dtype))
    assert len(held) == 4
    for seed, got in enumerate(held):
        assert torch.equal(got, batch(seed, dtype))
        assert torch.equal(held.get(seed), got)
        assert got.dtype == dtype


@PLACES
def test_a_batch_is_replaced_and_its_neighbours_stay(memory_bytes, tmp_path):
    held = states(tmp_path, memory_bytes)
    for seed in range(4):
        held.append(batch(seed))
    for index in (0, 3):
        held.put(index, batch(10 + index))
    expected = [batch(10), batch(1), batch(2), batch(13)]
    assert all(torch.equal(got, want) for got, want in zip(held, expected, strict=True))


@PLACES
def test_what_was_given_out_does_not_change_when_the_batch_is_replaced(memory_bytes, tmp_path):
    """A linear may read the residual stream itself; what it read may be needed later."""
    held = states(tmp_path, memory_bytes)
    for seed in range(4):
        held.append(batch(seed))
    given = [held.get(index) for index in range(4)]
    for index in range(4):
        held.put(index, batch(20 + index))
    assert all(torch.equal(got, batch(seed)) for seed, got in enumerate(given))
    assert all(torch.equal(got, batch(20 + seed)) for seed, got in enumerate(held))


@PLACES
def test_batches_of_different_sizes_are_held(memory_bytes, tmp_path):
    """The last batch of a stream has fewer windows."""
    held = states(tmp_path, memory_bytes)
    held.append(batch(0))
    held.append(batch(1)[:1])
    assert torch.equal(held.get(1), batch(1)[:1])


@PLACES
def test_a_view_of_other_memory_is_held_whole(memory_bytes, tmp_path):
    held = states(tmp_path, memory_bytes)
    wide = torch.arange(60.0).reshape(2, 3, 10)
    held.append(wide[..., ::2])
    assert torch.equal(held.get(0), wide[..., ::2])


def test_spilled_files_have_no_name_even_while_they_are_used(tmp_path):
    """A crash must leave nothing behind."""
    held = states(tmp_path, NOTHING)
    for seed in range(4):
        held.append(batch(seed))
    held.put(2, batch(7))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(held.get(2), batch(7))


def test_batches_within_the_budget_do_not_touch_the_disk(tmp_path):
    held = states(tmp_path / "there-is-no-such-directory", 3 * BATCH_BYTES)
    for seed in range(3):
        held.append(batch(seed))
    with pytest.raises(OSError, match="there-is-no-such-directory"):
        held.append(batch(3))


def test_many_spilled_batches_do_not_use_up_file_descriptors(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 128), hard))
    try:
        held = states(tmp_path, NOTHING)
        for seed in range(200):
            held.append(torch.full((1, 1, 4), float(seed)))
        assert [got[0, 0, 0].item() for got in held] == list(range(200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
