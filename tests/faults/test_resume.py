"""An interrupted run goes on where it stopped, and ends with the bytes of an uninterrupted one."""

import json
import shutil

import pytest
import torch
from builders.interruptions import Stops, digests, run
from builders.plans import plan_of, random_windows
from builders.tiny_models import SPECIAL, tiny_model

from qtool.checkpoint.work_directory import work_path
from qtool.errors import CapacityError, DamagedError, InterruptionError, UsageError
from qtool.model import streaming

CPU = torch.device("cpu")
LENGTH, LAYERS = 24, 4
INTEGER = {
    "rtn": {"formats": ("compressed-tensors",)},
    "gptq": {"formats": ("gptq",)},
    "awq": {"formats": ("awq",), "symmetric": False},
    "awq+gptq": {"formats": ("gptq", "awq"), "symmetric": False},
}
METHODS = [*INTEGER]


def windows():
    return random_windows(6, LENGTH, seed=1)


def model(directory, family="llama", **settings):
    scaled = {"query_pre_attn_scalar": 32} if "gemma" in family else {}
    return tiny_model(
        family, directory, **{"layers": LAYERS, "dtype": torch.bfloat16, **scaled, **settings}
    )


def calibrated(plan):
    return {"windows": windows()} if plan.calibrated else {}


def planned(directory, method, **settings):
    return plan_of(directory, method=method, **{**INTEGER[method], **settings})


def places(base, plan):
    if len(plan.outputs) == 1:
        return base
    return [base / output.name for output in plan.outputs]


def whole(plan, base):
    """What an uninterrupted run gives."""
    run(plan, places(base, plan), device=CPU, **calibrated(plan))
    return digests(base)


def interrupted(plan, base, after):
    with pytest.raises(InterruptionError) as caught:
        run(plan, places(base, plan), Stops(after), device=CPU, **calibrated(plan))
    assert caught.value.resumable
    assert f"{after} of {LAYERS} blocks are kept" in caught.value.hint
    return work_path(base if len(plan.outputs) == 1 else base / plan.outputs[0].name)


def resumed(plan, base, **settings):
    return run(plan, places(base, plan), device=CPU, **calibrated(plan), **settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SPECIAL)
def test_every_family_and_method_goes_on_to_the_same_bytes(tmp_path, family, method):
    directory = model(tmp_path / "model", family)
    plan = planned(directory, method)
    expected = whole(plan, tmp_path / "whole" / "out")
    base = tmp_path / "again" / "out"
    work = interrupted(plan, base, 2)
    assert work.exists()
    assert not base.exists() or not any(base.rglob("config.json"))
    again = resumed(plan, base)
    assert again.blocks == [3, 4]
    assert digests(base) == expected
    assert not work.exists()


GGUF = [("gptq", "Q4_K_M"), ("awq", "Q4_0"), ("awq+gptq", "Q3_K_M"), ("rtn", "Q8_0")]


@pytest.mark.parametrize(("method", "kind"), GGUF)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_gguf_files_go_on_to_the_same_bytes(tmp_path, family, method, kind):
    directory = model(tmp_path / "model", family, hidden=256, intermediate=512, layers=LAYERS)
    plan = plan_of(directory, method=method, formats=(f"gguf:{kind}",))
    expected = whole(plan, tmp_path / "whole" / "x.gguf")
    (tmp_path / "whole" / "x.gguf").rename(tmp_path / "expected.gguf")
    base = tmp_path / "again" / "x.gguf"
    interrupted(plan, base, 3)
    assert not base.exists()
    assert resumed(plan, base).blocks == [4]
    assert base.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert digests(tmp_path / "again").keys() >= {"x.gguf"}
    del expected


@pytest.mark.parametrize("stop", range(1, LAYERS + 1))
def test_wherever_it_stops(tmp_path, stop):
    plan = planned(model(tmp_path / "model"), "gptq")
    expected = whole(plan, tmp_path / "whole" / "out")
    interrupted(plan, tmp_path / "out", stop)
    assert resumed(plan, tmp_path / "out").blocks == list(range(stop + 1, LAYERS + 1))
    assert digests(tmp_path / "out") == expected


def test_again_and_again(tmp_path):
    plan = planned(model(tmp_path / "model"), "awq+gptq")
    expected = whole(plan, tmp_path / "whole" / "out")
    base = tmp_path / "out"
    for done in range(1, LAYERS):
        with pytest.raises(InterruptionError, match="interrupted"):
            run(plan, places(base, plan), Stops(1), device=CPU, **calibrated(plan))
        report = work_path(base / "gptq") / "journal.jsonl"
        assert len(report.read_bytes().splitlines()) == done + 1
    resumed(plan, base)
    assert digests(base) == expected


