"""The model card beside a result: what it is, how it was made, how each engine loads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qtool import __version__
from qtool.checkpoint.untrusted import open_regular, printable
from qtool.errors import QtoolError
from qtool.recipe.yaml_text import read_yaml

if TYPE_CHECKING:
    from qtool.pipeline.outputs import PlannedOutput
    from qtool.pipeline.plan import Plan
    from qtool.pipeline.quantize import QuantizeResult

MAX_METADATA_BYTES = 256 << 10  # of the block between the lines ---
MOST_LANGUAGES = 500
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
    name = printable(checkpoint.name)
    gguf = output.name.startswith("gguf:")
    modelfile = any(entry.modelfile for entry in plan.recipe.export)
    # A directory of this machine says nothing to others; a hub id, which has a revision, does.
    metadata: dict[str, object] = {
        "base_model": printable(checkpoint.source) if checkpoint.revision else name,
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
        f"# {_literal(name)}, quantized",
        "",
        f"Made by qtool {__version__} from {_code(str(metadata['base_model']))}"
        + (f" at {_code(checkpoint.revision)}." if checkpoint.revision else "."),
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


def original_card(directory: Path) -> dict[str, Any]:
    """Return licence and languages from the original's own card, empty if it has none.

    It is a stranger's: plain words are taken over and nothing else.
    """
    try:
        file, _ = open_regular(directory / "README.md")
        with file:
            text = file.read(MAX_METADATA_BYTES).decode("utf-8", errors="ignore")
        text = text.replace("\r\n", "\n")
        if not text.startswith("---\n") or "\n---" not in text[4:]:
            return {}
        found = read_yaml(text[4:].split("\n---", 1)[0], "README.md")
    except (QtoolError, OSError):
        return {}
    if not isinstance(found, dict):
        return {}
    keys = ("license", "license_name", "license_link", "language", "pipeline_tag")
    plain = {key: _plain(found.get(key)) for key in keys}
    return {key: value for key, value in plain.items() if value}


def _plain(value: object) -> str | list[str] | None:
    """Return a word or a list of words, None for anything else."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [printable(item) for item in value[:MOST_LANGUAGES]]
    return None


def _literal(text: str) -> str:
    from qtool.evaluation.report_markdown import literal

    return literal(printable(text))


def _code(text: str) -> str:
    """Return text in a span of code, in a table or out of it."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _kept(output: PlannedOutput) -> str:
    return "".join(f", {_code(name)}" for name in output.kept[:4]) + (
        f" and {len(output.kept) - 4} more" if len(output.kept) > 4 else ""
    )


def _calibration(result: QuantizeResult) -> list[str]:
    windows = result.windows
    if windows is None:
        return []
    names = ", ".join(Path(source.name).name for source in windows.sources)
    size = f"{len(windows.ids)} windows of {windows.ids.shape[1]} tokens"
    return [f"| calibrated on | {_literal(names)}, {size} |"]


def _measured(result: QuantizeResult, index: int) -> list[str]:
    if not result.metrics:
        return []
    metrics = result.metrics[index]
    ppl, kld, top1 = metrics["ppl"], metrics["kld"], metrics["top1"]
    text = result.plan.recipe.eval.data
    name = "built-in text" if text == "builtin" else _literal(Path(text).name)
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
