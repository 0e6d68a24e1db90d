"""Categories of a table: which values have a feature of their own, from the training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dmtg_core.tables.cells import has_leading_zero, normal_form
from dmtg_core.tables.figures import Figures

FEWEST_ROWS = 10  # training rows below which a value of a category is rare
RARE_SHARE = 100  # a rare value has less than one of so many training rows


def category_feature(column: str, figures: Figures) -> dict[str, Any]:
    """The feature of a preparation for a column of categories."""
    form = "digits" if any(map(has_leading_zero, figures.values)) else "value"
    counts = figures.values if form == "digits" else counts_by_form(figures.values)
    rare = rare_values(counts, figures.cells)
    values = sorted(set(counts) - rare)
    feature = {"column": column, "type": "category", "values": values, "form": form}
    return {**feature, "rare": sorted(rare)} if rare else feature


def counts_by_form(counts: Mapping[str, int]) -> dict[str, int]:
    """Normal form → number of its cells."""
    found = Counter[str]()
    for cell, count in counts.items():
        found[normal_form(cell)] += count
    return dict(found)


def rare_values(counts: Mapping[str, int], rows: int) -> set[str]:
    """The values of a category that share a feature with values that training does not have.

    A rare value has fewer than 10 training rows and fewer than one of 100. Without rare values the weights of the
    shared feature are not trained, because it is 0 in every training row. An empty cell is not rare, so that
    missing cells can be counted. If all values are rare, none is.

    Args:
        counts: Value → number of its training rows.
        rows: Number of training rows.
    """
    least = min(FEWEST_ROWS, rows // RARE_SHARE)
    rare = {value for value, count in counts.items() if value and count < least}
    return rare if len(rare) < len(counts) else set()
