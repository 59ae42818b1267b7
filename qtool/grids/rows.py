"""Which group sizes divide a row; no torch, so that a wrong one is refused in no time."""

from __future__ import annotations

from qtool.errors import UsageError


def no_group(group_size: int, columns: int) -> UsageError:
    """Return the refusal of a group size that does not divide a row of `columns` weights."""
    works = [g for g in range(16, 1025) if columns % g == 0 and g % 8 == 0]
    return UsageError(
        f"group size {group_size} does not divide a row of {columns} weights",
        f"group sizes that do: {', '.join(map(str, works)) or 'none'}; or one scale per "
        "row with --group-size -1",
    )
