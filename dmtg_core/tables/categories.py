"""Categories of a table: which values have a feature of their own, and which columns are hashed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dmtg_core.tables.cells import has_leading_zero, normal_form
from dmtg_core.tables.figures import Figures

MOST_CATEGORIES = 100  # values of a category above which it is hashed
HASHED = 256  # features of a hashed category
FEWEST_ROWS = 3  # training rows below which a value of a category is rare
RARE_SHARE = 100  # a rare value has less than one of so many training rows


class ColumnError(ValueError):
    """A column that cannot be a feature as it is.

    Args:
        what: The problem, with the name of the column.
        remedy: How to correct it, in a table.
        option: How an option of the caller corrects it: one of "features", "categorical" and "max_values".
    """

    def __init__(self, what: str, remedy: str = "", option: str = "") -> None:
        super().__init__(f"{what}: {remedy}" if remedy else what)
        self.what, self.remedy, self.option = what, remedy, option


def category_feature(column: str, figures: Figures, most: int | None = None) -> dict[str, Any]:
    """The feature of a preparation for a column of categories.

    Args:
        column: Its name.
        figures: Its figures.
        most: Largest number of its values. Without it, a column of more than `MOST_CATEGORIES` values is hashed.

    Raises:
        ColumnError: For more values than `most`, and for a column to hash that `barely_repeats`.
    """
    form = "digits" if any(map(has_leading_zero, figures.values)) else "value"
    counts = figures.values if form == "digits" else counts_by_form(figures.values)
    if len(counts) > (MOST_CATEGORIES if most is None else most):
        if most is not None or barely_repeats(counts):
            raise _too_many(column, figures, counts, form, most)
        return _hashed(column, figures, counts)
    rare = rare_values(counts, figures.cells)
    values = sorted(set(counts) - rare)
    feature = {"column": column, "type": "category", "values": values, "form": form}
    return {**feature, "rare": sorted(rare)} if rare else feature


def _hashed(column: str, figures: Figures, counts: Mapping[str, int]) -> dict[str, Any]:
    example = max(filter(None, counts), key=lambda value: (counts[value], value))
    gaps = figures.filled < figures.cells
    return {"column": column, "type": "hashed", "size": HASHED, "gaps": gaps, "example": example}


def _too_many(
    column: str, figures: Figures, counts: Mapping[str, int], form: str, most: int | None
) -> ColumnError:
    limit = f"max_values={most}" if most is not None else f"{MOST_CATEGORIES}, and most occur once or twice"
    digits = " (digits with leading zeros are no numbers)" if form == "digits" else ""
    return ColumnError(
        f"column {column} has {len(counts)}{' or more' * figures.incomplete} different values, more than {limit}, "
        f"such as {', '.join(map(repr, sorted(counts)[:3]))}{digits}",
        "remove it",
        "max_values",
    )


def barely_repeats(counts: Mapping[str, int]) -> bool:
    """Whether the values of more than half of the rows have fewer than 3 rows, as those of ids and free texts.

    Args:
        counts: Value → number of its rows. Missing cells are not counted.
    """
    filled = [count for value, count in counts.items() if value]
    return 2 * sum(count for count in filled if count < FEWEST_ROWS) > sum(filled)


def counts_by_form(counts: Mapping[str, int]) -> dict[str, int]:
    """Normal form → number of its cells."""
    found = Counter[str]()
    for cell, count in counts.items():
        found[normal_form(cell)] += count
    return dict(found)


def rare_values(counts: Mapping[str, int], rows: int) -> set[str]:
    """The values of a category that share a feature with values that training does not have.

    A rare value has fewer than 3 training rows and fewer than one of 100. Without rare values the weights of the
    shared feature are not trained, because it is 0 in every training row. The limit is low, because rare values
    have one feature in common. An empty cell is not rare, so that missing cells can be counted. If all values
    are rare, none is.

    Args:
        counts: Value → number of its training rows.
        rows: Number of training rows.
    """
    rare = {
        value for value, count in counts.items() if value and count < FEWEST_ROWS and RARE_SHARE * count < rows
    }
    return rare if len(rare) < len(counts) else set()