def test_in_stages_as_in_step(tmp_path, monkeypatch):
    """What fits in memory may differ between two halves of a run."""
    monkeypatch.setattr(streaming, "INTERMEDIATE_BYTES", {"cpu": 10_000, "cuda": 10_000})
    plan = planned(model(tmp_path / "model"), "gptq")
    expected = whole(plan, tmp_path / "whole" / "out")
    base = tmp_path / "out"
    with pytest.raises(InterruptionError):
        run(plan, base, Stops(2), device=CPU, held_bytes=0, **calibrated(plan))
    resumed(plan, base, held_bytes=1 << 40)
    assert digests(base) == expected


def test_without_resume_it_starts_over(tmp_path):
    plan = planned(model(tmp_path / "model"), "gptq")
    interrupted(plan, tmp_path / "out", 3)
    assert resumed(plan, tmp_path / "out", resume=False).blocks == [1, 2, 3, 4]


def test_the_layers_of_both_halves_are_in_the_report(tmp_path):
    plan = planned(model(tmp_path / "model"), "gptq")
    whole(plan, tmp_path / "whole")
    interrupted(plan, tmp_path / "out", 2)
    resumed(plan, tmp_path / "out")

    def layers(name):
        report = json.loads((tmp_path / name / "qtool-report.json").read_text())
        return [{k: v for k, v in x.items() if k != "seconds"} for x in report["layers"]]

    assert layers("out") == layers("whole")


# --- another run ------------------------------------------------------------------------------


