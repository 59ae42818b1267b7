"""The types of llama-quantize b11549, written out by hand, and sizes of published files."""

import math
from collections import Counter
from itertools import pairwise

import pytest

from qtool.errors import UnsupportedError, UsageError
from qtool.formats.gguf_mixes import (
    FILE_TYPES,
    ModelFacts,
    TensorShape,
    bits_per_weight,
    fallback_warning,
    file_type_named,
    needs_importance,
    tensor_types,
)
from qtool.ggml_types import GGML_TYPES

MORE_BITS_OF_32 = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}


def model(
    *,
    layers=32,
    hidden=256,
    heads=32,
    kv=8,
    head_dim=None,
    inter=512,
    vocab=1000,
    tied=False,
    experts=0,
    fused=False,
    bias=False,
    norms=("attn_norm", "ffn_norm"),
    rope_freqs=0,
    architecture="llama",
):
    """The tensors and facts of a decoder."""
    head_dim = head_dim or hidden // heads
    shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        shapes["output.weight"] = (vocab, hidden)
    if rope_freqs:
        shapes["rope_freqs.weight"] = (rope_freqs,)
    for block in range(layers):
        sizes = {"q": heads * head_dim, "k": kv * head_dim, "v": kv * head_dim}
        inner = {f"{norm}.weight": (hidden,) for norm in norms}
        if fused:
            inner["attn_qkv.weight"] = (sum(sizes.values()), hidden)
        else:
            inner |= {f"attn_{part}.weight": (rows, hidden) for part, rows in sizes.items()}
        if bias:
            inner |= {f"attn_{part}.bias": (rows,) for part, rows in sizes.items()}
        inner["attn_output.weight"] = (hidden, heads * head_dim)
        stack, tail = ((experts,), "_exps") if experts else ((), "")
        if experts:
            inner["ffn_gate_inp.weight"] = (experts, hidden)
        inner[f"ffn_gate{tail}.weight"] = (*stack, inter, hidden)
        inner[f"ffn_up{tail}.weight"] = (*stack, inter, hidden)
        inner[f"ffn_down{tail}.weight"] = (*stack, hidden, inter)
        shapes |= {f"blk.{block}.{name}": shape for name, shape in inner.items()}
    facts = ModelFacts(architecture, layers, heads, kv, experts)
    return [TensorShape(*item) for item in shapes.items()], facts


def chosen(file_type, *, importance=False, asked=None, **shape):
    tensors, facts = model(**shape)
    found = tensor_types(file_type, tensors, facts, importance=importance, **(asked or {}))
    return {name: choice.type for name, choice in found.items()}


def blocks_with(types, part, wanted):
    """The blocks in which a part has a type."""
    names = [name for name, kind in types.items() if f".{part}." in name and kind == wanted]
    return {int(name.split(".")[1]) for name in names}


def by_block(types, part):
    """The runs of types of a part over all blocks: [(type, length), ...]."""
    names = sorted((n for n in types if f".{part}." in n), key=lambda n: int(n.split(".")[1]))
    kinds = [types[name] for name in names]
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(kinds)) if a != b]
    edges = [0, *ends, len(kinds)]
    return [(kinds[start], stop - start) for start, stop in pairwise(edges)]


@pytest.mark.parametrize(("file_type", "base"), [("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")])
def test_values_and_down_projections_of_half_the_blocks_get_six_bits(file_type, base):
    types = chosen(file_type)
    for part in ("attn_v", "ffn_down"):
        assert blocks_with(types, part, "Q6_K") == MORE_BITS_OF_32
        assert blocks_with(types, part, base) == set(range(32)) - MORE_BITS_OF_32
    for part in ("attn_q", "attn_k", "attn_output", "ffn_up", "ffn_gate"):
        assert by_block(types, part) == [(base, 32)]


