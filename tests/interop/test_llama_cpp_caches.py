"""The bytes of caches are those that llama.cpp says it takes, to what its log can show."""

import contextlib
import ctypes
import re

import pytest
from builders.gguf_files import write_gguf
from builders.tiny_models import SLIDING_WINDOW, tiny_model

from qtool.checkpoint.locate import locate, read_config
from qtool.memory.cache import CacheSettings, cache_bytes, cache_parts
from qtool.memory.shape import BlockCache, ModelShape
from qtool.memory.shape_of_config import shape_of_config
from qtool.memory.shape_of_gguf import shape_of_gguf

llama_cpp = pytest.importorskip("oracles.llama_cpp", reason="xllamacpp is not installed")

TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30,
}  # fmt: skip
LINE = re.compile(
    r"size = +([\d.]+) MiB \( *(\d+) cells, +(\d+) layers.*K \((\w+)\): +([\d.]+) MiB, V"
)
HEADS, HEAD = 2, 32
WIDTH = HEADS * HEAD
FULL = BlockCache(keys=WIDTH, values=WIDTH)
WINDOW = BlockCache(keys=WIDTH, values=WIDTH, window=SLIDING_WINDOW)
NO_WINDOW = {"sliding_window": None}
QUERIES = {"query_pre_attn_scalar": HEAD}  # as llama.cpp scales them
# Family -> how to make it, and what its two blocks keep.
FAMILIES = {
    "llama": ({"head_dim": HEAD}, (FULL, FULL)),
    "mistral": (NO_WINDOW, (FULL, FULL)),
    "qwen3": ({"use_sliding_window": False}, (FULL, FULL)),
    "gemma2": (QUERIES, (WINDOW, FULL)),
    "gemma3_text": (QUERIES, (WINDOW, FULL, WINDOW)),
}


def shape(cache):
    return ModelShape("Tiny", "llama", len(cache), 64, 4, HEADS, HEAD, 300, 256, (), cache)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Family -> its GGUF file."""
    directory = tmp_path_factory.mktemp("caches")
    made = {}
    for family, (settings, cache) in FAMILIES.items():
        model = tiny_model(
            family, directory / family, layers=len(cache), **{"head_dim": HEAD, **settings}
        )
        made[family] = write_gguf(model, directory / f"{family}.gguf")
    return made


@contextlib.contextmanager
def said():
    """What llama.cpp logs meanwhile."""
    lines = []
    callback = llama_cpp.LOG(lambda level, text, data: lines.append(text.decode()))
    llama_cpp.LIBRARY.llama_log_set(callback, None)
    try:
        yield lines
    finally:
        llama_cpp.LIBRARY.llama_log_set(llama_cpp._silence, None)
        del callback


def logged(path, settings):
    """(MiB, cells, blocks) of every cache that llama.cpp makes."""
    library = llama_cpp.LIBRARY
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    parameters = library.llama_context_default_params()
    parameters.n_ctx = settings.context * settings.sequences
    parameters.n_ubatch = settings.micro_batch
    parameters.n_seq_max = settings.sequences
    parameters.kv_unified = settings.unified
    parameters.swa_full = settings.whole_windows
    parameters.type_k = TYPES[settings.key_type]
    parameters.type_v = TYPES[settings.value_type]
    parameters.n_threads = parameters.n_threads_batch = 1
    with said() as lines:
        context = library.llama_init_from_model(model, parameters)
    assert context, "".join(lines)
    library.llama_free(context)
    library.llama_model_free(model)
    found = [LINE.search(line) for line in lines]
    return [(float(m[1]), int(m[2]), int(m[3])) for m in found if m]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        CacheSettings(8192),
        CacheSettings(1000),  # becomes 1024
        CacheSettings(300),  # shorter than a window and what is computed at once
        CacheSettings(4096, key_type="q8_0", value_type="q8_0"),
        CacheSettings(4096, key_type="q5_1", value_type="q4_0"),
        CacheSettings(2048, key_type="bf16", value_type="bf16"),
        CacheSettings(2048, sequences=4),
        CacheSettings(2048, sequences=3, unified=True),
        CacheSettings(4096, micro_batch=64),
        CacheSettings(4096, whole_windows=True),
    ],
    ids=str,
)
def test_caches_have_the_size_that_llama_cpp_gives_them(files, family, settings):
    cache = FAMILIES[family][1]
    caches = logged(files[family], settings)
    n_bytes = cache_bytes(shape(cache), settings)
    assert sum(mebibytes for mebibytes, _, _ in caches) == pytest.approx(
        n_bytes / 2**20, abs=0.005 * len(caches) + 1e-6
    )
    streams = 1 if settings.unified else settings.sequences
    cells = sorted((cells * streams, blocks) for _, cells, blocks in caches)
    parts = cache_parts(shape(cache), settings)
    assert cells == sorted((part.cells, part.blocks) for part in parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_and_headers_give_the_caches_that_llama_cpp_makes(files, family):
    settings = CacheSettings(8192)
    mebibytes = sum(size for size, _, _ in logged(files[family], settings))
    config = read_config(files[family].with_suffix(""))
    for found in (
        shape_of_config(config, name="Tiny"),
        shape_of_gguf(locate(str(files[family]), gguf=True).gguf)[0],
    ):
        assert cache_bytes(found, settings) / 2**20 == pytest.approx(mebibytes, abs=0.011)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "f16"])
def test_every_cache_type_has_its_size(files, kind):
    settings = CacheSettings(16384, key_type=kind, value_type=kind)
    [(mebibytes, cells, _)] = logged(files["llama"], settings)
    assert cells == settings.context
    assert mebibytes == pytest.approx(cache_bytes(shape((FULL, FULL)), settings) / 2**20, abs=0.005)


def test_the_log_line_is_what_the_expression_reads():
    line = "size =    4.00 MiB (  8192 cells,   2 layers,  1/1 seqs), K (f16):    2.00 MiB, V (f16)"
    assert LINE.search(line).group(2) == "8192"
    assert ctypes.sizeof(llama_cpp.ContextParameters) > 0
