"""An independent reader of the three packed layouts, and the tiny model that the tests quantize.

Nothing here is shared with qtool or with the engines under test: words become a stream of bits
through `numpy.unpackbits`, where everyone else shifts and masks. A hand-made directory can be
written with the same few lines, which shows that the reader and the engines agree before qtool
enters.

Shape letters: K input features, N output features, G groups along K.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# Eight output columns share a 32-bit word of the AWQ layout; place i holds column AWQ_ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
VOCABULARY = 320


def words_to_codes(words, bits, count):
    """Read `count` unsigned codes [..., count] from little-endian int32 words [..., W]."""
    stream = np.unpackbits(
        np.ascontiguousarray(words, dtype="<i4").view(np.uint8), axis=-1, bitorder="little"
    )
    stream = stream[..., : count * bits].reshape(*words.shape[:-1], count, bits)
    return stream.astype(np.int64) @ (1 << np.arange(bits))


def codes_to_words(codes, bits):
    """Write unsigned codes [..., C] as little-endian int32 words; C * bits is a multiple of 32."""
    stream = (codes[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def read_tensors(directory):
    """All tensors of a directory's shards; bfloat16 is widened to float32, which is exact."""
    tensors = {}
    for shard in sorted(Path(directory).glob("*.safetensors")):
        tensors.update(load_file(shard))
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in tensors.items()
    }