# (file type, importance, sharing) -> runs of attn_v, attn_output, ffn_down in 32 blocks
RUNS = [
    ("Q8_0", False, 4, [("Q8_0", 32)], "Q8_0", [("Q8_0", 32)]),
    ("Q6_K", False, 4, [("Q6_K", 32)], "Q6_K", [("Q6_K", 32)]),
    ("Q5_K_S", False, 4, [("Q5_K", 32)], "Q5_K", [("Q5_K", 32)]),
    ("Q4_K_S", False, 4, [("Q5_K", 4), ("Q4_K", 28)], "Q4_K", [("Q5_K", 4), ("Q4_K", 28)]),
    ("Q3_K_L", False, 4, [("Q5_K", 32)], "Q5_K", [("Q5_K", 32)]),
    ("Q3_K_M", False, 4, [("Q5_K", 2), ("Q4_K", 30)], "Q4_K", [("Q5_K", 2), ("Q4_K", 30)]),
    ("Q3_K_S", False, 4, [("Q3_K", 32)], "Q3_K", [("Q3_K", 32)]),
    ("Q2_K", False, 4, [("Q4_K", 32)], "Q3_K", [("Q3_K", 32)]),
    ("Q2_K", True, 3, [("Q3_K", 32)], "Q3_K", [("Q3_K", 32)]),
    ("Q2_K_S", True, 8, [("Q4_K", 32)], "Q2_K", [("Q4_K", 4), ("Q2_K", 28)]),
    ("Q2_K_S", True, 2, [("Q2_K", 32)], "Q2_K", [("Q4_K", 4), ("Q2_K", 28)]),
    ("Q4_0", False, 4, [("Q4_0", 32)], "Q4_0", [("Q4_0", 32)]),
    ("Q4_0", True, 4, [("Q4_0", 32)], "Q4_0", [("Q4_1", 4), ("Q4_0", 28)]),
    ("Q5_0", False, 4, [("Q5_0", 32)], "Q5_0", [("Q5_0", 32)]),
    ("Q5_0", True, 4, [("Q5_0", 32)], "Q5_0", [("Q5_1", 4), ("Q5_0", 28)]),
    ("Q4_1", True, 4, [("Q4_1", 32)], "Q4_1", [("Q4_1", 32)]),
    ("Q5_1", True, 4, [("Q5_1", 32)], "Q5_1", [("Q5_1", 32)]),
    ("IQ4_XS", False, 4, [("Q5_K", 32)], "IQ4_XS", [("Q5_K", 4), ("IQ4_XS", 28)]),
    ("IQ4_XS", True, 1, [("IQ4_XS", 32)], "IQ4_XS", [("IQ4_XS", 32)]),
    ("IQ4_NL", False, 2, [("IQ4_NL", 32)], "IQ4_NL", [("Q5_K", 4), ("IQ4_NL", 28)]),
    ("IQ4_NL", True, 8, [("Q5_K", 32)], "IQ4_NL", [("IQ4_NL", 32)]),
    ("IQ3_M", True, 1, [("Q4_K", 32)], "Q4_K", [("Q4_K", 4), ("IQ3_S", 28)]),
    ("IQ3_XXS", True, 1, [("IQ3_XXS", 32)], "IQ3_S", [("IQ3_XXS", 32)]),
    ("IQ3_XXS", False, 1, [("IQ3_S", 32)], "IQ3_S", [("Q4_K", 4), ("Q3_K", 28)]),
    ("IQ2_M", True, 1, [("IQ3_S", 32)], "IQ3_S", [("IQ3_S", 4), ("IQ2_S", 28)]),
    ("IQ2_XS", True, 4, [("Q4_K", 32)], "IQ2_XS", [("Q2_K", 4), ("IQ2_XS", 28)]),
    ("IQ1_M", True, 1, [("Q2_K", 32)], "IQ2_XXS", [("Q2_K", 4), ("IQ1_M", 28)]),
    ("TQ2_0", False, 4, [("TQ2_0", 32)], "TQ2_0", [("TQ2_0", 32)]),
]


@pytest.mark.parametrize(("file_type", "importance", "sharing", "values", "output", "down"), RUNS)
def test_each_part_has_the_types_of_its_file_type(
    file_type, importance, sharing, values, output, down
):
    types = chosen(file_type, importance=importance, heads=sharing, kv=1, head_dim=256)
    assert by_block(types, "attn_v") == values
    assert by_block(types, "attn_output") == [(output, 32)]
    assert by_block(types, "ffn_down") == down


def test_the_middle_blocks_of_iq3_xs_have_smaller_gates():
    types = chosen("IQ3_XS", importance=True)
    for part in ("ffn_gate", "ffn_up"):
        assert by_block(types, part) == [("IQ3_S", 4), ("IQ3_XXS", 24), ("IQ3_S", 4)]
    assert by_block(types, "attn_q") == by_block(types, "attn_k") == [("IQ3_XXS", 32)]


