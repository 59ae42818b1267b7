"""Cards have what they report, and answers agree with the sums that they come from."""

import pytest

from qtool.errors import UsageError
from qtool.memory.answers import Estimator, Machine, blocks_held, experts_away, largest
from qtool.memory.cache import CacheSettings, cache_bytes
from qtool.memory.catalogue import find_shape
from qtool.memory.devices import CARDS, SYNONYMS, Devices, devices_named
from qtool.memory.file_sizes import weight_bytes
from qtool.memory.overhead import total

GB, GIB = 10**9, 1 << 30


@pytest.fixture(scope="module")
def llama():
    return find_shape("llama-3.1-8b").shape


# --- cards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count", "n_bytes"),
    [
        ("24GB", 1, 24 * GB),
        ("24GiB", 1, 24 * GIB),
        ("24g", 1, 24 * GB),
        ("2x24GB", 2, 24 * GB),
        ("2 x 24 GB", 2, 24 * GB),
        ("rtx4090", 1, int(24077 / 1024 * GIB)),
        ("4090", 1, int(24077 / 1024 * GIB)),
        ("NVIDIA GeForce RTX 4090", 1, int(24077 / 1024 * GIB)),
        ("rtx-4090", 1, int(24077 / 1024 * GIB)),
        ("2xrtx4090", 2, int(24077 / 1024 * GIB)),
        ("8xH100", 8, int(79.10 * GIB)),
        ("a100-40gb", 1, int(40441 / 1024 * GIB)),
        ("a100", 1, int(79.14 * GIB)),
        ("m3max-64gb", 1, 48 * GIB),
        ("apple m2-16gb", 1, 16 * GIB * 2 // 3),
    ],
)
def test_names_and_sizes_of_cards(text, count, n_bytes):
    devices = devices_named(text)
    assert (devices.count, devices.n_bytes) == (count, n_bytes)
    assert devices.total == count * n_bytes
    assert devices.source


@pytest.mark.parametrize(
    "text",
    ["24 bananas", "24", "0x24GB", "99999xh100", "", "x", "2x", "-24GB", "1e9GB", "9999999TB"],
)
def test_what_is_no_card_is_refused_with_examples(text):
    with pytest.raises(UsageError) as caught:
        devices_named(text)
    assert "2x24GB" in caught.value.hint


def test_a_typing_error_names_the_nearest_card():
    with pytest.raises(UsageError) as caught:
        devices_named("rtx4099")
    assert "rtx4090" in caught.value.hint


def test_every_card_has_less_than_its_name_says_and_a_source():
    assert all(0 < gibibytes < 200 and source for gibibytes, source in CARDS.values())
    assert set(SYNONYMS.values()) <= set(CARDS)
    for name, (gibibytes, _) in CARDS.items():
        assert devices_named(name).n_bytes == int(gibibytes * GIB)


# --- fitting ----------------------------------------------------------------------------------


def test_whole_blocks_go_to_cards_last_ones_first():
    cards = Devices("made", 2, 100, "")
    assert blocks_held([30] * 10, cards, once=10, each=10) == 2 + 3
    assert blocks_held([30] * 5, cards, once=10, each=10) == 5
    assert blocks_held([30] * 10, cards, once=91, each=10) == 0  # not even the head


@pytest.mark.parametrize("limit", [0, 1, 255, 256, 257, 5000, 8191, 8192, 9000])
def test_the_largest_context_is_found_by_halving(limit):
    slow = max((n for n in range(0, 8193, 256) if n <= limit), default=0)
    assert largest(lambda n: n <= limit, 8192) == slow


def test_an_odd_limit_of_the_model_is_reached():
    assert largest(lambda n: True, 4100) == 4100
    assert largest(lambda n: n <= 4099, 4100) == 4096


@pytest.mark.parametrize("name", ["gguf:Q8_0", "gptq:4:128", "nf4-dq", "bf16"])
def test_the_largest_context_fits_and_the_next_does_not(llama, name):
    found = weight_bytes(llama, name)
    machine = Machine(devices_named("24GB"))
    longest = Estimator(llama, CacheSettings(4096), machine).answer(found).max_context
    assert 0 < longest < llama.context
    for context, fits in ((longest, True), (longest + 256, False)):
        answer = Estimator(llama, CacheSettings(context), machine).answer(found)
        assert answer.fits is fits
        assert (answer.total_bytes <= machine.devices.total) is fits


def test_totals_are_sums(llama):
    settings = CacheSettings(4096, sequences=3)
    answer = Estimator(llama, settings, Machine()).answer(weight_bytes(llama, "gguf:Q6_K"))
    assert answer.kv_bytes == cache_bytes(llama, settings)
    assert answer.total_bytes == (
        answer.format.weights_bytes + answer.kv_bytes + total(answer.overhead).likely
    )
    assert (answer.fits, answer.max_context, answer.blocks_on_devices) == (None, None, None)


