"""What every grid offers: which values a weight may become, and nothing about why one is chosen.

A rounding method (rtn, gptq) sees only these protocols; a format sees the concrete grid. Shapes:
R = out_features (rows), C = in_features (columns).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from qtool.grids.refit import Refit


class ColumnRounder(Protocol):
    """Rounds one column at a time with parameters that are already fixed."""

    def encode(self, column: Tensor, index: int) -> Tensor:
        """Return the codes [R] (float32, integer-valued) of column `index`, values [R]."""

    def decode(self, codes: Tensor, index: int) -> Tensor:
        """Return the values [R] float32 that the codes [R] of column `index` stand for."""


class Grid(Protocol):
    """A set of values that a weight matrix can take, with its scales and offsets.

    `P` below is the grid's own parameters type: a frozen dataclass of tensors whose first
    dimension is R, so that matrices that share an input can be rounded together and taken apart.
    """

    @property
    def name(self) -> str:
        """Short name for tables, such as `int4-asym-g128`."""

    @property
    def bits(self) -> int:
        """Bits of one code, without scales."""

    def check_row(self, columns: int) -> None:
        """Raise UsageError, naming what works, if a row of `columns` weights does not fit."""

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Return the mean bits of one weight, scales and offsets included."""

    def plain(self) -> Grid:
        """Return the same values with the cheapest fit: what round-to-nearest baselines use."""

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Any:
        """Choose parameters P for weight [R, C] float32; importance [C] weighs squared errors."""

    def encode(self, weight: Tensor, parameters: Any) -> Tensor:
        """Return uint8 codes [R, C] of the nearest values to weight [R, C] float32."""

    def decode(self, codes: Tensor, parameters: Any) -> Tensor:
        """Return the values [R, C] float32 that codes [R, C] uint8 stand for."""

    def columns(self, parameters: Any) -> ColumnRounder:
        """Return a rounder of single columns for parameters that are already chosen."""

    def refit(self, codes: Tensor, parameters: Any) -> Refit | None:
        """Return what may move while codes [R, C] uint8 stay, None if nothing may."""

    def join(self, parts: list[Any]) -> Any:
        """Stack the parameters of several matrices along R."""

    def rows(self, parameters: Any, start: int, stop: int) -> Any:
        """Return the parameters of rows `start` to `stop`."""


@dataclass(frozen=True)
class QuantizedTensor:
    """A rounded weight matrix, not yet packed for any file format; its tensors are read-only."""

    codes: Tensor  # [R, C] uint8
    parameters: Any  # the grid's own type
    grid: Grid

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self) -> Tensor:
        """Return the [R, C] float32 weight this tensor stands for."""
        return self.grid.decode(self.codes, self.parameters)

    def cpu(self) -> QuantizedTensor:
        """Return the same in host memory."""
        moved = {f.name: getattr(self.parameters, f.name).cpu() for f in fields(self.parameters)}
        return QuantizedTensor(self.codes.cpu(), type(self.parameters)(**moved), self.grid)

    def select_rows(self, order: Tensor) -> QuantizedTensor:
        """Return the rows named by `order`, int64, in that order."""
        taken = {f.name: getattr(self.parameters, f.name)[order] for f in fields(self.parameters)}
        return QuantizedTensor(self.codes[order], type(self.parameters)(**taken), self.grid)

    def split_rows(self, sizes: list[int]) -> list[QuantizedTensor]:
        """Take a tensor that was rounded as one apart into matrices of `sizes` rows."""
        parts, start = [], 0
        for size in sizes:
            parameters = self.grid.rows(self.parameters, start, start + size)
            parts.append(QuantizedTensor(self.codes[start : start + size], parameters, self.grid))
            start += size
        return parts
