"""Find a model and refuse a bad one, before anything that imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from qtool.calibration.datasets import DatasetSpec, check_file
from qtool.calibration.statistics_source import open_statistics
from qtool.checkpoint.locate import Checkpoint, locate
from qtool.checkpoint.untrusted import naming
from qtool.errors import CapacityError
from qtool.pipeline.admission import admit, check_has_tokenizer, check_recipe
from qtool.recipe.sizes import shown_size

LEAST_ADDRESS_SPACE = 640_000_000  # bytes; under 600 MB PyTorch 2 falls over

if TYPE_CHECKING:
    from qtool.console import Terminal
    from qtool.recipe.schema import Recipe


def admitted(
    model: str,
    terminal: Terminal,
    *,
    revision: str | None = None,
    offline: bool = False,
    gguf: bool = False,
    trust_remote_code: bool = False,
    tokenizer: bool = True,
    statistics: Iterable[Path] = (),
    datasets: Sequence[DatasetSpec] = (),
    needs_tokenizer: bool = False,
) -> Checkpoint:
    """Return a model that may be worked on; warnings go to the terminal.

    Raises:
        QtoolError: as `locate` and `admit`; or a file that goes with it is unusable.
        CapacityError: PyTorch has no room.
    """
    checkpoint = locate(model, revision, offline, gguf=gguf)
    warnings = admit(checkpoint, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
    if needs_tokenizer and not checkpoint.gguf:
        check_has_tokenizer(checkpoint)
    for path in statistics:
        open_statistics(path)
    for spec in datasets:
        check_file(spec)
    _check_address_space()  # after all that a refusal needs little memory for
    progress = terminal.progress()
    for code, message in warnings:
        progress.warn(code, message)
    return checkpoint


def _check_address_space() -> None:
    """Refuse a limit under which PyTorch and numpy end the process while they are loaded."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < LEAST_ADDRESS_SPACE:
        raise CapacityError(
            f"this process may take only {shown_size(limit)} of address space; PyTorch alone "
            f"takes {shown_size(LEAST_ADDRESS_SPACE)}",
            "raise the limit (ulimit -v)",
        )


def admitted_for(
    recipe: Recipe,
    terminal: Terminal,
    *,
    offline: bool,
    trust_remote_code: bool,
    statistics: Path | None,
    file: Path | None,
) -> Checkpoint:
    """Return the model of a resolved recipe, read from `file` if any, that `quantize` may work on.

    Raises:
        QtoolError: as `admitted` and `check_recipe`.
    """
    from qtool.calibration.datasets import from_recipe, parse_dataset

    with naming(file) if file is not None else nullcontext():
        specs = [from_recipe(entry) for entry in recipe.calibration.datasets]
        if recipe.eval.metrics:
            specs.append(parse_dataset(recipe.eval.data))
    # A method that reads no such file says so itself.
    usable = recipe.quantize.method in {"rtn", "awq"}
    checkpoint = admitted(
        recipe.model.id,
        terminal,
        revision=recipe.model.revision,
        offline=offline,
        trust_remote_code=trust_remote_code,
        statistics=[statistics] if statistics is not None and usable else [],
        datasets=specs,
        needs_tokenizer=recipe.quantize.method != "rtn" or bool(recipe.eval.metrics),
    )
    with naming(file) if file is not None else nullcontext():
        check_recipe(checkpoint, recipe)
    return checkpoint


def check_files(models: Sequence[Checkpoint]) -> None:
    """Refuse GGUF files among models that llama.cpp cannot evaluate.

    Raises:
        UnsupportedError: one does not continue text.
    """
    from qtool.evaluation.gguf_contents import check_continues_text

    for model in models:
        if model.gguf:
            check_continues_text(model.gguf[0])
