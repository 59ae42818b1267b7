"""A table of models that can be read at any width: lying where it fits, else standing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

GAP = 2
SHORTEST_NAME = 20  # cells that a model's name may be folded to


@dataclass(frozen=True)
class ComparisonTable:
    """A row for each model where the terminal is wide enough for all figures, else a column.

    Args:
        titles: of the figures; the first is of the names.
        rows: for each model its name, then one text for each figure.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.text import Text

        room = options.max_width
        columns = list(zip(self.titles, *self.rows, strict=True))
        widths = [max(map(_cells, column)) for column in columns]
        name = min(widths[0], SHORTEST_NAME)
        if name + sum(widths[1:]) + GAP * (len(widths) - 1) <= room:
            yield self._lying()
            return
        figure = max(_cells(text) for row in self.rows for text in row[1:])
        across = max(1, (room - max(map(_cells, self.titles))) // (figure + GAP))
        for start in range(0, len(self.rows), across):
            if start:
                yield Text()
            yield self._standing(self.rows[start : start + across], figure)

    def _lying(self) -> Table:
        table = _table()
        table.add_column(self.titles[0], overflow="fold")
        for title in self.titles[1:]:
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def _standing(self, rows: Sequence[Sequence[str]], width: int) -> Table:
        table = _table()
        table.add_column(self.titles[0], no_wrap=True)
        for name, *_ in rows:
            table.add_column(name, justify="right", overflow="fold", width=width)
        for index, title in enumerate(self.titles[1:], 1):
            table.add_row(title, *(row[index] for row in rows))
        return table


def _table() -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False)


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
