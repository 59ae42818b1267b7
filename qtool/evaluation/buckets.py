"""Loss and divergence by position in the window: long context is what degrades first."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qtool.errors import UsageError
from qtool.evaluation.perplexity import Estimate, mean_over_windows
from qtool.evaluation.scores import Scores

MANY = 2**20  # tokens of a window: more is a slip of the finger


@dataclass(frozen=True)
class PositionBucket:
    """Tokens that have `start` to `stop` tokens before them in the window.

    Args:
        start: first position.
        stop: position behind the last.
        loss: mean -log p in nats.
        reference_loss: the reference's, None without one.
        divergence: mean KL(reference || model) in nats, None without a reference.
    """

    start: int
    stop: int
    loss: Estimate
    reference_loss: Estimate | None = None
    divergence: Estimate | None = None


def parse_long_context(text: str) -> tuple[int, ...]:
    """Read `4k,8k,16k` as ends of position buckets; k is 1024.

    Raises:
        UsageError: not numbers, not rising, or absurd.
    """
    hint = "write rising lengths, such as --long-ctx 4k,8k,16k"
    ends = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(k?)\s*", part, re.IGNORECASE)
        if match is None:
            raise UsageError(f"--long-ctx: '{part.strip()}' is not a number of tokens", hint)
        ends.append(int(match[1]) * (1024 if match[2] else 1))
    if any(later <= earlier for earlier, later in itertools.pairwise(ends)):
        raise UsageError(f"--long-ctx: {text} does not rise", hint)
    if ends[0] < 2 or ends[-1] > MANY:
        raise UsageError(f"--long-ctx: lengths go from 2 to {MANY}, not {text}", hint)
    return tuple(ends)


def by_position(scores: Sequence[Scores], ends: Sequence[int]) -> list[PositionBucket]:
    """Return loss and divergence of the tokens between 0 and the first end, and so on.

    A position is the number of the last token that is read, so the loss there is that of the token
    after it.

    Args:
        scores: of windows as long as the last end.
        ends: rising.
    """
    found = []
    for start, stop in zip((0, *ends), ends, strict=False):
        part = slice(start, stop)
        against = [window.reference for window in scores if window.reference is not None]
        losses = [window.losses[part] for window in scores]
        if not len(losses[0]):  # the last token of a window, whose successor is not known
            continue
        found.append(
            PositionBucket(
                start,
                stop,
                mean_over_windows(losses),
                mean_over_windows([w.losses[part] for w in against]) if against else None,
                mean_over_windows([w.divergences[part] for w in against]) if against else None,
            )
        )
    return found


def bucket_json(bucket: PositionBucket) -> dict[str, Any]:
    """Return a bucket in the terms of the JSON contract."""
    found: dict[str, Any] = {
        "start": bucket.start,
        "stop": bucket.stop,
        "loss": bucket.loss.value,
        "loss_se": bucket.loss.standard_error,
        "tokens": bucket.loss.tokens,
    }
    if bucket.reference_loss is not None and bucket.divergence is not None:
        found["reference_loss"] = bucket.reference_loss.value
        found["kld"] = bucket.divergence.value
        found["kld_se"] = bucket.divergence.standard_error
    return found
