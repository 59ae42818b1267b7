"""An interrupted calibration goes on where it stopped, and ends with the bytes of a whole one."""

import errno

import pytest
import torch
from builders.faults import Faults
from builders.interruptions import Stops
from builders.plans import random_windows
from builders.tiny_models import SPECIAL, tiny_model
from safetensors.torch import load_file, save_file

from qtool.checkpoint.locate import locate
from qtool.checkpoint.work_directory import work_path
from qtool.errors import CapacityError, InterruptionError, NumericalError, UsageError
from qtool.pipeline.calibration_run import CalibrationSettings, calibrate_to

CPU = torch.device("cpu")
LENGTH, LAYERS = 24, 4


def windows(seed=1):
    return random_windows(6, LENGTH, seed=seed)


def model(directory, family="llama", **settings):
    scaled = {"query_pre_attn_scalar": 32} if "gemma" in family else {}
    settings = {"layers": LAYERS, "dtype": torch.bfloat16, **scaled, **settings}
    return locate(str(tiny_model(family, directory, **settings)))


def run(checkpoint, path, progress=None, seed=1, **settings):
    progress = progress or Stops()
    calibrate_to(path, checkpoint, windows(seed), CalibrationSettings(CPU, **settings), progress)
    return progress


def interrupted(checkpoint, path, after):
    with pytest.raises(InterruptionError) as caught:
        run(checkpoint, path, Stops(after))
    assert caught.value.resumable
    assert f"{after} of {LAYERS} blocks are kept" in caught.value.hint
    assert not path.exists()
    return work_path(path)


@pytest.fixture
def whole(tmp_path):
    """A model, and what an uninterrupted run says of it."""
    checkpoint = model(tmp_path / "model")
    run(checkpoint, tmp_path / "whole.gguf")
    return checkpoint, (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("family", SPECIAL)
def test_every_family_goes_on_to_the_same_bytes(tmp_path, family):
    checkpoint = model(tmp_path / "model", family)
    run(checkpoint, tmp_path / "whole.gguf")
    path = tmp_path / "statistics.gguf"
    work = interrupted(checkpoint, path, 2)
    assert run(checkpoint, path).blocks == [3, 4]
    assert path.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not work.exists()


@pytest.mark.parametrize("stop", range(1, LAYERS + 1))
def test_wherever_it_stops(tmp_path, whole, stop):
    checkpoint, expected = whole
    path = tmp_path / "statistics.gguf"
    interrupted(checkpoint, path, stop)
    assert run(checkpoint, path).blocks == list(range(stop + 1, LAYERS + 1))
    assert path.read_bytes() == expected


def test_only_the_hidden_states_of_the_last_block_are_kept(tmp_path, whole):
    work = interrupted(whole[0], tmp_path / "statistics.gguf", 3)
    states = sorted(path.name for path in (work / "states").iterdir())
    moments = [f"moments-{index:05d}.safetensors" for index in range(3)]
    assert states == ["float-00002.bin", *moments]


def test_without_resume_it_starts_over(tmp_path, whole):
    path = tmp_path / "statistics.gguf"
    interrupted(whole[0], path, 3)
    assert run(whole[0], path, resume=False).blocks == [1, 2, 3, 4]
    assert path.read_bytes() == whole[1]


def test_another_text_or_model_is_refused_with_what_differs(tmp_path, whole):
    path = tmp_path / "statistics.gguf"
    interrupted(whole[0], path, 2)
    with pytest.raises(UsageError, match="calibration_tokens has changed") as caught:
        run(whole[0], path, seed=2)
    assert "--no-resume" in caught.value.hint
    with pytest.raises(UsageError, match=r"source.model.safetensors has changed"):
        run(model(tmp_path / "other", seed=5), path)
    assert run(whole[0], path).blocks == [3, 4]  # the run that may be gone on with is still there


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {"flipped": flip, "truncated": truncate, "missing": lambda path: path.unlink()}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    ("name", "done"),
    [
        ("moments-00001.safetensors", [2, 4]),  # the others are known, and so is what follows
        ("moments-00002.safetensors", [3, 4]),
        ("float-00002.bin", [4]),  # the blocks are run through again, and nothing is forgotten
    ],
)
def test_damage_costs_what_it_spoils(tmp_path, whole, how, name, done):
    checkpoint, expected = whole
    path = tmp_path / "statistics.gguf"
    work = interrupted(checkpoint, path, 3)
    DAMAGE[how](work / "states" / name)
    again = run(checkpoint, path)
    assert "damaged_state" in dict(again.warnings)
    assert again.blocks == done
    assert path.read_bytes() == expected


