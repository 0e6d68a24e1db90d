"""Figures of the columns of a table over its training rows, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dmtg_core.tables.cells import cell_number, has_leading_zero
from dmtg_core.tables.dates import CLOCK_PART, PARTS, formats_of, has_clock, parts_of, read_date

SAMPLED_ROWS = 20_000  # training rows from which quantiles are computed
MOST_VALUES = 10_000  # different cells of a column that are held
FAR = 20  # binary orders of magnitude, about six decimal ones, that make a number an outlier
_FOLDED = 4096  # numbers that are added at a time
T = TypeVar("T")
Rows = Iterable[Mapping[str, str]]  # column → cell; each pass starts from the beginning


class ExactSum:
    """The sum of numbers, rounded once as by `math.fsum`, in bounded memory.

    The numbers so far are replaced by a few that have exactly the same sum (Shewchuk, Adaptive Precision
    Floating-Point Arithmetic, 1997: an expansion).
    """

    def __init__(self) -> None:
        self._parts: list[float] = []

    def add(self, number: float) -> None:
        """Add a number."""
        self._parts.append(number)
        if len(self._parts) >= _FOLDED:
            found: list[float] = []
            while rest := math.fsum([*self._parts, *(-part for part in found)]):
                found.append(rest)
            self._parts = found

    @property
    def total(self) -> float:
        """The sum."""
        return math.fsum(self._parts)


@dataclass
class Figures:
    """Figures of the training cells of a column.

    Args:
        cells: Number of cells.
        filled: Number of cells that are not empty.
        numbers: Number of cells that are numbers.
        values: Different cell → number of these cells, for at most one more cell than `most`.
        most: Different cells above which no others are held.
        mean: Mean of the numbers.
        deviation: Standard deviation of the numbers.
        exponents: Binary exponent → count of the numbers that are not 0.
        zeros: Number of cells that are digits with a 0 before them.
        dates: Format of `dates.FORMATS` → number of cells that are dates in it.
    """

    cells: int = 0
    filled: int = 0
    numbers: int = 0
    values: dict[str, int] = field(default_factory=dict)
    most: int = MOST_VALUES
    mean: float = math.nan
    deviation: float = math.nan
    exponents: Counter[int] = field(default_factory=Counter)
    zeros: int = 0
    dates: Counter[str] = field(default_factory=Counter)

    @property
    def date_formats(self) -> tuple[str, ...]:
        """The formats in which all filled cells are dates; several for days and months that could be exchanged."""
        return tuple(name for name, count in self.dates.items() if count == self.filled)

    @property
    def incomplete(self) -> bool:
        """Whether the column has more different cells than `values` holds."""
        return len(self.values) > self.most

    @property
    def outliers(self) -> str:
        """The numbers that are far larger than nine of ten others, as text; empty without any."""
        ordered, below, usual = sorted(self.exponents), 0, 0
        for usual in ordered:
            below += self.exponents[usual]
            if below >= 0.9 * self.exponents.total():
                break
        if not ordered or ordered[-1] - usual < FAR:
            return ""
        count = sum(self.exponents[one] for one in ordered if one - usual >= FAR)
        return f"{count} values of at least {2.0 ** (ordered[-1] - 1):.0e}, most are below {2.0**usual:.0e}"

    def add(self, cell: str) -> float | None:
        """Count a cell; its number is returned."""
        number = cell_number(cell)
        self.cells += 1
        self.filled += bool(cell)
        self.numbers += number is not None
        if number:
            self.exponents[math.frexp(number)[1]] += 1
        if number is None and cell:
            self.dates.update(formats_of(cell))
        else:
            self.zeros += has_leading_zero(cell)
        count = self.values.get(cell, 0)
        if count or len(self.values) <= self.most:
            self.values[cell] = count + 1
        return number


def column_figures(rows: Rows, columns: Collection[str], most: int = MOST_VALUES) -> dict[str, Figures]:
    """Figures of columns over training rows, in two passes: the second is for deviations.

    Args:
        rows: The training rows.
        columns: Names of the columns.
        most: Different cells of a column that are held.
    """
    found = {column: Figures(most=most) for column in columns}
    sums = {column: ExactSum() for column in columns}
    for row in rows if columns else ():
        for column, figures in found.items():
            number = figures.add(row[column])
            if number is not None:
                sums[column].add(number)
    for column, figures in found.items():
        if figures.numbers:
            figures.mean = sums[column].total / figures.numbers
    _measure_deviations(rows, {column: figures for column, figures in found.items() if figures.numbers})
    return found


def _measure_deviations(rows: Rows, found: Mapping[str, Figures]) -> None:
    squares = {column: ExactSum() for column in found}
    for row in rows if found else ():
        for column, figures in found.items():
            number = cell_number(row[column])
            if number is not None:
                squares[column].add((number - figures.mean) ** 2)
    for column, figures in found.items():
        figures.deviation = math.sqrt(squares[column].total / figures.numbers)


def date_figures(rows: Rows, column: str, form: str) -> tuple[str, dict[str, Figures]]:
    """The first day of a column of dates, and the figures of the parts of its dates, over the training rows.

    Args:
        rows: The training rows.
        column: Name of the column.
        form: Its format, of `dates.FORMATS`.

    Returns:
        The day in ISO 8601, and name of the part → figures, with the hour only if a date has a time.
    """
    moments = [read_date(cell, form) for row in rows if (cell := row[column])]
    held = [moment for moment in moments if moment is not None]
    first = min(held).replace(hour=0, minute=0, second=0)
    clock = any(map(has_clock, held))
    names = (*PARTS, *([CLOCK_PART] if clock else []))
    parts = [dict(zip(names, map(repr, parts_of(moment, first, clock=clock)), strict=True)) for moment in held]
    return first.date().isoformat(), column_figures(parts, names)


def sampled_rows(rows: Iterable[T], most: int = SAMPLED_ROWS) -> list[T]:
    """Training rows for quantiles: all of them, or `most` that are drawn at random, always the same ones."""
    rng, held = np.random.default_rng(0), list[T]()
    for count, row in enumerate(rows):
        if count < most:
            held.append(row)
        elif (place := int(rng.integers(count + 1))) < most:
            held[place] = row
    return held
