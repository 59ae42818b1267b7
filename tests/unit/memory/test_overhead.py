"""Overheads are the figures that logs show, and every part says whether it is exact."""

import pytest

from qtool.memory.cache import CacheSettings
from qtool.memory.catalogue import find_shape
from qtool.memory.fine_tuning import qlora_parts
from qtool.memory.overhead import Range, engine_of, overhead, total

MIB, GIB = 1 << 20, 1 << 30


def part(parts, name):
    return next(part for part in parts if part.name == name)


@pytest.mark.parametrize(
    ("model", "mebibytes"),
    [("llama-3-8b", 258.5), ("qwen2.5-3b", 300.75), ("qwen2.5-7b", 304.0)],
)
def test_compute_buffers_are_those_of_logs(model, mebibytes):
    shape = find_shape(model).shape
    buffer = part(overhead(shape, CacheSettings(8192), "llama.cpp"), "compute buffer")
    assert buffer.size.likely == mebibytes * MIB
    assert buffer.size.low <= buffer.size.likely <= buffer.size.high


def test_the_mask_of_a_long_context_outgrows_the_logits():
    shape = find_shape("llama-3.2-1b").shape
    short, long = (
        part(overhead(shape, CacheSettings(n), "llama.cpp"), "compute buffer").size.likely
        for n in (8192, 1 << 20)
    )
    assert long > 2 * short


def test_a_context_lies_on_every_card_and_a_buffer_on_one():
    shape = find_shape("llama-3-8b").shape
    one, four = (overhead(shape, CacheSettings(512), "llama.cpp", devices=n) for n in (1, 4))
    assert part(four, "GPU context").size.likely == 4 * part(one, "GPU context").size.likely
    assert part(four, "compute buffer") == part(one, "compute buffer")
    none = overhead(shape, CacheSettings(512), "llama.cpp", devices=0)
    assert [p.name for p in none] == ["compute buffer"]


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "transformers"])
@pytest.mark.parametrize("model", ["llama-3-8b", "deepseek-v3", "gemma-3-12b"])
def test_figures_are_in_order_and_explained(engine, model):
    parts = overhead(find_shape(model).shape, CacheSettings(16384), engine)
    assert all(p.size.low <= p.size.likely <= p.size.high for p in parts)
    assert all(p.why for p in parts)
    assert all(p.size.low == p.size.high for p in parts if p.exact)


def test_latent_attention_makes_prefills_large():
    shape = find_shape("deepseek-v3").shape
    buffer = part(overhead(shape, CacheSettings(65536), "llama.cpp"), "compute buffer")
    assert buffer.size.low == pytest.approx(3.6 * GIB, rel=0.15)
    assert buffer.size.high == pytest.approx(19.9 * GIB, rel=0.05)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("gguf:Q4_K_M", "llama.cpp"),
        ("gptq:4:128", "vllm"),
        ("compressed-tensors:8:-1", "vllm"),
        ("fp8", "vllm"),
        ("bf16", "vllm"),
        ("nf4-dq", "transformers"),
        ("bitsandbytes", "transformers"),
        ("fp32", "transformers"),
    ],
)
def test_formats_have_their_engine(name, engine):
    assert engine_of(name) == engine


def test_sums_of_ranges():
    assert Range(1, 2, 3) + Range.known(10) == Range(11, 12, 13)
    assert total(()) == Range(0, 0, 0)


def test_logits_dominate_what_training_takes_at_large_vocabularies():
    parts = qlora_parts(find_shape("llama-3-8b").shape, 2048, 1)
    logits = part(parts, "logits and their gradient")
    assert logits.size.likely == 2048 * 128256 * 10  # 2.6 GB
    twice = qlora_parts(find_shape("llama-3-8b").shape, 2048, 2)
    assert part(twice, logits.name).size.likely == 2 * logits.size.likely
    assert all(p.size.low <= p.size.likely <= p.size.high for p in parts)


def test_adapters_have_two_thin_matrices_for_each_linear():
    adapters = part(
        qlora_parts(find_shape("llama-3-8b").shape, 512, 1), "adapters, gradients and optimizer"
    )
    # q and o 4096 -> 4096, k and v 4096 -> 1024, gate, up and down 4096 <-> 14336; rank 16.
    ends = 2 * 8192 + 2 * 5120 + 3 * 18432
    assert adapters.size.likely == 32 * ends * 16 * 16
