"""llama.cpp as a library: load a GGUF file, tokenize, and get the logits of token ids.

The functions are those of llama.h (b11549) inside the wheel of one version of xllamacpp, called
through ctypes. Structures are passed by value, so their layouts hold for that version alone and
any other is refused. No torch here: the trial in a process of its own shall start quickly.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import CapacityError, DamagedError, UnsupportedError

PACKAGE, VERSION = "xllamacpp", "2026.10.11549"
INSTALL = "pip install 'qtool-llm[llama]'"
MEMORY_MAP = 1  # of load_mode
LOGGED_ERROR = 4  # level of a message that says why something failed
TOKENS_AT_ONCE = 512  # that llama_decode is given; its logits are held twice
ROOM_FOR_TOKEN = 1024  # bytes of the longest piece of text that stands for one token
ROOM_BESIDE_TEXT = 16  # tokens beyond one for each byte: beginning and end of text, a space


class ModelParameters(ctypes.Structure):
    """`llama_model_params`; what qtool leaves alone is named as llama.h has it."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class ContextParameters(ctypes.Structure):
    """`llama_context_params`; likewise."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# Name -> type of the result, types of the arguments.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParameters, []),
    "llama_context_default_params": (ContextParameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParameters]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_has_encoder": (c_bool, [c_void_p]),
    "llama_model_has_decoder": (c_bool, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParameters]),
    "llama_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_bos": (c_int32, [c_void_p]),
    "llama_vocab_eos": (c_int32, [c_void_p]),
    "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
    "llama_tokenize": (
        c_int32,
        [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_detokenize": (
        c_int32,
        [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool],
    ),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
}
LogCallback = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
Log = Callable[[str], None]  # told what llama.cpp writes about its errors


def check_installed() -> None:
    """Check that llama.cpp is there, in the version whose structures are known.

    Raises:
        UnsupportedError: it is absent, or another version.
    """
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        raise UnsupportedError(
            f"a GGUF file is run by llama.cpp, and {PACKAGE} is not installed", INSTALL
        ) from None
    if found != VERSION:
        raise UnsupportedError(
            f"{PACKAGE} {found} is installed, and qtool can call that of {VERSION} only", INSTALL
        )


@cache
def _library() -> Any:
    check_installed()
    spec = importlib.util.find_spec(PACKAGE)
    places = list((spec.submodule_search_locations if spec else None) or ())
    try:
        importlib.import_module(PACKAGE)  # loads the libraries that come with it
        file = next(f for p in places for f in Path(p).glob("xllamacpp.*") if f.suffix != ".py")
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (StopIteration, ImportError, OSError, AttributeError) as error:
        raise UnsupportedError(
            f"{PACKAGE} cannot be loaded: {printable(error)}", INSTALL
        ) from error
    library.llama_log_set.restype = None
    library.llama_log_set.argtypes = [LogCallback, c_void_p]
    library.llama_backend_init()
    return library


@cache
def _callback(log: Log | None) -> Any:
    """Return a callback that passes errors on; the cache keeps it alive as long as llama.cpp."""

    def passed_on(level: int, text: bytes, data: int | None) -> None:
        del data
        if log is not None and level >= LOGGED_ERROR:
            log(text.decode(errors="replace"))

    return LogCallback(passed_on)


def to_stderr(text: str) -> None:
    """Write a message where a trial's parent reads it."""
    sys.stderr.write(text)


