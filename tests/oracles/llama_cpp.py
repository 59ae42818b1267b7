"""The real llama.cpp: C functions inside the xllamacpp wheel, called through ctypes.

    quantize(x, "Q4_K", importance)     what its quantizer writes, byte for byte
    Model(path).logits(ids)             the logits that it computes from a GGUF file
    Model(path).tokenize(text)          its own tokenizer; Vocabulary(path) loads nothing else

The layouts of the structures hold for exactly the wheel that WHEEL names: they are those of
include/llama.h at b11549. Always one thread, so that sums are added in one order.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32
from ctypes import c_void_p as address
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xllamacpp

WHEEL = "2026.10.11549"
if version("xllamacpp") != WHEEL:
    raise ImportError(f"these structures are those of xllamacpp {WHEEL} only")


class ModelParameters(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = [
        ("devices", address),
        ("tensor_buft_overrides", address),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", address),
        ("progress_callback", address),
        ("progress_callback_user_data", address),
        ("kv_overrides", address),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParameters(ctypes.Structure):
    """`llama_context_params`."""

    _fields_ = [
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
        ("cb_eval", address),
        ("cb_eval_user_data", address),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("moe_cache", c_size_t),
        ("abort_callback", address),
        ("abort_callback_data", address),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", address),
        ("n_samplers", c_size_t),
        ("ctx_other", address),
    ]


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", address),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


SIGNATURES = {
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int32, address, address, c_int64, c_int64, c_int64, address],
    ),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int32]),
    "ggml_row_size": (c_size_t, [c_int32, c_int64]),
    "ggml_type_name": (c_char_p, [c_int32]),
    "ggml_blck_size": (c_int64, [c_int32]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParameters, []),
    "llama_context_default_params": (ContextParameters, []),
    "llama_model_load_from_file": (address, [c_char_p, ModelParameters]),
    "llama_model_free": (None, [address]),
    "llama_init_from_model": (address, [address, ContextParameters]),
    "llama_free": (None, [address]),
    "llama_model_get_vocab": (address, [address]),
    "llama_vocab_n_tokens": (c_int32, [address]),
    "llama_tokenize": (
        c_int32,
        [address, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_detokenize": (
        c_int32,
        [address, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool],
    ),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [address, Batch]),
    "llama_get_logits": (POINTER(c_float), [address]),
    "llama_get_memory": (address, [address]),
    "llama_memory_clear": (None, [address, c_bool]),
}
LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, address)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set.restype, library.llama_log_set.argtypes = None, [LOG, address]
    return library


LIBRARY = _library()
_silence = LOG(lambda level, text, data: None)  # kept: llama.cpp keeps only its address
LIBRARY.llama_log_set(_silence, None)
LIBRARY.llama_backend_init()

N_TYPES = 43
TYPES = {
    LIBRARY.ggml_type_name(number).decode().upper(): number
    for number in range(N_TYPES)
    if LIBRARY.ggml_blck_size(number)  # numbers given up have none
}


def quantize(x: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Bytes [R, bytes of a row] uint8 that llama.cpp writes for `x` [R, C].

    type_name: of ggml, such as `Q4_K`; importance: mean x^2 of the inputs, [C], or None.
    """
    number = TYPES[type_name.upper()]
    x = np.ascontiguousarray(x, np.float32)
    rows, columns = x.shape
    if columns % LIBRARY.ggml_blck_size(number):
        raise ValueError(f"rows of {columns} are not whole blocks of {type_name}")
    if importance is None and LIBRARY.ggml_quantize_requires_imatrix(number):
        raise ValueError(f"llama.cpp has no {type_name} without importance")
    out = np.empty((rows, LIBRARY.ggml_row_size(number, columns)), np.uint8)
    pointer = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (columns,):
            raise ValueError(f"importance {importance.shape} for {columns} columns")
        pointer = importance.ctypes.data
    written = LIBRARY.ggml_quantize_chunk(
        number, x.ctypes.data, out.ctypes.data, 0, rows, columns, pointer
    )
    if written != out.nbytes:
        raise ValueError(f"llama.cpp wrote {written} of {out.nbytes} bytes of {type_name}")
    return out


class Vocabulary:
    """The tokenizer of a GGUF file; its tensors are not read."""

    def __init__(self, path: Path | str) -> None:
        self._load(path, vocab_only=True)

    def _load(self, path: Path | str, *, vocab_only: bool) -> None:
        parameters = LIBRARY.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.vocab_only = vocab_only
        parameters.check_tensors = True
        self._model = LIBRARY.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp refuses {path}")
        self._vocabulary = LIBRARY.llama_model_get_vocab(self._model)
        self.n_tokens: int = LIBRARY.llama_vocab_n_tokens(self._vocabulary)

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text, with the ones that the model wants around it if `add_special`."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (c_int32 * room)()
        count = LIBRARY.llama_tokenize(
            self._vocabulary, raw, len(raw), ids, room, add_special, parse_special
        )
        if count < 0:
            raise RuntimeError(f"llama.cpp cannot tokenize {text!r}")
        return list(ids[:count])

    def detokenize(
        self, ids: list[int], remove_special: bool = False, unparse_special: bool = True
    ) -> str:
        """Text of token ids."""
        given = (c_int32 * len(ids))(*ids)
        room = 64 + 32 * len(ids)
        for _ in range(2):
            text = ctypes.create_string_buffer(room)
            count = LIBRARY.llama_detokenize(
                self._vocabulary, given, len(ids), text, room, remove_special, unparse_special
            )
            if count >= 0:
                break
            room = -count
        return text.raw[:count].decode(errors="replace")

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self._model:
            LIBRARY.llama_model_free(self._model)
            self._model = None

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.close()


class Model(Vocabulary):
    """A GGUF file run on the CPU."""

    def __init__(self, path: Path | str, n_ctx: int = 512) -> None:
        self._context = None
        self._load(path, vocab_only=False)
        parameters = LIBRARY.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = n_ctx
        parameters.n_threads = parameters.n_threads_batch = 1
        self.n_ctx = n_ctx
        self._context = LIBRARY.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise RuntimeError(f"llama.cpp cannot run {path}")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [T, vocabulary] float32 after each of `ids` [T], seen from the first on."""
        if not 0 < len(ids) <= self.n_ctx:
            raise ValueError(f"{len(ids)} tokens for a context of {self.n_ctx}")
        LIBRARY.llama_memory_clear(LIBRARY.llama_get_memory(self._context), True)
        batch = LIBRARY.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position] = int(token)
            batch.pos[position] = position
            batch.n_seq_id[position] = 1
            batch.seq_id[position][0] = 0
            batch.logits[position] = 1
        failed = LIBRARY.llama_decode(self._context, batch)
        LIBRARY.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp cannot decode: {failed}")
        found = LIBRARY.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, shape=(len(ids), self.n_tokens)).copy()

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self._context:
            LIBRARY.llama_free(self._context)
            self._context = None
        super().close()