def test_what_does_not_fit_says_how_many_blocks_would():
    shape = find_shape("llama-3.3-70b").shape
    found = weight_bytes(shape, "gguf:Q4_K_M")
    card = Machine(devices_named("24GB"))
    answer = Estimator(shape, CacheSettings(8192), card).answer(found)
    assert answer.fits is False
    # About the part of the 80 blocks' 44 GB that the card has room for.
    assert 38 <= answer.blocks_on_devices <= 43
    both = Estimator(shape, CacheSettings(8192), Machine(card.devices, 64 * GB)).answer(found)
    assert both.fits
    assert both.split
    left = sum(found.block_bytes[: 80 - both.blocks_on_devices])
    assert left < both.ram_bytes < left + 4 * GB
    little = Estimator(shape, CacheSettings(8192), Machine(card.devices, 16 * GB)).answer(found)
    assert little.fits is False


def test_what_the_cards_hold_alone_is_not_split_for_a_longer_context(llama):
    found, card = weight_bytes(llama, "gguf:Q8_0"), devices_named("16GB")
    alone, roomy = (
        Estimator(llama, CacheSettings(4096), machine).answer(found)
        for machine in (Machine(card), Machine(card, 64 * GB))
    )
    assert alone.max_context == roomy.max_context < llama.context
    assert not roomy.split


def test_only_llama_cpp_leaves_blocks_in_main_memory():
    shape = find_shape("llama-3.3-70b").shape
    machine = Machine(devices_named("24GB"), 256 * GB)
    fits = {
        name: Estimator(shape, CacheSettings(512), machine).answer(weight_bytes(shape, name)).fits
        for name in ("gguf:Q4_K_M", "gptq:4:128", "nf4-dq")
    }
    assert fits == {"gguf:Q4_K_M": True, "gptq:4:128": False, "nf4-dq": False}


def test_two_cards_hold_more_than_one_and_not_twice_as_much(llama):
    found = weight_bytes(llama, "bf16")
    contexts = [
        Estimator(llama, CacheSettings(512), Machine(devices_named(text))).answer(found).max_context
        for text in ("20GB", "2x10GB", "2x20GB")
    ]
    assert contexts[0] > contexts[1]
    assert contexts[2] > contexts[0]


def test_every_card_of_vllm_needs_all_latents():
    shape = find_shape("deepseek-v3").shape
    machine = Machine(devices_named("16xh100"))
    cache = {
        name: Estimator(shape, CacheSettings(4096), machine)
        .answer(weight_bytes(shape, name))
        .kv_bytes
        for name in ("fp8", "gguf:Q4_K_M")
    }
    assert cache["fp8"] == 16 * cache["gguf:Q4_K_M"]


def test_main_memory_alone_holds_embeddings_too(llama):
    found = weight_bytes(llama, "gguf:Q8_0")
    needed = Estimator(llama, CacheSettings(512), Machine(ram=1)).answer(found).ram_bytes
    assert needed > found.weights_bytes + found.host_bytes
    for ram, fits in ((needed, True), (needed - 1, False)):
        answer = Estimator(llama, CacheSettings(512), Machine(ram=ram)).answer(found)
        assert answer.fits is fits


def test_certain_is_stricter_than_fits(llama):
    found = weight_bytes(llama, "gptq:4:128")
    answer = Estimator(llama, CacheSettings(8192), Machine()).answer(found)
    between = (answer.total_bytes + 10**6) // GB + 1
    tight = Estimator(llama, CacheSettings(8192), Machine(devices_named(f"{between}GB")))
    assert tight.answer(found).fits
    assert not tight.answer(found).certain
    wide = Estimator(llama, CacheSettings(8192), Machine(devices_named("80GB"))).answer(found)
    assert wide.certain


def test_experts_are_what_to_leave_in_main_memory():
    shape = find_shape("qwen3-30b-a3b").shape
    found, machine = weight_bytes(shape, "gguf:Q8_0"), Machine(devices_named("24GB"), 64 * GB)
    answer = Estimator(shape, CacheSettings(4096), machine).answer(found)
    away = experts_away(shape, answer, machine)
    excess = answer.total_bytes - machine.devices.total
    assert answer.split
    assert excess < away * max(found.block_bytes) < excess + 2 * max(found.block_bytes)
    tiny = Machine(devices_named("1GB"), 64 * GB)
    assert (
        experts_away(shape, Estimator(shape, CacheSettings(4096), tiny).answer(found), tiny) is None
    )
    assert experts_away(find_shape("8b").shape, answer, machine) is None
