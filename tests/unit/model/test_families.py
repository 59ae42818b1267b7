"""Every family against transformers' own model: streaming, taps and scale pairs."""

import subprocess
import sys

import pytest
import torch
from builders.tiny_models import SLIDING_WINDOW, SPECIAL, tiny_model, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.checkpoint.locate import locate
from qtool.checkpoint.reader import TensorReader
from qtool.errors import UnsupportedError
from qtool.evaluation.runners import StreamedModel
from qtool.formats.reading import DenseSource
from qtool.methods.awq import tie_repeated, untie_repeated
from qtool.model import streaming
from qtool.model.family import FAMILIES, family_of
from qtool.model.folding import fold, head_layout, scaled_weights
from qtool.model.skeleton import Skeleton
from qtool.model.streaming import Stream, advance, embedding_path
from qtool.model.trace import BlockCall, final_norm, head_logits, run_watched

CPU = torch.device("cpu")
LENGTH = 33  # more than two sliding windows
# Values that switch a special setting off.
NEUTRAL = {
    "sliding_window": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": 32,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
PAIRS = [
    pytest.param(family, pair, id=f"{family}-{pair.tap}")
    for family in FAMILIES
    for pair in FAMILIES[family].pairs
]


def full_model(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@pytest.fixture(autouse=True)
def _two_windows_at_once(monkeypatch):
    monkeypatch.setattr(streaming, "INTERMEDIATE_BYTES", {"cpu": 2 * LENGTH * 160 * 4})


def stream_logits(directory, ids, spill):
    """The logits of the streaming engine, batch by batch as it runs them."""
    checkpoint = locate(str(directory))
    family = family_of(checkpoint.config)
    skeleton = Skeleton(checkpoint.config, family, dtype=torch.float32, device=CPU)
    with torch.no_grad(), TensorReader(checkpoint.refs) as reader:
        source = DenseSource(checkpoint, reader)
        stream = Stream(skeleton, source, ids, spill)
        for index, block in enumerate(skeleton.blocks):
            path = skeleton.block_prefix(index).removesuffix(".")
            skeleton.load(path, source)
            advance(stream, stream.hidden, block, index)
            skeleton.drop(path)
        skeleton.load(final_norm(family), source)
        embeddings = f"{embedding_path(skeleton)}.weight"
        head = f"{family.head}.weight"
        weight = source.read(head if head in source else embeddings)
        skeleton.assign(skeleton.model.get_submodule(family.head), {"weight": weight})
        return [head_logits(skeleton, hidden) for hidden in stream.hidden]


def test_every_family_has_a_tiny_model():
    assert set(SPECIAL) == set(FAMILIES)


def test_texts_are_longer_than_the_sliding_windows():
    assert LENGTH > 2 * SLIDING_WINDOW


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_the_full_models_bit_by_bit(family, tied, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=1, layers=3, tied=tied)
    ids = token_ids(5, LENGTH, seed=2)
    streamed = stream_logits(directory, ids, tmp_path)
    model = full_model(directory)
    assert [len(batch) for batch in streamed] == [2, 2, 1]
    with torch.no_grad():
        for batch, expected in zip(streamed, ids.split(2), strict=True):
            assert torch.equal(batch, model(expected).logits)


VARIANTS = {
    "biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one key-value head": ("llama", {"num_key_value_heads": 1}),
    "no shared heads": ("llama", {"num_key_value_heads": 4}),
    "llama 3 positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "positions that depend on the length": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            "max_position_embeddings": 16,
        },
    ),
    "long phi": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0 + i / 4 for i in range(8)],
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings": 16,
        },
    ),
    "granite with biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_logits_equal_the_full_models_in_variants_of_a_family(variant, tmp_path):
    family, settings = VARIANTS[variant]
    directory = tiny_model(family, tmp_path / "model", seed=1, layers=2, **settings)
    ids = token_ids(3, LENGTH, seed=2)
    streamed = stream_logits(directory, ids, tmp_path)
    model = full_model(directory)
    with torch.no_grad():
        for batch, expected in zip(streamed, ids.split(2), strict=True):
            assert torch.equal(batch, model(expected).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_gives_the_full_models_logits_window_by_window(family, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=3, layers=2, dtype=torch.bfloat16)
    ids = token_ids(3, LENGTH, seed=4)
    streamed = StreamedModel(locate(str(directory)), ids, CPU, torch.float32, tmp_path)
    got = torch.stack(list(streamed.logits()))
    with torch.no_grad():
        expected = full_model(directory)(ids).logits
    # The head runs on one window at a time here, and on three there: sums in another order.
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "key"),
    [(family, key) for family in FAMILIES for key in SPECIAL[family] if key in NEUTRAL],
)
def test_the_tiny_models_special_settings_change_their_logits(family, key, tmp_path):
    """So the comparisons above would fail if the engine ignored what makes a family special."""
    directory = tiny_model(family, tmp_path / "model", seed=1, layers=2)
    neutral = AutoConfig.from_pretrained(directory)
    setattr(neutral, key, NEUTRAL[key])
    without = AutoModelForCausalLM.from_pretrained(directory, config=neutral, dtype=torch.float32)
    ids = token_ids(1, LENGTH, seed=2)
    with torch.no_grad():
        assert (full_model(directory)(ids).logits - without(ids).logits).abs().max() > 0.01


