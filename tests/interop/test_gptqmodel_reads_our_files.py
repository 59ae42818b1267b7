"""GPTQModel, in an environment of its own, computes from our directories what they say.

`make interop` builds that environment and names its interpreter in QTOOL_INTEROP_PYTHON.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from interop_layouts import (
    decoded_state,
    handmade,
    logits_of_state,
    qtool_quantize,
    quantized_linears,
    read_tensors,
    relative_difference,
    state_of_qtool,
    tiny_llama,
    window,
    words_to_codes,
)

SCRIPT = Path(__file__).with_name("gptqmodel_logits.py")
BACKENDS = {"gptq": "torch", "awq": "torch_awq"}
# In float32 the two differ by some 1e-8; zero points off by one in a single linear give 1e-1.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def peer():
    python = os.environ.get("QTOOL_INTEROP_PYTHON")
    if not python:
        pytest.skip("QTOOL_INTEROP_PYTHON names no interpreter with GPTQModel: run `make interop`")
    return python


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def logits_of_gptqmodel(python, directory, layout, scratch):
    """Logits of the window as GPTQModel computes them, in float32."""
    tokens, out = scratch / "tokens.npy", scratch / "logits.npy"
    np.save(tokens, window())
    command = [python, SCRIPT, directory, tokens, out, "--backend", BACKENDS[layout]]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, (outcome.stdout + outcome.stderr)[-4000:]
    return np.load(out)


def gptq_config(bits, group_size, symmetric):
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        # Without this GPTQModel refuses asymmetric files of version 1: it trusts the zero points
        # only of a writer that stores them as it does since 0.9.
        "meta": {"quantizer": ["gptqmodel:0.9.0"]},
    }


def awq_config(bits, group_size, symmetric):
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": bits,
        "group_size": group_size,
        "zero_point": not symmetric,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "bits", "group_size", "symmetric"),
    [
        ("gptq", 4, 64, False),
        ("gptq", 3, 64, False),
        ("gptq", 8, -1, True),
        ("awq", 4, 64, False),
    ],
)
def test_gptqmodel_agrees_with_our_independent_reader_on_handmade_files(
    layout, bits, group_size, symmetric, peer, model, tmp_path
):
    config = {"gptq": gptq_config, "awq": awq_config}[layout](bits, group_size, symmetric)
    made = tmp_path / "made"
    handmade(
        model, made, layout, bits=bits, group_size=group_size, symmetric=symmetric, config=config
    )
    expected = logits_of_state(made, decoded_state(made, layout, bits), window())
    theirs = logits_of_gptqmodel(peer, made, layout, tmp_path)
    assert relative_difference(theirs, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_a_zero_point_off_by_one_would_show(layout, model, tmp_path):
    config = {"gptq": gptq_config, "awq": awq_config}[layout](4, 64, False)
    made = tmp_path / "made"
    handmade(model, made, layout, bits=4, group_size=64, symmetric=False, config=config)
    state = decoded_state(made, layout, 4)
    expected = logits_of_state(made, state, window())
    name = "model.layers.0.mlp.up_proj"
    # Moving every zero point of one linear by one step moves its weights by one scale.
    scales = torch.from_numpy(read_tensors(made)[f"{name}.scales"].astype(np.float32))
    state[f"{name}.weight"] += scales.repeat_interleave(64, 0).T
    wrong = logits_of_state(made, state, window())
    assert relative_difference(wrong, expected) > 20 * TOLERANCE


QUANTIZATIONS = [
    ("rtn", 4, "--sym", "gptq"),
    ("rtn", 8, "--asym", "gptq"),
    ("gptq", 4, "--asym", "gptq"),
    ("gptq", 3, "--sym", "gptq"),
    ("awq", 4, "--asym", "awq"),
    ("awq+gptq", 4, "--asym", "awq"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits", "symmetry", "layout"), QUANTIZATIONS)
def test_gptqmodel_computes_our_logits_from_our_files(
    method, bits, symmetry, layout, peer, model, tmp_path
):
    ours = qtool_quantize(
        model,
        tmp_path / "ours",
        *("--method", method, "--bits", bits, "--group-size", 64, symmetry, "--format", layout),
    )
    expected = logits_of_state(ours, decoded_state(ours, layout, bits), window())
    theirs = logits_of_gptqmodel(peer, ours, layout, tmp_path)
    assert relative_difference(theirs, expected) <= TOLERANCE
    by_qtool = logits_of_state(ours, state_of_qtool(ours), window())
    assert relative_difference(theirs, by_qtool) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_our_gptq_files_hold_no_zero_point_that_readers_differ_on(bits, model, tmp_path):
    # Version 1 stores zero - 1, so a zero of 0 wraps to all ones. GPTQModel adds the one back to
    # whole words, where the carry spoils the neighbour; other readers add within each field.
    ours = qtool_quantize(
        model,
        tmp_path / "ours",
        *("--method", "rtn", "--bits", bits, "--group-size", 64, "--asym", "--format", "gptq"),
    )
    tensors = read_tensors(ours)
    stored = [
        words_to_codes(tensors[f"{linear}.qzeros"], bits, tensors[f"{linear}.scales"].shape[1])
        for linear in quantized_linears(tensors, "gptq")
    ]
    assert max(words.max() for words in stored) < (1 << bits) - 1
    assert min(words.min() for words in stored) == 0  # the model has rows that come that close