WRONG = {
    "another width": lambda name, x: x[:-1] if x.ndim else x,
    "another type": lambda name, x: x.to(torch.float64),
    "no number": lambda name, x: x * float("nan") if x.ndim else x,
    "a tap that is not there": lambda name, x: None if name == "mlp_out.diagonal" else x,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_moments_of_another_shape_are_taken_again(tmp_path, whole, wrong, monkeypatch):
    from qtool.pipeline.states import States

    checkpoint, expected = whole
    path = tmp_path / "statistics.gguf"
    work = interrupted(checkpoint, path, 3)
    file = work / "states" / "moments-00001.safetensors"
    tensors = {name: WRONG[wrong](name, x) for name, x in load_file(file).items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, file)
    monkeypatch.setattr(States, "_has_bytes", lambda *_: True)  # with the hash to match
    assert run(checkpoint, path).blocks == [2, 4]
    assert path.read_bytes() == expected


def test_a_line_of_the_journal_that_is_gone_costs_its_block(tmp_path, whole):
    checkpoint, expected = whole
    path = tmp_path / "statistics.gguf"
    work = interrupted(checkpoint, path, 3)
    lines = (work / "journal.jsonl").read_bytes().splitlines(keepends=True)
    del lines[2]
    (work / "journal.jsonl").write_bytes(b"".join(lines))
    assert run(checkpoint, path).blocks == [2, 4]
    assert path.read_bytes() == expected


def test_a_full_disk_leaves_a_run_that_goes_on(tmp_path, whole):
    checkpoint, expected = whole
    path = tmp_path / "out" / "statistics.gguf"
    path.parent.mkdir()
    progress = Stops()
    with Faults(path.parent) as faults:
        run(checkpoint, path, overwrite=True)
    path.unlink()
    at = next(n for n, call in enumerate(faults.calls, 1) if "moments-00002" in call.path)
    with (
        Faults(path.parent, at, error=errno.ENOSPC),
        pytest.raises(CapacityError, match="No space left") as caught,
    ):
        run(checkpoint, path, progress)
    assert "run the same command to go on: 2 of 4 blocks" in caught.value.hint
    assert run(checkpoint, path).blocks == [3, 4]
    assert path.read_bytes() == expected


def test_a_weight_that_is_not_finite_leaves_nothing(tmp_path):
    checkpoint = model(tmp_path / "model")
    ref = checkpoint.refs["model.layers.2.mlp.up_proj.weight"]
    content = bytearray(ref.file.read_bytes())
    content[ref.start : ref.start + 2] = b"\x80\x7f"  # infinity in bfloat16
    ref.file.write_bytes(content)
    with pytest.raises(NumericalError, match=r"layers\.2\.mlp\.up_proj"):
        run(locate(str(checkpoint.path)), tmp_path / "statistics.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_second_process_is_refused_and_an_existing_file_is_left(tmp_path, whole):
    path = tmp_path / "statistics.gguf"

    class Watched(Stops):
        def advance(self, detail):
            super().advance(detail)
            with pytest.raises(UsageError, match="another process"):
                run(whole[0], path)

    assert run(whole[0], path, Watched()).blocks == [1, 2, 3, 4]
    with pytest.raises(UsageError, match="exists"):
        run(whole[0], path)
    assert path.read_bytes() == whole[1]
