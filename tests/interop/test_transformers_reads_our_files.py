"""transformers with the compressed-tensors package computes from our directories what they say."""

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
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

pytest.importorskip("compressed_tensors", reason="the compressed-tensors package is not installed")

LAYOUT = "compressed-tensors"
TOLERANCE = 1e-3
SCHEMES = [(4, 64, True), (4, 64, False), (8, -1, True), (8, -1, False)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def pack_quantized_config(bits, group_size, symmetric):
    """The fields without which transformers 5.23 loads garbage or nothing, and no other."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        # Without it the packed tensors are left unread and the linears stay random.
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group_size == -1 else "group",
                    "group_size": None if group_size == -1 else group_size,
                },
            }
        },
    }


def logits_of_transformers(directory, symmetric):
    """Logits of the window as transformers computes them in float32 from the packed directory."""
    # transformers 5.23 loads a symmetric directory as it is. For an asymmetric one it expects, with
    # compressed-tensors 0.19 and 0.20, zero points that are not packed, although their own writer
    # packs them; asked to dequantize while loading, it reads what is there.
    options = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", dtype=torch.float32, **options
    ).eval()
    with torch.inference_mode():
        return model(torch.from_numpy(window())[None]).logits[0].numpy()


def expected_logits(directory, state, symmetric):
    """Logits of plain transformers with `state`, weights rounded as compressed-tensors does."""
    if not symmetric:
        # Asked to dequantize, compressed-tensors multiplies in the dtype of the stored scales.
        for linear, dtype in stored_scale_dtypes(directory).items():
            state[f"{linear}.weight"] = state[f"{linear}.weight"].to(dtype).float()
    return logits_of_state(directory, state, window())


def stored_scale_dtypes(directory):
    """The dtype of every linear's scales, as the file has it."""
    dtypes = {}
    for linear in quantized_linears(read_tensors(directory), LAYOUT):
        for shard in directory.glob("*.safetensors"):
            with safe_open(shard, "pt") as file:
                if f"{linear}.weight_scale" in file.keys():  # noqa: SIM118  not a dictionary
                    dtypes[linear] = file.get_tensor(f"{linear}.weight_scale").dtype
    return dtypes


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_transformers_agrees_with_our_independent_reader_on_handmade_files(
    bits, group_size, symmetric, model, tmp_path
):
    made = tmp_path / "made"
    config = pack_quantized_config(bits, group_size, symmetric)
    handmade(
        model, made, LAYOUT, bits=bits, group_size=group_size, symmetric=symmetric, config=config
    )
    theirs = logits_of_transformers(made, symmetric)
    expected = expected_logits(made, decoded_state(made, LAYOUT, bits), symmetric)
    assert relative_difference(theirs, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_transformers_computes_our_logits_from_our_files(
    bits, group_size, symmetric, model, tmp_path
):
    ours = qtool_quantize(
        model,
        tmp_path / "ours",
        *("--method", "rtn", "--bits", bits, "--group-size", group_size),
        *("--sym" if symmetric else "--asym", "--format", LAYOUT),
    )
    theirs = logits_of_transformers(ours, symmetric)
    expected = expected_logits(ours, decoded_state(ours, LAYOUT, bits), symmetric)
    assert relative_difference(theirs, expected) <= TOLERANCE
    by_qtool = expected_logits(ours, state_of_qtool(ours), symmetric)
    assert relative_difference(theirs, by_qtool) <= TOLERANCE
