"""Turn a recipe's calibration section into windows of tokens, for the commands that need them."""

from __future__ import annotations

from typing import Any

from qtool.calibration.datasets import DatasetSpec, from_recipe, parse_dataset
from qtool.calibration.tokens import Windows, token_windows
from qtool.checkpoint.locate import Checkpoint
from qtool.errors import DamagedError
from qtool.pipeline.progress import Progress
from qtool.recipe.schema import Recipe


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the model's tokenizer.

    Raises:
        DamagedError: there is none, or its files cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(checkpoint.path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DamagedError(
            f"the tokenizer of {checkpoint.path} cannot be loaded: {reason}",
            "tokenizer.json and tokenizer_config.json must lie beside the weights",
        ) from error


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe, progress: Progress) -> Windows:
    """Return the windows that a recipe asks for, with warnings passed on.

    Raises:
        UsageError: data that gives less than one window.
        DamagedError, HubError: as reading the data raises.
    """
    section = recipe.calibration
    windows = token_windows(
        load_tokenizer(checkpoint),
        [from_recipe(entry) for entry in section.datasets],
        windows=section.windows,
        length=section.sequence_length,
        seed=recipe.seed,
        chat_template=section.chat_template,
    )
    for message in windows.warnings:
        progress.warn("few_windows", message)
    return windows


def dataset_specs(texts: list[str] | None) -> list[DatasetSpec]:
    """Return the datasets of `--dataset` flags; builtin if there are none."""
    return [parse_dataset(text) for text in texts or ["builtin"]]