@pytest.mark.parametrize(
    ("file_type", "head", "embeddings"),
    [
        ("Q8_0", "Q8_0", "Q8_0"),
        ("Q4_K_M", "Q6_K", "Q4_K"),
        ("Q4_0", "Q6_K", "Q4_0"),
        ("Q5_1", "Q6_K", "Q5_1"),
        ("IQ4_NL", "Q6_K", "IQ4_NL"),
        ("Q2_K", "Q6_K", "Q2_K"),
        ("IQ3_XXS", "Q5_K", "IQ3_S"),
        ("IQ2_S", "Q5_K", "IQ3_S"),
        ("IQ1_S", "Q5_K", "Q2_K"),
        ("TQ1_0", "Q6_K", "Q4_K"),
        ("BF16", "BF16", "BF16"),
    ],
)
def test_shared_embeddings_get_the_heads_type_and_others_their_own(file_type, head, embeddings):
    apart = chosen(file_type, importance=True, layers=1)
    assert (apart["output.weight"], apart["token_embd.weight"]) == (head, embeddings)
    assert chosen(file_type, importance=True, layers=1, tied=True)["token_embd.weight"] == head


def test_a_fused_projection_is_treated_like_values():
    types = chosen("Q4_K_M", fused=True, architecture="phi3")
    assert blocks_with(types, "attn_qkv", "Q6_K") == MORE_BITS_OF_32
    assert by_block(chosen("Q3_K_M", fused=True), "attn_qkv") == [("Q5_K", 2), ("Q4_K", 30)]


@pytest.mark.parametrize(
    ("file_type", "output", "down"),
    [
        ("Q2_K", "Q5_K", {"Q3_K": 32}),
        ("Q3_K_L", "Q3_K", {"Q5_K": 32}),
        ("Q4_K_M", "Q5_K", {"Q6_K": 16, "Q4_K": 16}),
        ("Q5_K_M", "Q5_K", {"Q6_K": 16, "Q5_K": 16}),
        ("Q6_K", "Q6_K", {"Q6_K": 32}),
        ("IQ4_XS", "Q5_K", {"Q5_K": 4, "IQ4_XS": 28}),
    ],
)
def test_eight_experts_have_attention_of_more_bits(file_type, output, down):
    types = chosen(file_type, experts=8)
    assert by_block(types, "attn_v") == by_block(types, "attn_k") == [("Q8_0", 32)]
    assert by_block(types, "attn_output") == [(output, 32)]
    assert Counter(k for n, k in types.items() if "ffn_down_exps" in n) == down
    assert by_block(types, "ffn_gate_inp") == [("F32", 32)]


def test_other_numbers_of_experts_are_nothing_special():
    types = chosen("Q4_K_M", experts=16)
    assert blocks_with(types, "attn_v", "Q6_K") == MORE_BITS_OF_32
    assert by_block(types, "attn_k") == by_block(types, "attn_output") == [("Q4_K", 32)]


def test_shared_experts_of_a_block_have_that_blocks_type():
    """A running count would give the second tensor of block 3 the place of block 7."""
    tensors, facts = model(experts=16)
    tensors += [TensorShape(f"blk.{b}.ffn_down_shexp.weight", (256, 512)) for b in range(32)]
    found = tensor_types("Q4_K_M", tensors, facts, importance=False)
    types = {name: choice.type for name, choice in found.items()}
    for part in ("ffn_down_exps", "ffn_down_shexp"):
        assert blocks_with(types, part, "Q6_K") == MORE_BITS_OF_32


@pytest.mark.parametrize(
    ("architecture", "blocks", "kv", "grows"),
    [
        ("llama", 80, 8, True),
        ("llama", 80, 64, False),
        ("qwen2", 80, 64, True),
        ("llama", 64, 8, False),
        ("qwen3", 80, 8, False),
        ("jais2", 68, 64, True),
    ],
)
def test_models_of_70_billion_parameters_have_larger_values(architecture, blocks, kv, grows):
    shape = {"layers": blocks, "heads": 64, "kv": kv, "architecture": architecture}
    assert by_block(chosen("Q3_K_S", **shape), "attn_v") == [("Q5_K" if grows else "Q3_K", blocks)]
    raised = blocks_with(chosen("Q4_K_M", **shape), "attn_v", "Q4_K")
    assert bool(raised) != grows


