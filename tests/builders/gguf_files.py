"""GGUF files of small models, written with the gguf package, their tensors as qtool converts them.

The vocabulary is "none": llama.cpp runs token ids then, and tokenizes nothing.
"""

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from qtool.checkpoint.locate import locate
from qtool.model.conversion import converted_tensors, row_order
from qtool.model.family import family_of
from qtool.model.gguf_metadata import model_metadata

KINDS = {
    "u32": gguf.GGUFValueType.UINT32,
    "f32": gguf.GGUFValueType.FLOAT32,
    "bool": gguf.GGUFValueType.BOOL,
    "string": gguf.GGUFValueType.STRING,
}


def checkpoint_weights(directory):
    """Every tensor of a checkpoint as a float32 array."""
    weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        weights |= {name: x.to(torch.float32).numpy() for name, x in load_file(path).items()}
    return weights


def stored_values(tensor, weights):
    """What a converted tensor holds, [rows, columns] or [rows] float32."""
    if tensor.values is not None:
        return np.array(tensor.values, np.float32)
    values = weights[tensor.source][: tensor.rows] + np.float32(tensor.offset)
    if tensor.permuted_heads:
        values = values[row_order(len(values), tensor.permuted_heads)]
    return np.ascontiguousarray(values)


def write_gguf(directory, path, *, dtype=np.float32, vocabulary=None):
    """Write the model in a directory as a GGUF file; return its path."""
    checkpoint = locate(str(directory))
    config, family = checkpoint.config, family_of(checkpoint.config)
    weights = checkpoint_weights(directory)
    writer = gguf.GGUFWriter(str(path), family.gguf_architecture)
    metadata = model_metadata(config, family, name="Tiny", vocabulary=vocabulary)
    for key, value in metadata.items():
        if key == "general.architecture":  # the writer's own
            continue
        kind = KINDS[value.kind]
        if value.array:
            writer.add_key_value(key, list(value.content), gguf.GGUFValueType.ARRAY, kind)
        else:
            writer.add_key_value(key, value.content, kind)
    writer.add_tokenizer_model("none")
    for tensor in converted_tensors(config, family, checkpoint.refs, vocabulary=vocabulary):
        values = stored_values(tensor, weights)
        assert values.shape == tensor.shape
        writer.add_tensor(tensor.name, values.astype(np.float32 if tensor.always_float else dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
