"""qtool: quantize Hugging Face language models into files that people run."""

__version__ = "0.1.0"
