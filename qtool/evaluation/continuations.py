"""What a task asks of a model: how likely continuations of a text are, and what it goes on with.

Requests of all tasks go through a model together. What two of them begin with alike is run once
where one is the beginning of the other, as with choices of one token; the rest is sorted by
length into buckets and filled up on the right, which causal attention never sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Tokens = tuple[int, ...]
# Begin a phase (title, steps, unit) and get what is to be called after each step.
Begin = Callable[[str, int, str], Callable[[], None]]
SHORTEST = 16  # tokens of the smallest bucket
PER_OCTAVE = 8  # buckets between one power of two and the next: at most an eighth is filled up


def no_steps(title: str, total: int, unit: str) -> Callable[[], None]:
    """Tell nobody about a phase."""
    del title, total, unit
    return lambda: None


@dataclass(frozen=True)
class Request:
    """Ask for the probability of `continuation`, not empty, behind `context`, not empty either."""

    context: Tokens
    continuation: Tokens

    @property
    def read(self) -> Tokens:
        """The tokens that the model must read to predict every token of the continuation."""
        return (self.context + self.continuation)[:-1]

    @property
    def first(self) -> int:
        """The row of logits that predicts the first token of the continuation."""
        return len(self.context) - 1


@dataclass(frozen=True)
class Answer:
    """What a model says to a request.

    Args:
        log_probability: of the whole continuation, in nats.
        greedy: for each token of the continuation, the likeliest one in its place.
    """

    log_probability: float
    greedy: Tokens


class TaskRunner(Protocol):
    """A model that answers tasks."""

    @property
    def longest(self) -> int:
        """Most tokens that it was made to read."""

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all requests, in one run through the model."""

    def generate(
        self, prompts: Sequence[Tokens], most: Sequence[int], ended: Callable[[int, Tokens], bool]
    ) -> list[Tokens]:
        """Go on greedily from prompts until `ended(number of prompt, tokens)`, or `most` tokens."""

    def close(self) -> None:
        """Free the model."""


def covers(requests: Sequence[Request]) -> list[tuple[Tokens, list[int]]]:
    """Return the fewest sequences of which each request reads a beginning.

    Returns:
        The sequences, sorted, each with the numbers of the requests that it answers.
    """
    order = sorted(range(len(requests)), key=lambda index: requests[index].read)
    found: list[tuple[Tokens, list[int]]] = []
    # What begins with a sequence follows it directly in this order.
    for index in reversed(order):
        read = requests[index].read
        if not found or found[-1][0][: len(read)] != read:
            found.append((read, []))
        found[-1][1].append(index)
    return found[::-1]


def bucket_of(length: int) -> int:
    """Return the length to which sequences of a length are filled up.

    Powers of two are never crossed: rotary embeddings that change with the length of the window do
    so there.
    """
    if length <= SHORTEST:
        return SHORTEST
    step = 1 << max(0, (length - 1).bit_length() - PER_OCTAVE.bit_length())
    return -(-length // step) * step