class LlamaModel:
    """A GGUF file run on the CPU by llama.cpp; to be closed, or used with `with`.

    Args:
        path: of the file, or of the first of its parts. It must have passed `read_gguf`.
        context: most tokens of a window; 0 loads the tokenizer only.
        threads: to compute with.
        check: whether to look for values that are no numbers in every tensor.
        log: told llama.cpp's errors; None keeps it silent.

    Raises:
        UnsupportedError: llama.cpp is absent or refuses the model.
        CapacityError: there is no memory for the context.
    """

    def __init__(
        self,
        path: Path,
        *,
        context: int,
        threads: int = 1,
        check: bool = True,
        log: Log | None = None,
    ) -> None:
        self._library = _library()
        self._library.llama_log_set(_callback(log), None)
        self._path, self._context_length = path, context
        self._model = self._context = None
        parameters = self._library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = MEMORY_MAP
        parameters.vocab_only = not context
        parameters.check_tensors = check
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(errors="surrogateescape"), parameters
        )
        if not self._model:
            raise DamagedError(
                f"llama.cpp refuses {shown_path(path)}",
                "it is damaged, or of an architecture that this llama.cpp does not know",
            )
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.n_tokens = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        if context:
            self._start(threads)

    def _start(self, threads: int) -> None:
        library = self._library
        if library.llama_model_has_encoder(self._model) or not library.llama_model_has_decoder(
            self._model
        ):
            self.close()
            raise UnsupportedError(
                f"{shown_path(self._path)} is not a model that continues text",
                "perplexity is defined for decoder-only language models",
            )
        parameters = library.llama_context_default_params()
        parameters.n_ctx = self._context_length
        parameters.n_batch = parameters.n_ubatch = min(self._context_length, TOKENS_AT_ONCE)
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.no_perf = True
        self._context = library.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise CapacityError(
                f"llama.cpp cannot make a context of {self._context_length} tokens for "
                f"{shown_path(self._path)}",
                "use a smaller --ctx",
            )

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._model = self._context = None

    @property
    def bos(self) -> int | None:
        """The token that the model wants at the beginning of a text, if it does."""
        wanted = self._library.llama_vocab_get_add_bos(self._vocabulary)
        found = int(self._library.llama_vocab_bos(self._vocabulary))
        return found if wanted and found >= 0 else None

    @property
    def eos(self) -> int | None:
        """The token that ends a text, if there is one."""
        found = int(self._library.llama_vocab_eos(self._vocabulary))
        return found if found >= 0 else None

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text; names of special tokens in it become those.

        Raises:
            UnsupportedError: the model's tokenizer refuses it.
        """
        raw = text.encode()
        room = len(raw) + ROOM_BESIDE_TEXT
        ids = (c_int32 * room)()
        count = self._library.llama_tokenize(
            self._vocabulary, raw, len(raw), ids, room, False, True
        )
        if count < 0:
            raise UnsupportedError(
                f"the tokenizer of {shown_path(self._path)} cannot take the text",
                "give --ref with the directory that it was made from",
            )
        return list(ids[:count])

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special ones have none."""
        tokens, room = (c_int32 * len(ids))(*ids), ROOM_FOR_TOKEN * len(ids) + ROOM_BESIDE_TEXT
        text = ctypes.create_string_buffer(room)
        count = self._library.llama_detokenize(
            self._vocabulary, tokens, len(ids), text, room, False, False
        )
        return text.raw[: max(count, 0)].decode(errors="replace")

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return logits [tokens, vocabulary] after each of the ids, a window of its own.

        Raises:
            UnsupportedError: an id that the model does not have, or llama.cpp gives up.
        """
        return np.concatenate([*self.parts(ids)])

    def parts(self, ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Yield the same TOKENS_AT_ONCE rows at a time, so that a long window needs no more memory.

        Raises:
            UnsupportedError: as `logits`.
        """
        if not all(0 <= token < self.n_tokens for token in ids):
            raise UnsupportedError(
                f"{shown_path(self._path)} has {self.n_tokens} tokens, but the text was tokenized "
                "with more",
                "compare a model with the one it was made from",
            )
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(TOKENS_AT_ONCE, 0, 1)
        try:
            for start in range(0, len(ids), TOKENS_AT_ONCE):
                part = ids[start : start + TOKENS_AT_ONCE]
                fill(batch, part, start)
                code = library.llama_decode(self._context, batch)
                pointer = None if code else library.llama_get_logits(self._context)
                if not pointer:
                    raise UnsupportedError(
                        f"llama.cpp gives no logits for {shown_path(self._path)} (code {code})",
                        "check that llama.cpp itself can run it, and use a smaller --ctx",
                    )
                # llama.cpp writes the next part to the same place.
                yield np.ctypeslib.as_array(pointer, (len(part), self.n_tokens)).copy()
        finally:
            library.llama_batch_free(batch)


def fill(batch: Batch, ids: Sequence[int], start: int) -> None:
    """Put token ids at positions from `start` on into a batch, all of one sequence."""
    batch.n_tokens = len(ids)
    for index, token in enumerate(ids):
        batch.token[index] = token
        batch.pos[index] = start + index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = 1