def test_falcon_has_its_own_down_projections():
    types = chosen("Q4_K_M", architecture="falcon")
    assert blocks_with(types, "ffn_down", "Q6_K") == {0, 1}
    assert blocks_with(types, "ffn_down", "Q5_K") == MORE_BITS_OF_32 - {0, 1}
    assert types["output.weight"] == "Q8_0"
    assert by_block(chosen("Q3_K_M", architecture="falcon"), "attn_output") == [("Q3_K", 32)]
    assert by_block(chosen("Q4_K_S", architecture="falcon"), "ffn_down") == [("Q4_K", 32)]


SMOLLM2_135M = {
    "layers": 30,
    "hidden": 576,
    "heads": 9,
    "kv": 3,
    "inter": 1536,
    "vocab": 49152,
    "tied": True,
}


def test_rows_that_blocks_do_not_divide_get_the_substitutes_of_llama_cpp():
    """SmolLM2-135M: its rows of 576 weights are no whole blocks of 256."""
    types = chosen("Q4_K_M", **SMOLLM2_135M)
    assert Counter(types.values()) == {"Q5_0": 166, "Q8_0": 15, "Q4_K": 16, "Q6_K": 14, "F32": 61}
    assert types["token_embd.weight"] == "Q8_0"


def test_the_warning_says_how_many_tensors_fell_back_and_what_that_costs():
    tensors, facts = model(**SMOLLM2_135M)
    found = tensor_types("Q4_K_M", tensors, facts, importance=False)
    assert fallback_warning(found, tensors) == (
        "180 of 211 tensors have rows that 256 does not divide and fall back "
        "(Q4_K -> Q5_0, Q6_K -> Q8_0): 6.17 bits per weight instead of 5.15"
    )
    assert bits_per_weight(found, tensors) == pytest.approx(6.1655, abs=1e-4)
    tensors, facts = model(layers=1)
    assert (
        fallback_warning(tensor_types("Q4_K_M", tensors, facts, importance=False), tensors) is None
    )


@pytest.mark.parametrize(
    ("wanted", "columns", "stored"),
    [
        ("Q4_K", 96, "Q5_0"),
        ("Q5_K", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q2_K", 96, "Q4_0"),
        ("Q3_K", 96, "Q4_0"),
        ("TQ1_0", 96, "Q4_0"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("IQ1_S", 96, "IQ4_NL"),
        ("IQ3_S", 96, "IQ4_NL"),
        ("Q4_K", 80, "F16"),
        ("Q8_0", 80, "F16"),
        ("F16", 80, "F16"),
        ("Q4_K", 512, "Q4_K"),
    ],
)
def test_a_fallback_is_marked_and_keeps_what_was_wanted(wanted, columns, stored):
    tensors = [TensorShape("blk.0.ffn_up.weight", (8, columns))]
    overrides = [("*", wanted)]
    found = tensor_types(
        "Q8_0", tensors, ModelFacts("llama", 1, 1, 1), importance=False, overrides=overrides
    )["blk.0.ffn_up.weight"]
    assert (found.type, found.wanted, found.fallback) == (stored, wanted, stored != wanted)


@pytest.mark.parametrize(
    ("name", "shape", "kept", "stored"),
    [
        ("blk.0.attn_norm.weight", (256,), "BF16", "F32"),
        ("blk.0.attn_q.bias", (256,), "F16", "F32"),
        ("blk.0.attn_q_norm.weight", (4, 64), "F16", "F32"),
        ("blk.0.ffn_gate_inp.weight", (8, 256), "F16", "F32"),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 256), "F16", "F32"),
        ("blk.0.ssm_conv1d.weight", (256, 4), "F16", "F32"),
        ("blk.0.ssm_a", (256, 256), "F16", "F32"),
        ("position_embd.weight", (512, 256), "F16", "F32"),
        ("rope_freqs.weight", (64,), "F16", "F32"),
        ("blk.0.laurel_l.weight", (64, 256), "F16", "F16"),
        ("blk.0.attn_rel_b.weight", (32, 8), "BF16", "BF16"),
        ("per_layer_model_proj.weight", (64, 256), "F32", "F32"),
    ],
)
def test_small_and_delicate_tensors_stay_floats(name, shape, kept, stored):
    facts = ModelFacts("llama", 1, 1, 1)
    options = {"importance": True, "overrides": [("*", "Q4_K")], "pure": True, "kept": kept}
    found = tensor_types("Q4_K_M", [TensorShape(name, shape)], facts, **options)[name]
    assert (found.type, found.fallback) == (stored, False)


