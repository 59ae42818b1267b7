"""Make usable means of the sums in a statistics file, whoever wrote it and whatever happened.

llama.cpp refuses a matrix with one value that is no number, often after hours. What is wrong with
a few columns is no reason to do without the others: they take the mean of the usable ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qtool.checkpoint.untrusted import printable

LARGEST = 1e20  # mean squares beyond it are no activations, and their products would overflow
MOST_NAMED = 3  # tensors that a warning lists
Floats = NDArray[np.float32]


@dataclass
class Faults:
    """What was wrong in a file, by tensor name; filled while it is read."""

    replaced: list[str] = field(default_factory=list)  # some columns negative or not finite
    unusable: list[str] = field(default_factory=list)  # no column that says anything
    unseen: list[str] = field(default_factory=list)  # experts without a token
    zero_columns: int = 0
    with_zeros: list[str] = field(default_factory=list)

    def warnings(self, where: str) -> tuple[str, ...]:
        """Return a line for each kind of fault that there was; `where` names the file."""
        found = []
        if self.replaced:
            found.append(
                f"{where} has values that are negative, too large or not finite in "
                f"{listed(self.replaced)}: those columns count as the tensor's average"
            )
        if self.unusable:
            found.append(
                f"{where} says nothing usable about {listed(self.unusable)}: rounded without "
                "importance"
            )
        if self.unseen:
            found.append(
                f"{where} has experts that read no text in {listed(self.unseen)}: all their "
                "columns count alike"
            )
        if self.with_zeros:
            found.append(
                f"{where} has {self.zero_columns} columns that are always zero in "
                f"{listed(self.with_zeros)}"
            )
        return tuple(found)


def usable_means(name: str, sums: Floats, counts: Floats, faults: Faults) -> Floats | None:
    """Return mean squares [matrices, C] without anything that would stop a rounding.

    An expert that saw no token gets ones, as llama.cpp has it. Columns that are zero stay zero.

    Args:
        name: of the tensor.
        sums: [matrices, C], sums of squares.
        counts: [matrices], the tokens that they were summed over.
        faults: what was found is added to them.

    Returns:
        None if no column of the tensor is usable.
    """
    with np.errstate(all="ignore"):
        seen = np.isfinite(counts) & (counts >= 0.5)  # llama.cpp rounds them to integers
        means = sums / np.where(seen, counts, 1)[:, None]
        usable = (means >= 0) & (means <= LARGEST) & seen[:, None]  # false for what is no number
    if not (means[usable] > 0).any():
        faults.unusable.append(name)
        return None
    broken = seen[:, None] & ~usable
    average = means[usable].mean(dtype=np.float64)
    means = np.where(broken, average, means)
    means[~seen] = 1
    zeros = int((means == 0).sum())
    if broken.any():
        faults.replaced.append(name)
    if not seen.all():
        faults.unseen.append(name)
    if zeros:
        faults.zero_columns += zeros
        faults.with_zeros.append(name)
    return np.ascontiguousarray(means, np.float32)


def usable_magnitudes(sums: Floats | None, counts: Floats, squares: Floats) -> Floats:
    """Return mean magnitudes [matrices, C]; the root of the mean square where there are none.

    Args:
        sums: [matrices, C], sums of |x|; None where the file has none.
        counts: [matrices].
        squares: [matrices, C], usable mean squares.
    """
    roots = np.sqrt(squares)
    if sums is None:
        return roots
    with np.errstate(all="ignore"):
        means = sums / counts[:, None]
        usable = (means >= 0) & (means <= LARGEST)
    return np.ascontiguousarray(np.where(usable, means, roots), np.float32)


def listed(names: Sequence[str]) -> str:
    """Return a few of the names and how many more there are, safe to show."""
    more = len(names) - MOST_NAMED
    shown = ", ".join(printable(name) for name in names[:MOST_NAMED])
    return f"{shown} and {more} more" if more > 0 else shown
