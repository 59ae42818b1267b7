"""The model card beside a result: what it is, how it was made, how each engine loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from qtool import __version__

if TYPE_CHECKING:
    from qtool.pipeline.outputs import PlannedOutput
    from qtool.pipeline.plan import Plan
    from qtool.pipeline.quantize import QuantizeResult

_SNIPPETS = {
    "vLLM": "vllm serve PATH",
    "transformers": 'AutoModelForCausalLM.from_pretrained("PATH", device_map="auto")',
    "GPTQModel": 'GPTQModel.load("PATH")',
    "llama.cpp": "llama-cli -m FILE.gguf",
    "Ollama": "ollama create NAME -f Modelfile",
}


def model_card(result: QuantizeResult, index: int) -> str:
    """Return README.md of output `index`, with the metadata block that the hub reads."""
    plan, output = result.plan, result.plan.outputs[index]
    checkpoint = plan.checkpoint
    gguf = output.name.startswith("gguf:")
    modelfile = any(entry.modelfile for entry in plan.recipe.export)
    # A directory of this machine says nothing to others; a hub id, which has a revision, does.
    metadata: dict[str, object] = {
        "base_model": checkpoint.source if checkpoint.revision else checkpoint.name,
        "base_model_relation": "quantized",
        "library_name": "gguf" if gguf else "transformers",
        "tags": sorted({"qtool", output.name.partition(":")[0], plan.method.name}),
    }
    metadata.update(original_card(checkpoint.path))
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {checkpoint.name}, quantized",
        "",
        f"Made by qtool {__version__} from `{metadata['base_model']}`"
        + (f" at `{checkpoint.revision}`." if checkpoint.revision else "."),
        "",
        "| | |",
        "|---|---|",
        f"| method | {plan.method.name} |",
        f"| format | {output.name} |",
        *([] if gguf else [_bits(plan)]),
        f"| bits per quantized weight, scales included | {plan.bits_per_weight:.3f} |",
        f"| kept as float | {'' if gguf else 'embeddings, '}norms{_kept(output)} |",
        *_calibration(result),
        *_measured(result, index),
        "",
        "`qtool-recipe.yaml` makes the same files again, `qtool-report.json` has a line for every",
        "layer, `SHA256SUMS` the checksums (`sha256sum -c SHA256SUMS`).",
        "",
        "## How to load it",
        "",
        *[line for engine in output.loads_in for line in _snippet(engine, modelfile=modelfile)],
    ]
    return "\n".join(lines).rstrip() + "\n"


def _bits(plan: Plan) -> str:
    quantize = plan.recipe.quantize
    spread = {-1: "channel", 0: "matrix"}.get(quantize.group_size, f"{quantize.group_size} weights")
    sign = "symmetric" if quantize.symmetric else "asymmetric"
    return f"| bits | {quantize.bits}, {sign}, one scale per {spread} |"


def original_card(directory: Path) -> dict[str, object]:
    """Return licence and languages from the original's own card, empty if it has none."""
    card = directory / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        found = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        return {}
    if not isinstance(found, dict):
        return {}
    keys = ("license", "license_name", "license_link", "language", "pipeline_tag")
    return {key: found[key] for key in keys if key in found}


def _kept(output: PlannedOutput) -> str:
    return "".join(f", `{name}`" for name in output.kept[:4]) + (
        f" and {len(output.kept) - 4} more" if len(output.kept) > 4 else ""
    )


def _calibration(result: QuantizeResult) -> list[str]:
    windows = result.windows
    if windows is None:
        return []
    names = ", ".join(Path(source.name).name for source in windows.sources)
    size = f"{len(windows.ids)} windows of {windows.ids.shape[1]} tokens"
    return [f"| calibrated on | {json.dumps(names)[1:-1]}, {size} |"]


def _measured(result: QuantizeResult, index: int) -> list[str]:
    if not result.metrics:
        return []
    metrics = result.metrics[index]
    ppl, kld, top1 = metrics["ppl"], metrics["kld"], metrics["top1"]
    text = result.plan.recipe.eval.data
    name = "built-in text" if text == "builtin" else json.dumps(Path(text).name)[1:-1]
    tokens = f"{kld['tokens']} tokens of {name}"
    return [
        f"| perplexity, original | {ppl['reference']:.3f} on {tokens} |",
        f"| perplexity, this | {ppl['value']:.3f} |",
        f"| KL divergence | {kld['mean']:.4f} ± {kld['se']:.4f} |",
        f"| same top token | {100 * top1['value']:.1f} % |",
    ]


def _snippet(engine: str, *, modelfile: bool) -> list[str]:
    code = _SNIPPETS.get(engine, "")
    if engine == "Ollama" and not modelfile:
        code = "echo FROM ./FILE.gguf > Modelfile && ollama create NAME -f Modelfile"
    return [f"- {engine}: `{code}`"] if code else [f"- {engine}"]