CHANGES = {
    "method": ({"method": "awq+gptq"}, r"method was gptq, is awq\+gptq"),
    "bits": ({"bits": 8}, "bits was 4, is 8"),
    "damping": ({"damp_percent": 0.1}, "damp_percent was 0.05, is 0.1"),
    "rules": ({"rules": ({"match": "down_proj", "bits": 8},)}, "rules"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_are_refused_with_what_differs(tmp_path, change):
    directory = model(tmp_path / "model")
    interrupted(planned(directory, "gptq"), tmp_path / "out", 2)
    changed, words = CHANGES[change]
    other = plan_of(directory, **{"method": "gptq", "formats": ("gptq",), **changed})
    with pytest.raises(UsageError, match=words) as caught:
        run(other, tmp_path / "out", device=CPU, windows=windows())
    assert "--no-resume" in caught.value.hint
    # The run that may be gone on with is still there.
    assert resumed(planned(directory, "gptq"), tmp_path / "out").blocks == [3, 4]


def test_other_calibration_text_is_refused(tmp_path):
    plan = planned(model(tmp_path / "model"), "gptq")
    interrupted(plan, tmp_path / "out", 2)
    with pytest.raises(UsageError, match="calibration_tokens has changed"):
        run(plan, tmp_path / "out", device=CPU, windows=random_windows(6, LENGTH, seed=2))


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_changed_source_is_refused(tmp_path, layer):
    directory = model(tmp_path / "model")
    plan = planned(directory, "gptq")
    interrupted(plan, tmp_path / "out", 2)
    ref = plan.checkpoint.refs[f"model.layers.{layer}.mlp.up_proj.weight"]
    flip(ref.file, ref.start + 7)
    with pytest.raises(UsageError, match=r"source.model.safetensors has changed"):
        resumed(plan, tmp_path / "out")


def test_gates_and_evaluation_may_change(tmp_path):
    directory = model(tmp_path / "model")
    plan = planned(directory, "gptq")
    interrupted(plan, tmp_path / "out", 2)
    recipe = plan.recipe.model_copy(update={"gates": ("size<=5GB",)})
    changed = type(plan)(**{**vars(plan), "recipe": recipe})
    assert resumed(changed, tmp_path / "out").blocks == [3, 4]


# --- damage ---------------------------------------------------------------------------------


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def spoil(path, how):
    if how == "flipped":
        flip(path, path.stat().st_size // 2)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()


DAMAGE = ["flipped", "truncated", "missing"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_weights_of_one_block_are_done_again(tmp_path, method, how):
    plan = planned(model(tmp_path / "model"), method)
    expected = whole(plan, tmp_path / "whole" / "out")
    base = tmp_path / "out"
    work = interrupted(plan, base, 3)
    file = work / "result" / "model.safetensors"
    name = "model.layers.1.mlp.up_proj"
    if how == "flipped":
        refs = {place: p for place, p in plan.outputs[0].shards.places.items() if name in place}
        flip(file, next(iter(refs.values())).start + 5)
    else:
        spoil(file, how)
    again = resumed(plan, base)
    assert [code for code, _ in again.warnings][:1] == ["damaged_state"]
    assert again.blocks == ([2, 4] if how == "flipped" else again.blocks)
    assert digests(base) == expected


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("stream", ["hidden", "twin"])
def test_damaged_hidden_states_are_computed_again_from_the_blocks(tmp_path, method, how, stream):
    plan = planned(model(tmp_path / "model"), method)
    expected = whole(plan, tmp_path / "whole" / "out")
    base = tmp_path / "out"
    work = interrupted(plan, base, 3)
    (file,) = (work / "states").glob(f"{stream}-*.bin")
    spoil(file, how)
    again = resumed(plan, base)
    assert again.blocks == [4]
    assert "damaged_state" in dict(again.warnings)
    assert digests(base) == expected


@pytest.mark.parametrize(("method", "kind"), GGUF[:3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_damaged_states_of_a_gguf_are_computed_again_from_its_blocks(
    tmp_path, family, method, kind
):
    directory = model(tmp_path / "model", family, hidden=256, intermediate=512)
    plan = plan_of(directory, method=method, formats=(f"gguf:{kind}",))
    whole(plan, tmp_path / "whole" / "x.gguf")
    base = tmp_path / "again" / "x.gguf"
    work = interrupted(plan, base, 3)
    (file,) = (work / "states").glob("hidden-*.bin")
    spoil(file, "missing")
    assert resumed(plan, base).blocks == [4]
    assert base.read_bytes() == (tmp_path / "whole" / "x.gguf").read_bytes()


def test_a_damaged_norm_of_awq_costs_its_block_only(tmp_path):
    plan = planned(model(tmp_path / "model"), "awq")
    expected = whole(plan, tmp_path / "whole" / "out")
    work = interrupted(plan, tmp_path / "out", 3)
    for name in ("hidden-00002.bin", "changed-00001.safetensors"):
        spoil(work / "states" / name, "flipped")
    assert resumed(plan, tmp_path / "out").blocks == [2, 4]
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("line", range(4))
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_line_of_the_journal_costs_its_block_only(tmp_path, line, how):
    plan = planned(model(tmp_path / "model"), "gptq")
    expected = whole(plan, tmp_path / "whole" / "out")
    work = interrupted(plan, tmp_path / "out", 3)
    journal = work / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    half = len(lines[line]) // 2
    if how == "flipped":
        lines[line] = lines[line][:half] + b"?" + lines[line][half + 1 :]
    elif how == "truncated":
        lines[line] = lines[line][:half] + b"\n"
    else:
        del lines[line]
    journal.write_bytes(b"".join(lines))
    again = resumed(plan, tmp_path / "out")
    assert again.blocks == ([4] if line == 0 else [line, 4])
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_journal_that_was_cut_off_while_it_was_written(tmp_path, cut):
    plan = planned(model(tmp_path / "model"), "rtn")
    expected = whole(plan, tmp_path / "whole" / "out")
    work = interrupted(plan, tmp_path / "out", 3)
    journal = work / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    again = resumed(plan, tmp_path / "out")
    assert again.blocks == ([4] if cut == 1 else [3, 4])  # a line without its end is whole
    assert digests(tmp_path / "out") == expected


def test_a_missing_journal_means_starting_over(tmp_path):
    plan = planned(model(tmp_path / "model"), "gptq")
    work = interrupted(plan, tmp_path / "out", 3)
    (work / "journal.jsonl").unlink()
    (work / "result" / "stranger").write_text("left")
    assert resumed(plan, tmp_path / "out").blocks == [1, 2, 3, 4]
    assert not (tmp_path / "out" / "stranger").exists()


def test_the_room_for_states_does_not_grow(tmp_path):
    plan = planned(model(tmp_path / "model"), "gptq")
    work = interrupted(plan, tmp_path / "out", 3)
    assert sorted(path.name for path in (work / "states").iterdir()) == [
        "hidden-00002.bin",
        "twin-00002.bin",
    ]


# --- what else may go wrong -------------------------------------------------------------------


def test_a_full_disk_says_how_to_go_on(tmp_path):
    plan = planned(model(tmp_path / "model"), "gptq")
    full = CapacityError("cannot write x: No space left on device", "free some", resumable=True)
    with pytest.raises(CapacityError) as caught:
        run(plan, tmp_path / "out", Stops(2, full), device=CPU, windows=windows())
    assert "free some; then run the same command to go on: 2 of 4" in caught.value.hint
    assert resumed(plan, tmp_path / "out").blocks == [3, 4]


def test_a_fault_that_would_come_again_leaves_nothing(tmp_path):
    plan = planned(model(tmp_path / "model"), "gptq")
    with pytest.raises(DamagedError):
        run(plan, tmp_path / "out", Stops(2, DamagedError("x")), device=CPU, windows=windows())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_little_room_is_said_before_the_start(tmp_path, monkeypatch):
    plan = planned(model(tmp_path / "model"), "gptq")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(CapacityError, match=r"100 kB free, .* are needed"):
        run(plan, tmp_path / "out", device=CPU, windows=windows())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_disk_that_others_fill_stops_the_run_between_blocks(tmp_path, monkeypatch, method):
    plan = planned(model(tmp_path / "model"), method)
    usage = shutil.disk_usage(tmp_path)
    progress = Stops()
    with monkeypatch.context() as patched:
        patched.setattr(
            shutil,
            "disk_usage",
            lambda _: usage._replace(free=1000) if len(progress.blocks) == 2 else usage,
        )
        with pytest.raises(CapacityError, match="1 kB free") as caught:
            run(plan, tmp_path / "out", progress, device=CPU, **calibrated(plan))
    assert "2 of 4 blocks are kept" in caught.value.hint
    assert resumed(plan, tmp_path / "out").blocks == [3, 4]
