"""Caches hold what the published formulas and llama.cpp's logs say; every number by hand."""

import pytest

from qtool.errors import UsageError
from qtool.memory.cache import (
    CACHE_TYPES,
    CacheSettings,
    block_bytes,
    cache_bytes,
    cache_parts,
    cache_type_named,
    check_context,
    padded,
)
from qtool.memory.shape import BlockCache, ModelShape

MIB = 1 << 20
FULL = BlockCache(keys=1024, values=1024)  # Llama 3 8B: 8 heads of 128


def shape(*cache, context=131072):
    return ModelShape(
        "Made", "llama", len(cache), 4096, 32, 8, 128, 1000, context, (), tuple(cache)
    )


def test_llama_3_8b_takes_a_gibibyte_for_8192_tokens():
    assert cache_bytes(shape(*[FULL] * 32), CacheSettings(8192)) == 1024 * MIB


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("f32", 32), ("f16", 16), ("bf16", 16), ("q8_0", 8.5), ("q5_1", 6), ("q5_0", 5.5),
        ("q4_1", 5), ("q4_0", 4.5), ("fp8", 8),
    ],
)  # fmt: skip
def test_every_type_has_its_bits(kind, bits):
    settings = CacheSettings(256, key_type=kind, value_type=kind)
    assert cache_bytes(shape(FULL), settings) == 256 * 2048 * bits / 8
    assert set(CACHE_TYPES) == {
        "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "fp8",
    }  # fmt: skip


def test_keys_and_values_may_differ_in_type():
    settings = CacheSettings(256, key_type="q8_0", value_type="f16")
    assert cache_bytes(shape(FULL), settings) == 256 * (1024 * 34 // 32 + 2048)


@pytest.mark.parametrize(("tokens", "cells"), [(1, 256), (256, 256), (257, 512), (1000, 1024)])
def test_contexts_are_rounded_up_to_256(tokens, cells):
    assert padded(tokens) == cells
    assert cache_bytes(shape(FULL), CacheSettings(tokens)) == cells * 4096


def test_the_latent_of_deepseek_v3_takes_70272_bytes_a_token():
    latent = BlockCache(keys=512 + 64)
    model = shape(*[latent] * 61)
    assert cache_bytes(model, CacheSettings(256)) == 70272 * 256
    assert cache_bytes(model, CacheSettings(4096)) == 70272 * 4096


def test_windows_hold_the_window_and_what_is_computed_at_once():
    window = BlockCache(keys=2048, values=2048, window=1024)
    token = 8192
    assert block_bytes(window, CacheSettings(32768)) == (1024 + 512) * token
    # Each slot has its own cells; in one pool only the windows multiply.
    assert block_bytes(window, CacheSettings(8192, sequences=4)) == 4 * 1536 * token
    pool = CacheSettings(8192, sequences=4, unified=True)
    assert block_bytes(window, pool) == (4 * 1024 + 512) * token
    assert block_bytes(window, CacheSettings(512)) == 512 * token  # never more than the context
    assert block_bytes(window, CacheSettings(32768, whole_windows=True)) == 32768 * token


def test_a_window_of_128_is_padded():
    assert block_bytes(BlockCache(8, 8, window=128), CacheSettings(4096)) == 768 * 32


def test_states_are_constant_and_in_float32():
    # Qwen3.5 27B: 48 of 64 blocks, convolution of 4 over 6144 + 2 x 16 x 128, state 128 x 6144.
    state = 3 * (6144 + 2 * 16 * 128) + 128 * 6144
    model = shape(*[BlockCache(state=state)] * 48)
    short, long = CacheSettings(256), CacheSettings(65536, key_type="q4_0", value_type="q4_0")
    assert cache_bytes(model, short) == cache_bytes(model, long)
    assert cache_bytes(model, short) / MIB == pytest.approx(149.6, abs=0.05)
    assert cache_bytes(model, CacheSettings(256, sequences=3)) == 3 * cache_bytes(model, short)


def test_blocks_that_share_keep_nothing():
    lender = BlockCache(1024, 1024)
    sharing = BlockCache(1024, 1024, shared=True)
    settings = CacheSettings(4096)
    assert cache_bytes(shape(lender, sharing), settings) == cache_bytes(shape(lender), settings)


def test_parts_add_up_and_say_how_many_blocks():
    window = BlockCache(1024, 1024, window=512)
    mixed = shape(*[window] * 5, FULL, BlockCache(state=99), BlockCache(1, 1, shared=True))
    settings = CacheSettings(8192, sequences=2)
    parts = cache_parts(mixed, settings)
    assert sum(part.n_bytes for part in parts) == cache_bytes(mixed, settings)
    assert [part.blocks for part in parts] == [5, 1, 1, 1]
    assert parts[0].cells == 2 * 1024


def test_sequences_multiply_and_nothing_else_does():
    one = cache_bytes(shape(FULL), CacheSettings(1024))
    assert cache_bytes(shape(FULL), CacheSettings(1024, sequences=7)) == 7 * one


def test_a_row_that_blocks_do_not_divide_is_refused():
    with pytest.raises(UsageError, match="the 80 that the model keeps"):
        cache_bytes(shape(BlockCache(80, 80)), CacheSettings(256, key_type="q8_0"))


@pytest.mark.parametrize(("given", "name"), [("F16", "f16"), ("FP8_E4M3", "fp8"), ("fp16", "f16")])
def test_names_of_types_are_recognised(given, name):
    assert cache_type_named(given) == name


def test_unknown_types_and_absurd_contexts_are_refused():
    with pytest.raises(UsageError, match="unknown cache type"):
        cache_type_named("q3_k")
    for context in (0, -1, 1 << 33):
        with pytest.raises(UsageError, match="absurd"):
            check_context(context)