def test_the_first_override_that_matches_wins_over_pure_and_rules():
    asked = {
        "overrides": [("blk.3.ffn_down", "q8_0"), (r"re:blk\.[0-3]\.", "Q6_K"), ("attn_k", "F16")],
        "pure": True,
    }
    types = chosen("Q4_K_M", asked=asked)
    assert types["blk.3.ffn_down.weight"] == "Q8_0"
    assert types["blk.3.attn_k.weight"] == "Q6_K"
    assert types["blk.4.attn_k.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.30.ffn_down.weight"] == types["output.weight"] == "Q4_K"


def test_overridden_tensors_are_not_counted():
    """llama.cpp counts only tensors its rules decide: the next two values become the first two."""
    types = chosen("Q3_K_M", asked={"overrides": [("re:blk.[01].attn_v", "Q8_0")]})
    assert by_block(types, "attn_v") == [("Q8_0", 2), ("Q5_K", 2), ("Q4_K", 28)]


def test_types_asked_for_head_and_embeddings_win_over_everything():
    asked = {"overrides": [("*", "Q6_K")], "output_type": "F16", "embed_type": "Q4_0"}
    types = chosen("Q4_K_M", asked=asked)
    assert (types["output.weight"], types["token_embd.weight"]) == ("F16", "Q4_0")
    types = chosen("Q4_K_M", tied=True, asked={"output_type": "F16"})
    assert types["token_embd.weight"] == "F16"
    with pytest.raises(UsageError, match=r"token_embd\.weight: rows of 576 weights") as refusal:
        chosen("Q4_K_M", **SMOLLM2_135M, asked={"embed_type": "Q4_K"})
    assert "Q5_0" in refusal.value.hint


def test_types_do_not_depend_on_the_order_of_the_tensors():
    tensors, facts = model(layers=12)
    there = tensor_types("Q3_K_M", tensors, facts, importance=False)
    back = tensor_types("Q3_K_M", tensors[::-1], facts, importance=False)
    assert there == back


@pytest.mark.parametrize("written", ["q4_k_m", "gguf:Q4_K_M", "Q4_K", "gguf:q4_k"])
def test_file_types_are_found_by_any_spelling(written):
    assert file_type_named(written).number == 15


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="unknown GGUF file type 'q4_k_x'") as refusal:
        file_type_named("q4_k_x")
    assert "Q4_K_" in refusal.value.hint
    with pytest.raises(UsageError, match="unknown tensor type 'Q4_X'"):
        chosen("Q4_K_M", asked={"overrides": [("*", "Q4_X")]})
    with pytest.raises(UsageError, match="not a regular expression"):
        chosen("Q4_K_M", asked={"overrides": [("re:(", "Q4_K")]})
    stray = TensorShape("blk.32.ffn_down_exps.weight", (16, 256, 256))
    with pytest.raises(UnsupportedError, match=r"blk\.32\.ffn_down_exps"):
        tensor_types("Q4_K_M", [stray], ModelFacts("llama", 32, 1, 1, 16), importance=False)


def test_numbers_of_file_types_are_those_of_general_file_type():
    assert {name: kind.number for name, kind in FILE_TYPES.items() if kind.writable} == {
        "F32": 0,
        "F16": 1,
        "Q4_0": 2,
        "Q4_1": 3,
        "Q8_0": 7,
        "Q5_0": 8,
        "Q5_1": 9,
        "Q2_K": 10,
        "Q3_K_S": 11,
        "Q3_K_M": 12,
        "Q3_K_L": 13,
        "Q4_K_S": 14,
        "Q4_K_M": 15,
        "Q5_K_S": 16,
        "Q5_K_M": 17,
        "Q6_K": 18,
        "Q2_K_S": 21,
        "IQ4_NL": 25,
        "IQ4_XS": 30,
        "BF16": 32,
    }


