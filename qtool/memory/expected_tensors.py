"""Hold the tensors of a checkpoint to those that its config.json describes: names, shapes, dtypes.

Both come from headers alone. Formats pack linears into several tensors; of those only the names
are looked at here, their shapes are the format's own business.
"""

from __future__ import annotations

from collections.abc import Mapping

from qtool.checkpoint.header import TensorRef
from qtool.checkpoint.locate import CONFIG_FILE, Checkpoint
from qtool.checkpoint.untrusted import printable, shown_path
from qtool.errors import DamagedError, UnsupportedError
from qtool.memory.shape import ModelShape
from qtool.memory.shape_of_config import shape_of_config
from qtool.model.conversion import BUFFERS, EMBEDDING, FINAL_NORM
from qtool.model.family import Family

LAST_PARTS: Mapping[str, str] = {  # llama.cpp's name of a module in a block <- transformers' name
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
}
# Families with norms behind attention and MLP call them otherwise.
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


FLOATS = frozenset({"F32", "F16", "BF16"})
INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
# The last part of a packed tensor's name, in every format that qtool reads.
PACKED_PARTS = frozenset(
    {
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight",
        "input_scale",
    }
)
# The part that stands for a module's weight, one a module -> what its values need beside it.
MAIN_PARTS: Mapping[str, tuple[str, ...]] = {
    "weight": (),
    "qweight": ("qzeros", "scales"),
    "weight_packed": ("weight_scale", "weight_shape"),
}
OTHER_MODEL = "config.json and weights belong to different models; download both again"


def check_tensors(checkpoint: Checkpoint, family: Family, shape: ModelShape | None = None) -> None:
    """Refuse a float or packed checkpoint whose tensors are not those of its config.json.

    Args:
        checkpoint: with headers.
        family: of the model.
        shape: of config.json, where it is known already.

    Raises:
        DamagedError: a tensor is missing, is one too many, has another shape, or holds integers;
            or a number of config.json is missing or impossible.
        UnsupportedError: weights are stored as floats that qtool does not read.
    """
    shape = shape or shape_of_config(checkpoint.config, name=checkpoint.name)
    packed = bool(checkpoint.config.get("quantization_config"))
    expected = _expected(shape, family)
    modules = {name.removesuffix(".weight") for name in expected}
    parts = [name.rpartition(".") for name in checkpoint.refs]
    quantized = {module for module, _, leaf in parts if leaf in PACKED_PARTS - {"weight"}}
    if packed and not quantized:
        raise DamagedError(
            f"{shown_path(checkpoint.path / CONFIG_FILE)} declares a quantized model "
            "(quantization_config), but no tensor is packed",
            OTHER_MODEL,
        )
    for name, ref in checkpoint.refs.items():
        module, _, leaf = name.rpartition(".")
        if name in expected:
            if not packed or module not in quantized:
                _check(ref, expected[name])
        elif not BUFFERS.search(name) and not (
            packed and module in modules and leaf in {*PACKED_PARTS, "bias"}
        ):
            raise DamagedError(
                f"{shown_path(ref.file)}: tensor '{printable(name)}' is none that "
                f"{CONFIG_FILE} describes",
                OTHER_MODEL,
            )
    stored = _check_parts(checkpoint) if packed else set()
    needed = {tensor.name for tensor in shape.tensors if not tensor.computed}
    tied = checkpoint.config.get("tie_word_embeddings", family.gguf.tied)
    own_head = "" if tied else f"{family.head}.weight"  # llama.cpp may have no place for it
    for name in expected:
        present = name in checkpoint.refs or name.removesuffix(".weight") in stored
        if not present and (name == own_head or llama_name(name, family) in needed):
            raise DamagedError(
                f"tensor '{name}' is missing from {_whole(checkpoint)}, though its "
                f"{CONFIG_FILE} describes it",
                OTHER_MODEL,
            )


def _whole(checkpoint: Checkpoint) -> str:
    """Return the one weight file, or the directory of several, for a message."""
    files = {ref.file for ref in checkpoint.refs.values()}
    return shown_path(files.pop() if len(files) == 1 else checkpoint.path)


def _check_parts(checkpoint: Checkpoint) -> set[str]:
    """Return the modules of a packed checkpoint whose weight is there, each once and whole."""
    mains: dict[str, str] = {}
    for name, ref in checkpoint.refs.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in MAIN_PARTS:
            continue
        where = f"{shown_path(ref.file)}: tensor '{printable(name)}'"
        if module in mains:
            raise DamagedError(
                f"{where} and '{printable(module)}.{mains[module]}' are both the weight of one "
                "module",
                OTHER_MODEL,
            )
        mains[module] = leaf
        for part in MAIN_PARTS[leaf]:
            if f"{module}.{part}" not in checkpoint.refs:
                raise DamagedError(
                    f"{where} lacks its '{part}': '{printable(module)}.{part}' is missing",
                    OTHER_MODEL,
                )
    return set(mains)


def _expected(shape: ModelShape, family: Family) -> dict[str, tuple[int, ...]]:
    """Return the checkpoint's name of each tensor -> its shape; a tied head may be there too."""
    shapes = {tensor.name: tensor.shape for tensor in shape.tensors}
    paths = [EMBEDDING, FINAL_NORM, family.head]
    for block in range(shape.blocks):
        paths += [f"{family.blocks}.{block}.{path}" for path in family.gguf.tensors]
    names = [f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")]
    found = {name: shapes.get(llama_name(name, family)) for name in names}
    if shape.tied:
        found[f"{family.head}.weight"] = shapes["token_embd.weight"]
    return {name: tuple(size) for name, size in found.items() if size is not None}


def _check(ref: TensorRef, expected: tuple[int, ...]) -> None:
    where = f"{shown_path(ref.file)}: tensor '{printable(ref.name)}'"
    if tuple(ref.shape) != expected:
        raise DamagedError(
            f"{where} has the shape {list(ref.shape)}, where {CONFIG_FILE} says {list(expected)}",
            OTHER_MODEL,
        )
    if ref.dtype in INTEGERS:
        raise DamagedError(
            f"{where} is stored as {ref.dtype}, where floating point weights belong", OTHER_MODEL
        )
    if ref.dtype not in FLOATS:
        raise UnsupportedError(
            f"{where} is stored as {ref.dtype}; qtool reads {', '.join(sorted(FLOATS))}",
            "use the original float checkpoint",
        )


def llama_name(name: str, family: Family) -> str:
    """Return llama.cpp's name of a tensor, or the checkpoint's where there is none."""
    if name in ENDS:
        return ENDS[name]
    module, _, leaf = name.rpartition(".")
    prefix = f"{family.blocks}."
    number, _, path = module.removeprefix(prefix).partition(".")
    if not module.startswith(prefix) or not number.isdecimal():
        return name
    names = dict(LAST_PARTS)
    if "post_feedforward_layernorm" in family.gguf.tensors:
        names |= POST_NORMS
    return f"blk.{int(number)}.{names.get(path, path)}.{leaf}"
