"""Rows of a table to features, by values of the training rows that a JSON object holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from dmtg_core.tables.cells import cell_text, in_points, marks_of
from dmtg_core.tables.stored import CategoryColumn, stored_column

MOST_EXAMPLES = 5  # most unseen values of a column in a message


class TablePreparation:
    """Columns of a table as float32 features, in the order of `features`.

    A number is one feature in its own unit. A missing number is the `mean` of the training split, with scaling
    "robust" its median; if the training split has missing numbers, a second feature is 1 for them. A date is one
    feature for each of its `parts`, and a molecule for each of its descriptors. A category has one feature for
    each of its `values` and one for all other values; one of them is 1. An empty cell is a value of a category.
    Numbers are scaled on the device, by `InputSpec.mean` and `InputSpec.std`, or by `InputSpec.quantiles`.

    `rare` values of a category are in the training split and share the feature of other values. Categories without
    `rare`, as in models of earlier versions, have all values of the training split. A category of many values is
    hashed, see `stored.HashedColumn`; its values are not listed.

    The `form` of a category says when two cells are the same value: "value" if they have the same
    `normal_form`, as 1, "1.0" and 1.0 have; "digits" for texts with leading zeros, where a number is the only
    text that equals it. Without it, as in models of earlier versions, cells are compared as texts. `decimal`
    and `thousands` are the marks in numbers that are given as texts.
    """

    kind = "table"

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._features: Sequence[Mapping[str, Any]] = values["features"]
        self._missing = frozenset(values["missing"])
        self._marks = marks_of(values)
        self._of_column = {feature["column"]: stored_column(feature) for feature in self._features}
        self._starts = [0, *accumulate(one.size for one in self._of_column.values())]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the features."""
        return tuple(feature["column"] for feature in self._features)

    @property
    def libraries(self) -> tuple[str, ...]:
        """The library of descriptors, if there are molecules."""
        return ("rdkit",) if any(feature["type"] == "molecule" for feature in self._features) else ()

    def row(self, cells: Mapping[str, Any]) -> np.ndarray:
        """float32 (F,).

        Raises:
            ValueError: For text in a column of numbers or of dates, and in one of molecules for what is none.
        """
        found = np.zeros(self._starts[-1], np.float32)  # filled in place, because a category can have many values
        for (column, feature), start in zip(self._of_column.items(), self._starts, strict=False):
            feature.fill(found[start : start + feature.size], self._text(cells[column]), cells[column])
        return found

    def _text(self, value: Any) -> str:
        text = cell_text(value)
        if text in self._missing:
            return ""
        return in_points(text, *self._marks) if self._marks and isinstance(value, str) else text

    def unseen(self, cells: Mapping[str, Any], stored: np.ndarray) -> dict[str, str]:
        """The columns of a sample whose category the training split does not have, with its value.

        Args:
            cells: The raw sample.
            stored: float32 (F,), the result of `row`.
        """
        found = {}
        for column, (feature, end) in self._categories.items():
            if stored[end] and not feature.known(text := self._text(cells[column]), cells[column]):
                found[column] = text
        return found

    @cached_property
    def _categories(self) -> dict[str, tuple[CategoryColumn, int]]:
        """Category → how it is stored, and the place of its stored value for other values."""
        ends = zip(self._of_column.items(), self._starts[1:], strict=True)
        return {column: (one, end - 1) for (column, one), end in ends if isinstance(one, CategoryColumn)}

    def example(self) -> dict[str, Any]:
        """The mean of each number, the first value of each category and the first day of each date."""
        return {column: feature.example for column, feature in self._of_column.items()}


class UnseenValues:
    """Counts values of categories that the training split does not have."""

    def __init__(self) -> None:
        self._rows = 0
        self._counts: dict[str, Counter[str]] = {}

    def add(self, how: TablePreparation, cells: Mapping[str, Any], stored: np.ndarray) -> None:
        """Add a sample; see `TablePreparation.unseen`."""
        self._rows += 1
        for column, value in how.unseen(cells, stored).items():
            self._counts.setdefault(column, Counter())[value] += 1

    def remarks(self) -> list[str]:
        """A sentence for each column with such values."""
        return [
            f"column {column}: {counts.total()} of {self._rows} cells have a value that training did not have: "
            + ", ".join(map(repr, list(counts)[:MOST_EXAMPLES]))
            + (", …" if len(counts) > MOST_EXAMPLES else "")
            for column, counts in self._counts.items()
        ]