def linear_inputs(model, block):
    """(name, input) of each linear of a block, in the order in which they run."""
    names = {module: name for name, module in block.named_modules()}
    seen = []

    def hook(module, arguments):
        seen.append((names[module], arguments[0]))

    linears = [module for module in names if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(hook) for module in linears]
    with torch.no_grad():
        model(token_ids(2, LENGTH), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linears_of_a_tap_read_one_tensor_and_run_in_order(family, tmp_path):
    model = full_model(tiny_model(family, tmp_path / "model", layers=2))
    known = FAMILIES[family]
    for block in model.get_submodule(known.blocks):
        seen = linear_inputs(model, block)
        inputs = dict(seen)
        assert [name for name, _ in seen] == [name for tap in known.taps for name in tap.linears]
        for tap in known.taps:
            assert all(inputs[name] is inputs[tap.linears[0]] for name in tap.linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_matrix_of_a_block_stands_outside_the_taps(family, tmp_path):
    model = full_model(tiny_model(family, tmp_path / "model", layers=1))
    known = FAMILIES[family]
    block = model.get_submodule(f"{known.blocks}.0")
    matrices = {name for name, p in block.named_parameters() if p.dim() > 1}
    listed = [f"{linear}.weight" for tap in known.taps for linear in tap.linears]
    assert matrices == set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_pairs_name_taps_and_modules_that_exist(family, tmp_path):
    model = full_model(tiny_model(family, tmp_path / "model", layers=1))
    known = FAMILIES[family]
    block = model.get_submodule(f"{known.blocks}.0")
    for pair in known.pairs:
        assert known.tap(pair.tap).name == pair.tap
        is_linear = isinstance(block.get_submodule(pair.previous), nn.Linear)
        assert is_linear == (pair.kind == "linear")
    assert model.get_submodule(known.head) is model.get_output_embeddings()


def block_and_call(directory, index):
    """A block of the full model in float64, its input and the arguments it is called with."""
    model = full_model(directory, torch.float64)
    family = FAMILIES[model.config.model_type]
    block = model.get_submodule(f"{family.blocks}.{index}")
    recorded = []
    handle = block.register_forward_pre_hook(
        lambda _, arguments, keywords: recorded.append((arguments, keywords)), with_kwargs=True
    )
    with torch.no_grad():
        model(token_ids(2, LENGTH, seed=5), use_cache=False)
    handle.remove()
    (hidden, *arguments), keywords = recorded[0]
    return model.config, block, hidden, BlockCall(tuple(arguments), keywords)


def watched(block, family, hidden, call):
    """The block's output, and what each tap reads."""
    inputs = {}
    with torch.no_grad():
        output = run_watched(
            block, family.taps, hidden, call, lambda tap, seen: inputs.update({tap.name: seen})
        )
    return output, inputs


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("family", "pair"), PAIRS)
def test_a_scale_pair_leaves_the_block_function_unchanged(family, pair, stored, tmp_path):
    known = FAMILIES[family]
    directory = tiny_model(family, tmp_path / "model", seed=6, dtype=stored, layers=2)
    config, block, hidden, call = block_and_call(directory, 1)
    expected, before = watched(block, known, hidden, call)
    tensors = {name: value.to(stored) for name, value in block.state_dict().items()}
    kept = {name: value.clone() for name, value in tensors.items()}
    columns = tensors[scaled_weights(known.tap(pair.tap))[0]].shape[1]
    draw = torch.Generator().manual_seed(7)
    head, repeats = head_layout(config, pair)
    scale = tie_repeated(torch.exp(torch.randn(columns, generator=draw)), head, repeats)

    changed, effective = fold(tensors, known, pair, scale, untie_repeated(scale, head, repeats))

    assert all(torch.equal(tensors[name], kept[name]) for name in tensors)
    assert all(changed[name].shape == tensors[name].shape for name in changed)
    if pair.kind == "norm":
        assert changed[f"{pair.previous}.weight"].dtype == stored
    block.load_state_dict({n: v.double() for n, v in changed.items()}, strict=False, assign=True)
    output, after = watched(block, known, hidden, call)
    # Weights are folded in float32, and a norm's rounding to its stored dtype is made up for; only
    # the bias of a scaled linear is rounded once more.
    rounds_bias = pair.kind == "linear" and f"{pair.previous}.bias" in tensors
    tolerance = 2e-2 if rounds_bias and stored == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    divided = before[pair.tap] / effective.double()
    torch.testing.assert_close(after[pair.tap], divided, atol=tolerance, rtol=tolerance)
    # The scale that was asked for, but for the rounding of norm weights: with an offset of one, a
    # small weight keeps few of its bits.
    rounding = 0.2 if stored == torch.bfloat16 else 1e-3
    torch.testing.assert_close(effective, scale, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_scale_pairs_together_leave_the_block_function_unchanged(family, stored, tmp_path):
    directory = tiny_model(family, tmp_path / "model", seed=8, dtype=stored, layers=1)
    check_all_pairs(directory, FAMILIES[family], stored)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_scale_pairs_of_a_variant_leave_the_block_function_unchanged(variant, tmp_path):
    family, settings = VARIANTS[variant]
    directory = tiny_model(family, tmp_path / "model", seed=8, layers=1, **settings)
    check_all_pairs(directory, FAMILIES[family], torch.float32)


def check_all_pairs(directory, known, stored):
    config, block, hidden, call = block_and_call(directory, 0)
    expected, _ = watched(block, known, hidden, call)
    tensors = {name: value.to(stored) for name, value in block.state_dict().items()}
    draw = torch.Generator().manual_seed(9)
    for pair in known.pairs:
        columns = tensors[scaled_weights(known.tap(pair.tap))[0]].shape[1]
        head, repeats = head_layout(config, pair)
        scale = tie_repeated(torch.exp(torch.randn(columns, generator=draw)), head, repeats)
        changed, _ = fold(tensors, known, pair, scale, untie_repeated(scale, head, repeats))
        tensors.update(changed)
    block.load_state_dict({n: v.double() for n, v in tensors.items()}, strict=False, assign=True)
    output, _ = watched(block, known, hidden, call)
    has_bias = any(name.endswith("bias") for name in tensors)
    tolerance = 2e-2 if has_bias and stored == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)


def test_a_norm_channel_of_zero_is_left_alone():
    family = FAMILIES["gemma2"]
    pair = family.pairs[0]
    tensors = {
        "input_layernorm.weight": torch.tensor([-1.0, 0.5, 0.0, 1.0]),  # 1 + weight: 0, 1.5, 1, 2
        **{name: torch.ones(3, 4) for name in scaled_weights(family.tap(pair.tap))},
    }
    scale = torch.tensor([2.0, 4.0, 0.5, 1.0])
    changed, effective = fold(tensors, family, pair, scale, scale)
    assert changed["input_layernorm.weight"].tolist() == [-1.0, -0.625, 1.0, 1.0]
    assert effective.tolist() == [1.0, 4.0, 0.5, 1.0]
    assert changed["self_attn.q_proj.weight"][0].tolist() == [1.0, 4.0, 0.5, 1.0]


MIXTURES = [
    {"model_type": "mixtral", "num_local_experts": 8},
    {"model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 768},
    {"model_type": "deepseek_v3", "n_routed_experts": 256},
]


@pytest.mark.parametrize("config", MIXTURES, ids=lambda c: c["model_type"])
def test_a_mixture_of_experts_is_refused_with_what_is_supported(config):
    with pytest.raises(UnsupportedError) as caught:
        family_of(config)
    assert caught.value.exit_code == 5
    assert "mixture of experts" in caught.value.message
    assert config["model_type"] in caught.value.message
    assert all(family in caught.value.hint for family in FAMILIES)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "Llama", "", None])
def test_an_unknown_model_type_is_refused_with_what_is_supported(model_type):
    with pytest.raises(UnsupportedError) as caught:
        family_of({"model_type": model_type} if model_type is not None else {})
    assert caught.value.exit_code == 5
    assert all(family in caught.value.hint for family in FAMILIES)


def test_families_are_looked_up_without_torch_or_transformers():
    program = (
        "import sys\n"
        "from qtool.model.family import FAMILIES\n"
        "assert all(FAMILIES[name].model_type == name for name in FAMILIES)\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