def test_importance_is_needed_where_llama_cpp_demands_it():
    needy = {name for name, kind in FILE_TYPES.items() if kind.needs_importance}
    for name in FILE_TYPES:
        tensors, facts = model(layers=16, tied=True)
        found = tensor_types(name, tensors, facts, importance=True)
        lost = [
            tensor for tensor, choice in found.items() if needs_importance(name, tensor, choice)
        ]
        assert bool(lost) == (name in needy), name
        assert "token_embd.weight" not in lost


def padded_bytes(types, tensors):
    """Bytes of the tensors in a file, where each starts at a multiple of 32."""
    sizes = (GGML_TYPES[types[tensor.name].type].n_bytes(tensor.shape) for tensor in tensors)
    return sum(-(-size // 32) * 32 for size in sizes)


# Sizes of published files, made with importance by llama.cpp of 2024, listed at
# https://huggingface.co/<repository>/tree/main. What is not tensors (vocabulary, template, names)
# is the same in all files of a repository: the constant in the last column.
PUBLISHED = {
    "MaziyarPanahi/Mistral-7B-Instruct-v0.3-GGUF": (
        {"hidden": 4096, "inter": 14336, "vocab": 32768},
        {
            "IQ1_M": 1757663392,
            "Q2_K": 2722877600,
            "Q3_K_M": 3522941088,
            "Q4_K_M": 4372811936,
            "Q5_K_M": 5136175264,
            "Q6_K": 5947248800,
            "Q8_0": 7702565024,
        },
        757920,
    ),
    "bartowski/Llama-3.2-1B-Instruct-GGUF": (
        {"layers": 16, "hidden": 2048, "inter": 8192, "vocab": 128256}
        | {"tied": True, "rope_freqs": 32},
        {"IQ3_M": 657289344, "Q4_K_M": 807694464, "Q5_K_M": 911503488, "Q6_K": 1021800576},
        7831552,
    ),
    "bartowski/Qwen2.5-7B-Instruct-GGUF": (
        {"layers": 28, "hidden": 3584, "heads": 28, "kv": 4, "inter": 18944, "vocab": 152064}
        | {"bias": True, "architecture": "qwen2"},
        {
            "Q2_K": 3015940800,
            "Q3_K_M": 3808391872,
            "Q4_K_M": 4683074240,
            "Q5_K_M": 5444831936,
            "Q6_K": 6254199488,
            "Q8_0": 8098525888,
        },
        5954240,
    ),
    "MaziyarPanahi/Mixtral-8x7B-Instruct-v0.1-GGUF": (
        {"hidden": 4096, "inter": 14336, "vocab": 32000, "experts": 8},
        {
            "Q2_K": 17309173632,
            "Q3_K_M": 22544394112,
            "Q4_K_M": 28446410624,
            "Q5_K_M": 33227523968,
            "Q6_K": 38378760064,
            "Q8_0": 49624262528,
        },
        780160 - 32 * 8 * 4096 * 2,  # its 32 routers are F16, as converters wrote them then
    ),
    "bartowski/gemma-2-2b-it-GGUF": (
        {"layers": 26, "hidden": 2304, "heads": 8, "kv": 4, "head_dim": 256, "inter": 9216}
        | {"vocab": 256000, "tied": True, "architecture": "gemma2"}
        | {"norms": ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")},
        {"Q4_K_M": 1708582752, "Q6_K": 2151393120},
        6046560,
    ),
    "bartowski/SmolLM2-135M-Instruct-GGUF": (SMOLLM2_135M, {"Q4_K_M": 105454432}, 1785952),
}


@pytest.mark.parametrize("repository", PUBLISHED)
def test_published_files_have_exactly_the_predicted_sizes(repository):
    shape, files, around = PUBLISHED[repository]
    tensors, facts = model(**shape)
    for file_type, size in files.items():
        types = tensor_types(file_type, tensors, facts, importance=True)
        assert size - padded_bytes(types, tensors) == around, file_type
        weights = sum(math.prod(tensor.shape) for tensor in tensors)
        assert bits_per_weight(types, tensors) == pytest.approx(
            8 * (size - around) / weights, rel=1e-6
        )
