"""Passes over samples, for readers of tables of any length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from dmtg_core.tables.figures import MOST_VALUES, Figures, column_figures
from pipelines.data.sources.base import Entry
from pipelines.data.sources.rows import Row

HELD_ROWS = 20_000  # rows of a table that are held in memory; a longer table is read again for each pass
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


class TrainingCells:
    """The cells of the training rows, for several passes."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[Mapping[str, str]]:
        return (row.cells for row, split in self._samples if split == "train")


def training_figures(samples: Samples, columns: Collection[str], most: int = MOST_VALUES) -> dict[str, Figures]:
    """Figures of columns over the training rows. See `column_figures`."""
    return column_figures(TrainingCells(samples), columns, most)


def different_cells(samples: Samples, columns: Collection[str]) -> dict[str, set[str]]:
    """The different cells of columns over all rows; they are held in memory."""
    found: dict[str, set[str]] = {column: set() for column in columns}
    for row, _ in samples if columns else ():
        for column, cells in found.items():
            cells.add(row.cells[column])
    return found
