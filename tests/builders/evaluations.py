"""Objects as `qtool eval --json` prints them, with everything that a report can show."""

import math
import random

KINDS = ("prose", "code", "digits", "non-Latin")
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
WEIGHTS = 1_000_000
# name, format, bits per weight, KL divergence: the third is beaten by the second in both.
MODELS = (
    ("./tiny-Q4_K_M.gguf", "gguf:Q4_K_M", 4.9, 0.061),
    ("./tiny-gptq4", "gptq", 4.5, 0.074),
    ("./tiny-rtn4", "gptq", 4.6, 0.31),
    ("./tiny-Q8_0.gguf", "gguf:Q8_0", 8.5, 0.0031),
)


def figure(value, spread=0.03):
    return {"value": value, "se": value * spread, "tokens": 4088}


def score(value, reference, samples=60):
    """A task's figure beside the original's."""
    return {
        "value": value,
        "se": 0.056,
        "reference": reference,
        "reference_se": 0.056,
        "difference": value - reference,
        "difference_se": 0.03,
        "won": 3,
        "lost": 3 + round(samples * (reference - value)),
        "mcnemar_p": 0.4,
    }


def model_result(name, kind, bits, divergence, *, blocks=5, seed=0):
    """One entry of `results`."""
    draw = random.Random(seed)
    top1 = 1 - min(0.6, 0.4 * math.sqrt(divergence))
    return {
        "model": name,
        "format": kind,
        "bytes": int(bits * WEIGHTS / 8),
        "seconds": 12.5,
        "metrics": {
            "ppl": {
                **figure(12 * math.exp(divergence), 0.1),
                "reference": 12.0,
                "ratio": math.exp(divergence),
                "ratio_se": 0.002,
            },
            "kld": {
                "mean": divergence,
                "se": divergence * 0.04,
                "median": divergence * 0.6,
                "p99": divergence * 7,
                "p99_se": divergence * 0.9,
                "p999": divergence * 20,
                "tokens": 4096,
                "tail_error": divergence * 1e-3,
            },
            "top1": figure(top1, 0.01),
            "flips": figure((1 - top1) / 3),
            "tasks": {
                "quiz": {
                    "source": "file",
                    "samples": 60,
                    "sha256": 64 * "b",
                    "metric": "acc",
                    **score(0.75 - divergence / 3, 0.75),
                    "other": {"acc_norm": score(0.7, 0.72)},
                }
            },
        },
        "positions": [
            {
                "start": start,
                "stop": stop,
                "loss": 2.5 + divergence,
                "loss_se": 0.05,
                "reference_loss": 2.5,
                "kld": divergence * (1 + index / 5),
                "kld_se": divergence * 0.05,
                "tokens": 512,
            }
            for index, (start, stop) in enumerate([(0, 128), (128, 256), (256, 512), (512, 1024)])
        ],
        "domains": {
            kind: {
                "ppl": 9 * math.exp(divergence * factor),
                "ppl_reference": 9.0,
                "kld": divergence * factor,
                "kld_se": divergence * 0.05,
                "top1": top1,
                "tokens": 1024,
            }
            for kind, factor in zip(KINDS, (0.8, 0.6, 1.2, 2.0), strict=True)
        },
        "tokenizer": {"same": True, "template": "same", "differences": []},
        "layers": [
            {
                "name": f"model.layers.{block}.{linear}",
                "relative_error": draw.uniform(0.01, 0.1),
                "bits_per_weight": bits,
            }
            for block in range(blocks)
            for linear in LINEARS
        ],
    }


def evaluation(models=MODELS, *, gates=("kld<=0.07", "size<=800kB"), **changes):
    """A whole object; `changes` replace its entries."""
    results = [model_result(*model, seed=seed) for seed, model in enumerate(models)]
    value = {
        "schema": "qtool.eval/1",
        "ok": True,
        "exit_code": 0,
        "data": {"name": "builtin", "context": 1024, "windows": 4, "sha256": 64 * "a"},
        "reference": {
            "model": "owner/tiny",
            "format": "float",
            "bytes": 2 * WEIGHTS,
            "parameters": WEIGHTS,
        },
        "noise_floor": {"dtype": "bfloat16", "kld": {"mean": 4e-4, "se": 2e-5}},
        "results": results,
        "gates": [verdict(gate, result) for gate in gates for result in results],
        "warnings": [],
        "error": None,
    }
    return {**value, **changes}


def verdict(expression, result):
    """What became of a gate on KL divergence or size."""
    kld = result["metrics"]["kld"]
    if expression.startswith("size"):
        limit = float(expression.removeprefix("size<=").removesuffix("kB")) * 1000
        value, error = result["bytes"], None
    else:
        limit = float(expression.removeprefix("kld<="))
        value, error = kld["mean"], kld["se"]
    return {
        "expression": expression,
        "model": result["model"],
        "value": value,
        "se": error,
        "pass": value <= limit,
    }
