"""How `qtool quantize` measures what it made: the text of the recipe, its figures and gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qtool.calibration.datasets import parse_dataset
from qtool.calibration.tokens import evaluation_windows
from qtool.cli.calibration_data import check_ids, load_tokenizer
from qtool.pipeline.measurement import Measurer, wanted_metrics

if TYPE_CHECKING:
    import torch

    from qtool.checkpoint.locate import Checkpoint
    from qtool.evaluation.gates import Gate
    from qtool.pipeline.progress import Progress
    from qtool.recipe.schema import Recipe


def measurer_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    gates: Sequence[Gate],
    device: torch.device,
    progress: Progress,
) -> Measurer | None:
    """Return what measures the outputs of a recipe; None where nothing is asked for.

    Raises:
        UsageError, DamagedError, HubError: the evaluation text cannot be read or is too short.
    """
    section, metrics = recipe.eval, wanted_metrics(recipe, gates)
    if not metrics and not gates:
        return None
    windows = None
    if metrics:
        windows = evaluation_windows(
            load_tokenizer(checkpoint),
            parse_dataset(section.data),
            length=section.context,
            limit=section.windows,
        )
        check_ids(checkpoint, windows)
    return Measurer(checkpoint, windows, metrics, tuple(gates), device, progress)