def _spread(per_group, rows):
    """Repeat [G, N] along the first axis until it has `rows` rows."""
    return np.repeat(per_group, rows // per_group.shape[0], axis=0)


def decode_gptq(tensors, name, bits):
    """The [N, K] weight of a GPTQ v1 linear; K is packed in qweight, N in qzeros, minus one."""
    scales, g_idx = tensors[f"{name}.scales"].astype(np.float32), tensors[f"{name}.g_idx"]
    rows, columns = g_idx.size, scales.shape[1]
    codes = words_to_codes(tensors[f"{name}.qweight"].T, bits, rows).T
    # Modulo: a stored all-ones zero point is a zero of 0 that wrapped when one was taken off.
    zeros = (words_to_codes(tensors[f"{name}.qzeros"], bits, columns) + 1) % (1 << bits)
    return (scales[g_idx] * (codes - zeros[g_idx])).T


def decode_awq(tensors, name, bits):
    """The [N, K] weight of an AWQ GEMM linear; N is packed and interleaved in both."""
    assert bits == 4
    scales = tensors[f"{name}.scales"].astype(np.float32)
    columns = scales.shape[1]

    def straight(words):
        stored = words_to_codes(words, bits, columns).reshape(len(words), -1, 8)
        codes = np.empty_like(stored)
        codes[..., list(AWQ_ORDER)] = stored
        return codes.reshape(len(words), columns)

    codes, zeros = straight(tensors[f"{name}.qweight"]), straight(tensors[f"{name}.qzeros"])
    return (_spread(scales, len(codes)) * (codes - _spread(zeros, len(codes)))).T


def decode_compressed_tensors(tensors, name, bits):
    """The [N, K] weight of a pack-quantized linear; K is packed in codes, N in zero points."""
    rows, columns = (int(size) for size in tensors[f"{name}.weight_shape"])
    scales = tensors[f"{name}.weight_scale"].astype(np.float32)
    codes = words_to_codes(tensors[f"{name}.weight_packed"], bits, columns)
    zeros = np.full((rows, 1), 1 << (bits - 1))
    if f"{name}.weight_zero_point" in tensors:
        zeros = words_to_codes(tensors[f"{name}.weight_zero_point"].T, bits, rows).T
    width = columns // scales.shape[1]
    return np.repeat(scales, width, axis=1) * (
        codes - np.repeat(zeros, columns // zeros.shape[1], 1)
    )


DECODERS = {"gptq": decode_gptq, "awq": decode_awq, "compressed-tensors": decode_compressed_tensors}
MARKERS = {"gptq": ".qweight", "awq": ".qweight", "compressed-tensors": ".weight_packed"}


def quantized_linears(tensors, layout):
    """Names of the linears that the directory holds packed."""
    marker = MARKERS[layout]
    return sorted(name.removesuffix(marker) for name in tensors if name.endswith(marker))


def decoded_state(directory, layout, bits):
    """The float32 state dict of the model in the directory, decoded by this module alone."""
    tensors = read_tensors(directory)
    linears = quantized_linears(tensors, layout)
    state = {
        name: torch.from_numpy(value.astype(np.float32))
        for name, value in tensors.items()
        if name.rsplit(".", 1)[0] not in linears
    }
    for linear in linears:
        weight = DECODERS[layout](tensors, linear, bits)
        state[f"{linear}.weight"] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
    return state


def state_of_qtool(directory):
    """The float32 state dict of the model in the directory, through qtool's own reader.

    The only place of this module that uses qtool: it is the subject here, not the oracle.
    """
    from qtool.checkpoint.locate import locate
    from qtool.checkpoint.reader import TensorReader
    from qtool.formats.reading import DenseSource

    checkpoint = locate(str(directory))
    with TensorReader(checkpoint.refs) as reader:
        source = DenseSource(checkpoint, reader)
        plain = [name for name in checkpoint.refs if name.rpartition(".")[0] not in source.grids]
        names = [*plain, *(f"{linear}.weight" for linear in source.grids)]
        return {name: source.read(name).float() for name in names}


def logits_of_state(directory, state, tokens):
    """Float32 logits [tokens, vocabulary] of plain transformers with this state dict."""
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(torch.from_numpy(tokens)[None]).logits[0].numpy()


def relative_difference(value, reference):
    """Euclidean norm of the difference over that of the reference."""
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


# -------------------------------------------------------------------- the model to quantize
def tiny_llama(directory):
    """Write a random Llama of two layers, of sizes every kernel accepts, with a byte tokenizer.

    The weights are larger than transformers draws them, so that the linears and not the embeddings
    make the logits and an error in them shows.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:
        # Rows without a negative weight want a zero point of 0, which GPTQ files cannot hold.
        layer.mlp.up_proj.weight.data[::3].abs_()
    model.save_pretrained(directory)
    bytes_ = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)
    return directory


def window(length=48):
    """Token ids of one window, the same in every test."""
    return np.random.default_rng(0).integers(0, VOCABULARY, length)


def qtool_quantize(source, target, *arguments):
    """Run `qtool quantize` the way a user does, on a calibration set small enough for a test."""
    command = [sys.executable, "-m", "qtool", "quantize", source, "-o", target]
    command += ["-n", 8, "-l", 64, "--eval", "none", *arguments]
    outcome = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    return target


# --------------------------------------------------------------------- hand-made directories
def rounded(weight, bits, group_size, symmetric):
    """Round [N, K] by min and max to unsigned codes [N, K], scales and zero points [N, G].

    Scales are float16. Zero points stay in 1 .. 2^bits - 1: GPTQ v1 stores them minus one, and
    readers differ on a zero of 0.
    """
    groups = weight.reshape(len(weight), -1, group_size)
    top = (1 << bits) - 1
    if symmetric:
        scale = np.abs(groups).max(-1, keepdims=True) / (top // 2)
        zero = np.full_like(scale, 1 << (bits - 1))
    else:
        low = np.minimum(groups.min(-1, keepdims=True), 0)
        high = np.maximum(groups.max(-1, keepdims=True), 0)
        scale = (high - low) / top
        zero = np.clip(np.rint(-low / scale), 1, top)
    scale = scale.astype(np.float16)
    codes = np.clip(np.rint(groups / scale.astype(np.float32) + zero), 0, top).astype(np.int64)
    return codes.reshape(weight.shape), scale[..., 0], zero[..., 0].astype(np.int64)


def encode_gptq(codes, scale, zero, bits):
    """GPTQ v1 tensors of one linear."""
    columns = codes.shape[1]
    return {
        "qweight": codes_to_words(codes, bits).T,
        "qzeros": codes_to_words((zero.T - 1) % (1 << bits), bits),
        "scales": scale.T,
        "g_idx": np.arange(columns, dtype=np.int32) // (columns // scale.shape[1]),
    }


def encode_awq(codes, scale, zero, bits):
    """AWQ GEMM tensors of one linear."""

    def interleaved(plain):
        return codes_to_words(
            plain.reshape(len(plain), -1, 8)[..., list(AWQ_ORDER)].reshape(plain.shape), bits
        )

    return {"qweight": interleaved(codes.T), "qzeros": interleaved(zero.T), "scales": scale.T}


def encode_compressed_tensors(codes, scale, zero, bits):
    """Pack-quantized tensors of one linear; a zero point everywhere at the middle is left out."""
    tensors = {
        "weight_packed": codes_to_words(codes, bits),
        "weight_scale": scale,
        "weight_shape": np.array(codes.shape, dtype=np.int64),
    }
    if (zero != 1 << (bits - 1)).any():
        tensors["weight_zero_point"] = codes_to_words(zero.T, bits).T
    return tensors


ENCODERS = {"gptq": encode_gptq, "awq": encode_awq, "compressed-tensors": encode_compressed_tensors}


def handmade(source, target, layout, *, bits, group_size, symmetric, config):
    """Write `source` into `target`, rounded by min and max, with this quantization_config."""
    target.mkdir()
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        width = value.shape[1] if group_size == -1 else group_size
        parts = rounded(value.float().numpy(), bits, width, symmetric)
        for part, array in ENCODERS[layout](*parts, bits).items():
            key = f"{name.removesuffix('.weight')}.{part}"
            tensors[key] = torch.from_numpy(np.ascontiguousarray(array))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    model_config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(model_config | {"quantization_config": config}))
    for extra in source.glob("*token*"):
        (target / extra.name).write_bytes(extra.read_bytes())
