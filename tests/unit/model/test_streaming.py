"""The engine keeps one block in memory, and its batches and spilled files change no result."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from builders.plans import plan_of, random_windows
from builders.tiny_models import tiny_model, token_ids

from qtool.calibration.activations import HiddenStates
from qtool.checkpoint.locate import locate
from qtool.checkpoint.reader import TensorReader
from qtool.errors import DamagedError
from qtool.formats.reading import DenseSource
from qtool.model import streaming
from qtool.model.family import FAMILIES, family_of
from qtool.model.skeleton import Skeleton
from qtool.model.streaming import (
    Stream,
    Twin,
    advance,
    observe,
    visit_in_stages,
    visit_in_step,
    windows_per_batch,
)
from qtool.model.trace import run_watched
from qtool.pipeline.blocks import BlockQuantizer, Sinks

CPU = torch.device("cpu")
LENGTH = 33


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """Two windows run through a block at once, so that five make an uneven last batch."""
    monkeypatch.setattr(streaming, "INTERMEDIATE_BYTES", {"cpu": 2 * LENGTH * 160 * 4})


IN_STEP, IN_STAGES = None, 0  # budgets for what is held inside a block
BUDGETS = pytest.mark.parametrize("held_bytes", [IN_STEP, IN_STAGES], ids=["in-step", "in-stages"])


class Opened:
    """A checkpoint opened for streaming, with a plan."""

    def __init__(self, directory, windows, spill, *, held_bytes=IN_STEP, plan=None):
        self.checkpoint = locate(str(directory))
        self.family = family_of(self.checkpoint.config)
        self.skeleton = Skeleton(
            self.checkpoint.config, self.family, dtype=torch.float32, device=CPU
        )
        self.source = DenseSource(self.checkpoint, TensorReader(self.checkpoint.refs))
        self.plan = plan
        self.stream = Stream(
            self.skeleton, self.source, windows, Path(spill), held_bytes=held_bytes
        )
        assert self.stream.in_step == (held_bytes is IN_STEP)

    def quantize(self, *, before_each=lambda _: None):
        """Quantize all blocks; return name -> quantized, changed tensors and reports."""
        tensors, changed, reports = {}, {}, []
        sinks = Sinks(tensors.__setitem__, reports.append)
        quantizer = BlockQuantizer(self.plan, self.skeleton, self.source, self.stream, sinks)
        with torch.no_grad():
            for index in range(self.plan.n_blocks):
                before_each(index)
                changed.update(quantizer.quantize(index).changed)
        return tensors, changed, reports


def same_result(left, right):
    """Whether two quantizations agree in every code and parameter."""
    return set(left) == set(right) and all(
        torch.equal(left[name].codes, right[name].codes)
        and torch.equal(left[name].parameters.scale, right[name].parameters.scale)
        and torch.equal(left[name].parameters.zero, right[name].parameters.zero)
        for name in left
    )


def relative_error(expected, got):
    return ((expected - got).norm() / expected.norm()).item()


def smooth_visit(working, seen):
    """A visit that changes weights by what it sees, smoothly: no codes that could fall either way.

    Small differences of the moments stay small, while a tap that saw unfinished weights, or
    another block's input, would show.
    """

    def visit(tap, moments):
        seen[tap.name] = moments
        spread = moments.diagonal / moments.diagonal.mean()
        if moments.cross is not None:
            spread = spread + moments.cross.diagonal() / moments.hessian.diagonal().mean()
        for linear in tap.linears:
            module = working.get_submodule(linear)
            weight = module.weight * (1 + 0.2 * torch.tanh(spread))
            module.load_state_dict({"weight": weight}, strict=False, assign=True)

    return visit


def visited(directory, ids, spill, route, *, with_twin):
    """Visit all taps of all blocks; return the moments of each, and both final streams.

    Routes: "stages"; "step"; and "kept", in step with the twin's inputs kept from before.
    """
    opened = Opened(directory, ids, spill)
    skeleton, stream, taps = opened.skeleton, opened.stream, opened.family.taps
    hidden = stream.copy_hidden() if with_twin else None
    go_through = visit_in_stages if route == "stages" else visit_in_step
    seen = []
    with torch.no_grad():
        for index, reference in enumerate(skeleton.blocks):
            path = f"model.layers.{index}"
            working = copy.deepcopy(reference)
            skeleton.assign(working, skeleton.load(path, opened.source))
            twin = Twin(reference, hidden) if with_twin else None
            if with_twin and route == "kept":
                options = {"statistics": "diagonal", "keep_inputs": True, "move_on": True}
                _, inputs = observe(stream, hidden, reference, index, taps, **options)
                twin = Twin(reference, inputs=inputs)
            seen.append({})
            go_through(stream, working, index, taps, smooth_visit(working, seen[-1]), twin)
            skeleton.drop(path)
    return seen, list(stream.hidden), [] if hidden is None else list(hidden)


def all_equal(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize(("route", "with_twin"), [("step", False), ("step", True), ("kept", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_route_shows_every_tap_the_same_to_the_bit(family, route, with_twin, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=1, layers=3)
    ids = token_ids(5, LENGTH, seed=2)
    seen, hidden, twin = visited(directory, ids, tmp_path, route, with_twin=with_twin)
    expected_seen, expected_hidden, expected_twin = visited(
        directory, ids, tmp_path, "stages", with_twin=with_twin
    )
    assert [len(batch) for batch in hidden] == [2, 2, 1]
    assert all_equal(hidden, expected_hidden)
    assert all_equal(twin, expected_twin)
    for got, expected in zip(seen, expected_seen, strict=True):
        assert list(got) == list(expected) == [tap.name for tap in FAMILIES[family].taps]
        for name in got:
            assert got[name].tokens == expected[name].tokens == 5 * LENGTH
            assert torch.equal(got[name].hessian, expected[name].hessian)
            assert torch.equal(got[name].diagonal, expected[name].diagonal)
            corrected = with_twin and FAMILIES[family].tap(name).corrected
            assert (got[name].cross is not None) == corrected
            if corrected:
                assert torch.equal(got[name].cross, expected[name].cross)
    if with_twin:
        assert relative_error(twin[0], hidden[0]) > 0.01  # the two streams do part


@pytest.mark.parametrize("route", ["step", "kept", "stages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_taps_read_what_finished_weights_computed(family, route, tmp_path):
    """Oracle: one forward pass of the block with the weights that it ended up with."""
    directory = tiny_model(family, tmp_path / "model", seed=3, layers=1)
    taps, ids = FAMILIES[family].taps, token_ids(4, LENGTH, seed=4)
    opened = Opened(directory, ids, tmp_path)
    reference = opened.skeleton.blocks[0]
    working = copy.deepcopy(reference)
    opened.skeleton.assign(working, opened.skeleton.load("model.layers.0", opened.source))
    (seen,), hidden, twin = visited(directory, ids, tmp_path, route, with_twin=True)
    for tap in taps:  # what each visit did, again
        smooth_visit(working, {})(tap, seen[tap.name])
    inputs = {(block, tap.name): [] for block in (working, reference) for tap in taps}
    outputs = {working: [], reference: []}
    with torch.no_grad():
        for batch in range(len(opened.stream)):
            for block, left in outputs.items():
                output = run_watched(
                    block,
                    taps,
                    opened.stream.hidden.get(batch),
                    opened.stream.call(batch, 0),
                    lambda tap, x, block=block: inputs[block, tap.name].append(x.double()),
                )
                left.append(output)
    assert all_equal(outputs[working], hidden)
    assert all_equal(outputs[reference], twin)
    for tap in taps:
        x, original = (torch.cat(inputs[block, tap.name]) for block in (working, reference))
        assert relative_error(x.T @ x / len(x), seen[tap.name].hessian) < 1e-6
        if tap.corrected:
            assert relative_error(x.T @ original / len(x), seen[tap.name].cross) < 1e-6


@pytest.mark.parametrize(
    ("method", "propagation"), [("gptq", 0.0), ("gptq", 0.5), ("awq", 0.5), ("awq+gptq", 0.5)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_does_not_change_a_bit_of_the_result(family, method, propagation, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=1, layers=2)
    plan = plan_of(directory, method=method, error_propagation=propagation)
    ids = token_ids(7, LENGTH, seed=2)
    step = Opened(directory, ids, tmp_path, plan=plan)
    stages = Opened(directory, ids, tmp_path, plan=plan, held_bytes=IN_STAGES)
    assert len(step.stream) == len(stages.stream) == 4
    expected, expected_changed, _ = stages.quantize()
    got, changed, _ = step.quantize()
    assert list(got) == list(expected) == [x.name for x in plan.linears]
    assert same_result(got, expected)
    assert set(changed) == set(expected_changed)
    assert all(torch.equal(changed[name], expected_changed[name]) for name in changed)
    assert all_equal(list(step.stream.hidden), list(stages.stream.hidden))


@BUDGETS
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_stays_the_float_models_own_stream(family, method, held_bytes, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=3, layers=2)
    rules = [{"match": "model.layers.0.*", "keep": True}]  # a block without taps moves it, too
    plan = plan_of(directory, method=method, error_propagation=1.0, rules=rules)
    ids = token_ids(5, LENGTH, seed=4)
    opened = Opened(directory, ids, tmp_path, plan=plan, held_bytes=held_bytes)
    quantizer = BlockQuantizer(
        plan, opened.skeleton, opened.source, opened.stream, Sinks(lambda *_: None, lambda _: None)
    )
    with torch.no_grad():
        for index in range(plan.n_blocks):
            quantizer.quantize(index)
    assert all_equal(list(quantizer._twin), float_hidden(directory, ids, tmp_path))


def float_hidden(directory, ids, spill):
    """Hidden states behind the last block of the float model."""
    opened = Opened(directory, ids, spill)
    with torch.no_grad():
        for index, block in enumerate(opened.skeleton.blocks):
            opened.skeleton.load(f"model.layers.{index}", opened.source)
            advance(opened.stream, opened.stream.hidden, block, index)
            opened.skeleton.drop(f"model.layers.{index}")
    return list(opened.stream.hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_inputs_are_what_the_taps_read_even_after_the_stream_moved_on(family, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=5, layers=1)
    ids = token_ids(2, LENGTH, seed=6)
    results = []
    for move_on in (False, True):
        opened = Opened(directory, ids, tmp_path)
        opened.skeleton.load("model.layers.0", opened.source)
        with torch.no_grad():
            _, inputs = observe(
                opened.stream,
                opened.stream.hidden,
                opened.skeleton.blocks[0],
                0,
                opened.family.taps,
                statistics="diagonal",
                keep_inputs=True,
                move_on=move_on,
            )
        results.append(inputs)
    assert list(results[0]) == [tap.name for tap in opened.family.taps if tap.corrected]
    for name, inputs in results[0].items():
        assert all_equal(inputs, results[1][name])


@BUDGETS
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_on_disk_change_nothing(family, held_bytes, tmp_path, monkeypatch):
    directory = tiny_model(family, tmp_path / "model", seed=7, layers=2)
    plan = plan_of(directory, method="awq+gptq")
    ids = token_ids(3, LENGTH, seed=8)
    in_memory = Opened(directory, ids, tmp_path, plan=plan, held_bytes=held_bytes)
    expected, changed, _ = in_memory.quantize()
    spilled_states = []

    def on_disk(device, *, memory_bytes, device_bytes, spill):
        states = HiddenStates(device, memory_bytes=0, device_bytes=0, spill=spill)
        spilled_states.append(states)
        return states

    monkeypatch.setattr(streaming, "HiddenStates", on_disk)
    spilled = Opened(directory, ids, tmp_path, plan=plan, held_bytes=held_bytes)
    got, also_changed, _ = spilled.quantize()
    assert len(spilled_states) == 2  # the stream and its twin
    assert same_result(got, expected)
    assert set(changed) == set(also_changed)
    assert all(torch.equal(changed[name], also_changed[name]) for name in changed)
    assert all_equal(list(in_memory.stream.hidden), list(spilled.stream.hidden))


@BUDGETS
@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
def test_only_the_active_block_holds_weights(method, held_bytes, tmp_path, monkeypatch):
    directory = tiny_model("llama", tmp_path / "model", layers=4)
    plan = plan_of(directory, method=method)
    opened = Opened(directory, token_ids(4, LENGTH), tmp_path, plan=plan, held_bytes=held_bytes)
    real = []

    def materialised():
        found = set()
        for name, parameter in opened.skeleton.model.named_parameters():
            if parameter.device.type != "meta":
                found.add(".".join(name.split(".")[:3]))
        return found

    load = Skeleton.load

    def watched_load(self, path, source):
        stored = load(self, path, source)
        real.append((path, materialised()))
        return stored

    monkeypatch.setattr(Skeleton, "load", watched_load)
    assert materialised() == set()
    opened.quantize(before_each=lambda _: real.append(("", materialised())))
    assert materialised() == set()
    assert [path for path, found in real if found and found != {path}] == []
    assert [path for path, _ in real if path] == [f"model.layers.{i}" for i in range(4)]


def test_a_skeleton_holds_no_parameter_memory_but_real_buffers(tmp_path):
    directory = tiny_model("llama", tmp_path / "model", layers=4)
    checkpoint = locate(str(directory))
    skeleton = Skeleton(
        checkpoint.config, family_of(checkpoint.config), dtype=torch.float32, device=CPU
    )
    assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}
    buffers = list(skeleton.model.buffers())
    assert buffers
    assert all(b.device.type == "cpu" and torch.isfinite(b).all() for b in buffers)


def test_making_a_skeleton_leaves_torch_as_it_was(tmp_path):
    directory = tiny_model("llama", tmp_path / "model", layers=1)
    checkpoint = locate(str(directory))
    Skeleton(checkpoint.config, family_of(checkpoint.config), dtype=torch.float32, device=CPU)
    assert torch.nn.Linear(3, 2).weight.device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32


def test_loading_and_dropping_a_block_leaves_its_neighbours_alone(tmp_path):
    directory = tiny_model("qwen2", tmp_path / "model", layers=2)
    opened = Opened(directory, token_ids(1, LENGTH), tmp_path)
    stored = opened.skeleton.load("model.layers.1", opened.source)
    first, second = opened.skeleton.blocks
    assert {p.device.type for p in first.parameters()} == {"meta"}
    assert all(torch.equal(p, stored[n]) for n, p in second.named_parameters())
    opened.skeleton.drop("model.layers.1")
    assert {p.device.type for p in second.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"intermediate_size": 192}, "shape"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_attention_heads": 3}, "does not describe a Llama model"),
        ({"hidden_act": "nope"}, "does not describe a Llama model"),
        ({"rope_parameters": {"rope_type": "nope"}}, "does not describe a Llama model"),
        ({"rms_norm_eps": "small"}, "does not describe a Llama model"),
    ],
)
def test_a_config_that_is_not_the_weights_own_is_damage(change, said, tmp_path):
    directory = tiny_model("llama", tmp_path / "model", layers=2)
    checkpoint = locate(str(directory))
    config = {**checkpoint.config, **change}
    source = DenseSource(checkpoint, TensorReader(checkpoint.refs))

    def load_all():
        skeleton = Skeleton(config, family_of(config), dtype=torch.float32, device=CPU)
        for index in range(len(skeleton.blocks)):
            skeleton.load(f"model.layers.{index}", source)

    with pytest.raises(DamagedError, match=said) as caught:
        load_all()
    assert "\n" not in caught.value.message


def test_batches_fill_what_an_intermediate_may_take_and_hold_at_least_one_window(
    tmp_path, monkeypatch
):
    directory = tiny_model("llama", tmp_path / "model", layers=1)
    checkpoint = locate(str(directory))
    skeleton = Skeleton(
        checkpoint.config, family_of(checkpoint.config), dtype=torch.float32, device=CPU
    )
    windows = random_windows(5, LENGTH).ids
    sizes = []
    for wanted in (0, 1, 2.5, 100):
        bytes_wanted = int(wanted * LENGTH * 160 * 4)
        monkeypatch.setattr(streaming, "INTERMEDIATE_BYTES", {"cpu": bytes_wanted})
        sizes.append(windows_per_batch(skeleton, windows))
    assert sizes == [1, 1, 2, 5]


@BUDGETS
def test_a_failing_forward_raises_and_leaves_no_thread_behind(held_bytes, tmp_path):
    """Also when it is the visit in the middle of a block that fails."""
    directory = tiny_model("llama", tmp_path / "model", layers=1)
    opened = Opened(directory, token_ids(5, LENGTH), tmp_path, held_bytes=held_bytes)
    opened.skeleton.load("model.layers.0", opened.source)
    block, taps = opened.skeleton.blocks[0], opened.family.taps
    go_through = visit_in_step if opened.stream.in_step else visit_in_stages
    threads = threading.active_count()

    def visit(tap, _):
        if tap.name == "mlp_in":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        go_through(opened.stream, block, 0, taps, visit, None)

    def broken(*_):
        raise OverflowError

    block.mlp.act_fn.forward = broken
    with pytest.raises(OverflowError):
        go_through(opened.stream, block, 0, taps, lambda *_: None, None)
    assert threading.active_count() == threads
    assert not any(module._forward_pre_hooks for module in block.modules())
