"""A GGUF file of a llama model, written with the gguf package and by nothing of qtool's.

Norms stay float32; linears and embeddings take the type asked for, where their rows allow it.
"""

import json

import gguf
import numpy as np
from safetensors.torch import load_file

NORMAL, CONTROL = 1, 3
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def llama_gguf(directory, path, kind="F32", *, rows=None, metadata=None):
    """Write the llama model of a directory; `rows` cuts or pads the vocabulary, None keeps it."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    rows = config["vocab_size"] if rows is None else rows
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type("model")
    _write_sizes(writer, config, rows)
    _write_tokenizer(writer, directory, rows)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if name in OUTER and values.ndim == 2:
            values = np.pad(values[:rows], ((0, max(rows - len(values), 0)), (0, 0)))
        values = _interleaved(name, values, config)
        wanted = gguf.GGMLQuantizationType[kind]
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        if values.ndim == 1 or values.shape[1] % block:
            wanted = gguf.GGMLQuantizationType.F32
        writer.add_tensor(_name(name), gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer, config, rows):
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(rows)


def _write_tokenizer(writer, directory, rows):
    described = json.loads((directory / "tokenizer.json").read_text())
    ids = dict(described["model"]["vocab"])
    special = {token["content"] for token in described["added_tokens"]}
    ids.update({token["content"]: token["id"] for token in described["added_tokens"]})
    tokens = {number: token for token, number in ids.items()}
    names = [tokens.get(number, f"[PAD{number}]") for number in range(rows)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([CONTROL if name in special else NORMAL for name in names])
    pairs = described["model"]["merges"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in pairs]
    # llama.cpp insists on some; two zero bytes do not stand in a text.
    writer.add_token_merges(merges or ["Ā Ā"])
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    if settings.get("eos_token"):
        writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_add_bos_token(False)


def _name(name):
    if name in OUTER:
        return OUTER[name]
    _, _, block, rest = name.split(".", 3)
    path, _, ending = rest.rpartition(".")
    return f"blk.{block}.{NAMES[path]}.{ending}"


def _interleaved(name, values, config):
    """Rows of queries and keys in the order in which llama.cpp rotates them: neighbours."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = next((heads[part] for part in heads if part in name), None)
    if key is None:
        return values
    shape = (config[key], 2, len(values) // config[key] // 2, *values.shape[1:])
    return np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))
