"""Passes over samples and figures of columns, for readers of tables of any length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from pipelines.data.cells import cell_number, has_leading_zero
from pipelines.data.dates import CLOCK_PART, PARTS, formats_of, has_clock, parts_of, read_date
from pipelines.data.sources.base import Entry
from pipelines.data.sources.rows import Row

HELD_ROWS = 20_000  # rows of a table that are held in memory; a longer table is read again for each pass
SAMPLED_ROWS = 20_000  # training rows from which quantiles are computed
MOST_VALUES = 10_000  # different cells of a column that are held
FAR = 20  # binary orders of magnitude, about six decimal ones, that make a number an outlier
_FOLDED = 4096  # numbers that are added at a time
T = TypeVar("T")
Samples = Iterable[tuple[Row, str]]  # rows and their splits; each pass starts from the beginning


class Replayed(Generic[T]):
    """An iterable for several passes: up to `HELD_ROWS` items are held in memory, more are read again each time.

    Args:
        read: Starts a pass; its argument says whether it is the first, which logs.
    """

    def __init__(self, read: Callable[[bool], Iterator[T]]) -> None:
        self._read = read
        self._held: list[T] | None = None
        self._passed = False

    def __iter__(self) -> Iterator[T]:
        return self._pass() if self._held is None else iter(self._held)

    def _pass(self) -> Iterator[T]:
        held: list[T] = []
        count = 0
        for item in self._read(not self._passed):
            count += 1
            if count <= HELD_ROWS and not self._passed:
                held.append(item)
            elif held:
                held = []
            yield item
        if count == len(held):
            self._held = held
        self._passed = True


class RowsOf:
    """The rows and splits of samples that have a `row`, for several passes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = entries

    def __iter__(self) -> Iterator[tuple[Row, str]]:
        return ((entry.fields["row"], entry.split) for entry in self._entries)


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
        values: Different cells, at most one more than `most`.
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
    values: set[str] = field(default_factory=set)
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
        if len(self.values) <= self.most:
            self.values.add(cell)
        return number


def training_figures(samples: Samples, columns: Collection[str], most: int = MOST_VALUES) -> dict[str, Figures]:
    """Figures of columns over the training rows, in two passes: the second is for deviations.

    Args:
        samples: Rows and splits.
        columns: Names of the columns.
        most: Different cells of a column that are held.
    """
    found = {column: Figures(most=most) for column in columns}
    sums = {column: ExactSum() for column in columns}
    for row in _training(samples) if columns else ():
        for column, figures in found.items():
            number = figures.add(row.cells[column])
            if number is not None:
                sums[column].add(number)
    for column, figures in found.items():
        if figures.numbers:
            figures.mean = sums[column].total / figures.numbers
    _measure_deviations(samples, {column: figures for column, figures in found.items() if figures.numbers})
    return found


def _measure_deviations(samples: Samples, found: Mapping[str, Figures]) -> None:
    squares = {column: ExactSum() for column in found}
    for row in _training(samples) if found else ():
        for column, figures in found.items():
            number = cell_number(row.cells[column])
            if number is not None:
                squares[column].add((number - figures.mean) ** 2)
    for column, figures in found.items():
        figures.deviation = math.sqrt(squares[column].total / figures.numbers)


def date_figures(samples: Samples, column: str, form: str) -> tuple[str, dict[str, Figures]]:
    """The first day of a column of dates, and the figures of the parts of its dates, over the training rows.

    Args:
        samples: Rows and splits.
        column: Name of the column.
        form: Its format, of `dates.FORMATS`.

    Returns:
        The day in ISO 8601, and name of the part → figures, with the hour only if a date has a time.
    """
    moments = [read_date(cell, form) for row in _training(samples) if (cell := row.cells[column])]
    held = [moment for moment in moments if moment is not None]
    first = min(held).replace(hour=0, minute=0, second=0)
    clock = any(map(has_clock, held))
    names = (*PARTS, *([CLOCK_PART] if clock else []))
    rows = [
        (Row(0, dict(zip(names, map(repr, parts_of(moment, first, clock=clock)), strict=True))), "train")
        for moment in held
    ]
    return first.date().isoformat(), training_figures(rows, names)


def training_sample(samples: Samples, most: int = SAMPLED_ROWS) -> list[Row]:
    """Training rows for quantiles: all of them, or `most` that are drawn at random, always the same ones."""
    rng, held = np.random.default_rng(0), list[Row]()
    for count, row in enumerate(_training(samples)):
        if count < most:
            held.append(row)
        elif (place := int(rng.integers(count + 1))) < most:
            held[place] = row
    return held


def different_cells(samples: Samples, columns: Collection[str]) -> dict[str, set[str]]:
    """The different cells of columns over all rows; they are held in memory."""
    found: dict[str, set[str]] = {column: set() for column in columns}
    for row, _ in samples if columns else ():
        for column, cells in found.items():
            cells.add(row.cells[column])
    return found


def _training(samples: Samples) -> Iterator[Row]:
    return (row for row, split in samples if split == "train")
