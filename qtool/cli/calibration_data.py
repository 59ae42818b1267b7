"""Turn a recipe's calibration section into windows of tokens, for the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.calibration.datasets import DatasetSpec, from_recipe, parse_dataset
from qtool.checkpoint.locate import Checkpoint
from qtool.checkpoint.untrusted import SCARCE, printable, read_error, shown_path
from qtool.errors import DamagedError, is_out_of_memory

if TYPE_CHECKING:
    from qtool.calibration.tokens import Windows
    from qtool.pipeline.progress import Progress
    from qtool.recipe.schema import Recipe


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the model's tokenizer.

    Raises:
        DamagedError: there is none, or its files cannot be read.
        CapacityError: the process may open no more files.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    # What transformers raises where a file does not say what it expects.
    faults: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError, ImportError)
    faults += (RuntimeError, AttributeError, AssertionError, ArithmeticError, StrictDataclassError)
    try:
        return AutoTokenizer.from_pretrained(
            str(checkpoint.path), local_files_only=True, trust_remote_code=False
        )
    except faults as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno in SCARCE:
            raise read_error(Path(error.filename or checkpoint.path), error) from error
        reason = printable(" ".join(str(error).split()) or repr(error))
        raise DamagedError(
            f"the tokenizer of {shown_path(checkpoint.path)} cannot be loaded: {reason}",
            "tokenizer.json and tokenizer_config.json must lie beside the weights",
        ) from error


def calibration_windows(checkpoint: Checkpoint, recipe: Recipe, progress: Progress) -> Windows:
    """Return the windows that a recipe asks for, with warnings passed on.

    Raises:
        UsageError: data that gives less than one window.
        DamagedError, HubError: as reading the data raises.
    """
    from qtool.calibration.tokens import token_windows

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
    check_ids(checkpoint, windows)
    return windows


def check_ids(checkpoint: Checkpoint, windows: Windows) -> None:
    """Check that every token of the text has a row in the model's embedding.

    Raises:
        DamagedError: one has none.
    """
    rows, largest = checkpoint.config.get("vocab_size"), int(windows.ids.max())
    if type(rows) is int and largest >= rows:
        raise DamagedError(
            f"the tokenizer of {shown_path(checkpoint.path)} makes the token {largest} of this "
            f"text, but the embedding has only {rows} rows",
            "the tokenizer files belong to another model; get both from one place",
        )


def dataset_specs(texts: list[str] | None) -> list[DatasetSpec]:
    """Return the datasets of `--dataset` flags; builtin if there are none."""
    return [parse_dataset(text) for text in texts or ["builtin"]]
