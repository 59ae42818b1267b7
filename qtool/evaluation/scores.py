"""Every token's figures, window by window: the little that is kept of all the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.untrusted import printable
from qtool.errors import NumericalError
from qtool.evaluation.rows import PIECE_ROWS, ReferenceRows, RowScores, score_rows


@dataclass(frozen=True)
class AgainstReference:
    """One window of a model against its reference, on the CPU.

    Args:
        losses: [length - 1] float64, the reference's -log p of each token but the first.
        right: [length - 1] bool, whether the reference found the token that follows likeliest.
        divergences: [length] float64, KL(reference || model) in nats.
        same_top: [length] bool, whether both find the same token likeliest.
        differences: [any] float64, see `RowScores`; empty where the reference is whole.
    """

    losses: Tensor
    right: Tensor
    divergences: Tensor
    same_top: Tensor
    differences: Tensor


@dataclass(frozen=True)
class Scores:
    """One window of a model, on the CPU: `losses` and `right` as in `AgainstReference`."""

    losses: Tensor
    right: Tensor
    reference: AgainstReference | None = None


def score_windows(
    model: Iterable[Tensor],
    reference: Iterable[ReferenceRows] | None,
    windows: Tensor,
    names: tuple[str, str] = ("the model", "the reference"),
    tick: Callable[[], None] = lambda: None,
) -> list[Scores]:
    """Score a model's logits piece by piece; never holds more than one piece of each.

    Args:
        model: pieces [at most PIECE_ROWS, vocabulary] float32, see `row_pieces`.
        reference: the reference's, in step.
        windows: token ids [windows, length].
        names: of both, for messages.
        tick: called after each window.

    Raises:
        NumericalError: logits that are not finite.
    """
    logits = iter(model)
    expected = None if reference is None else iter(reference)
    found = []
    for ids in windows:
        rows = []
        for start in range(0, len(ids), PIECE_ROWS):
            piece = next(logits)
            # The last row of a window predicts nothing that is known: any target will do.
            targets = torch.zeros(len(piece), dtype=torch.int64)
            following = ids[start + 1 : start + 1 + len(piece)]
            targets[: len(following)] = following
            targets = targets.to(piece.device)
            if expected is None:
                scores = score_rows(piece, targets)
            else:
                scores = next(expected).against(piece, targets)
            rows.append(_checked(scores, names))
        found.append(_window(rows, ids))
        tick()
    return found


def row_pieces(windows: Iterable[Tensor]) -> Iterator[Tensor]:
    """Cut whole windows of rows [length, ...] into pieces of PIECE_ROWS."""
    for window in windows:
        yield from window.split(PIECE_ROWS)


def _checked(scores: RowScores, names: tuple[str, str]) -> RowScores:
    """Move scores to the CPU; a total that is not finite gives away logits that are not."""
    moved = RowScores(**{key: _on_cpu(value) for key, value in vars(scores).items()})
    # The model comes last: where both are at fault, the reference is what to look at first.
    faults = ((1, moved.reference_losses), (0, moved.losses), (0, moved.divergences))
    for name, values in faults:
        if values is not None and not bool(torch.isfinite(values).all()):
            raise not_finite(names[name], original=name == 1)
    return moved


def not_finite(name: str, *, original: bool = False) -> NumericalError:
    """Return the error for a model whose logits are no numbers.

    Args:
        name: of the model.
        original: whether others are compared with it, so that no quantization made it so.
    """
    hint = (
        "nothing can be compared with it: try another --dtype, or get the original again"
        if original
        else "the model overflows; try another --dtype, or make it again with more bits"
    )
    return NumericalError(f"{printable(name)} gives logits that are not finite", hint)


def _on_cpu(values: Any) -> Any:
    return None if values is None else values.cpu()


def _window(rows: list[RowScores], ids: Tensor) -> Scores:
    """Join the pieces of one window."""

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    losses, top = joined("losses")[:-1], joined("top")
    right = top[:-1] == ids[1:]
    if rows[0].divergences is None:
        return Scores(losses, right)
    expected = joined("reference_top")
    exact = [row.differences for row in rows if row.differences is not None]
    return Scores(
        losses,
        right,
        AgainstReference(
            joined("reference_losses")[:-1],
            expected[:-1] == ids[1:],
            joined("divergences"),
            top == expected,
            torch.cat(exact) if exact else torch.empty(0, dtype=torch.float64),
        ),
    )
