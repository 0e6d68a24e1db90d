"""Scaling of the numbers of a table: constants of `InputSpec`, from stored values of the training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dmtg_core.tables.categories import FEWEST_ROWS
from dmtg_core.tables.cells import cell_number
from dmtg_core.tables.stored import stored_column

SCALINGS = ("standard", "quantile", "robust")
MOST_QUANTILES = 256  # of a feature
FEWEST_CODES, MOST_CODES = 20, 4_096  # values of a number above which it has codes; codes of a table
ROWS_OF_CODE = 10  # training rows for each code of a table
FINEST = 1e-5  # ratio of deviation and mean below which float32, with 24 bits, loses the differences
Scales = list[tuple[float, float]]  # offset and divisor of each stored value of a feature


def feature_quantiles(feature: Mapping[str, Any], values: np.ndarray) -> list[tuple[float, ...]]:
    """Quantiles of the stored values of a feature, over the rows that have it; none for flags.

    They are one for each row, as those of scikit-learn's `QuantileTransformer`, and at most `MOST_QUANTILES`. With
    one for 30 rows, as TabM has (Gorishniy et al. 2025), the long tail of a feature of a small table would lie
    between two of them.

    Args:
        feature: The feature of the preparation.
        values: `(n, S)`.
    """
    levels = np.linspace(0, 1, min(max(len(values), 2), MOST_QUANTILES))
    found: list[tuple[float, ...]] = []
    for numbers in _numbers(feature, values):
        flag = len(np.unique(numbers)) <= 2
        found.append(() if flag else tuple(np.quantile(numbers, levels).astype(np.float32).tolist()))
    return found + [()] * (values.shape[1] - len(found))


def table_codes(
    features: Sequence[Mapping[str, Any]], counts: Sequence[Mapping[str, int]], rows: int
) -> list[tuple[float, ...]]:
    """Repeated values of the stored values of a table, which an encoder can treat as categories.

    A number whose values repeat can stand for an entity, such as the income of a family for the family. Trees
    separate such values; a smooth function of the number does not. A number with more than `FEWEST_CODES`
    different values has codes if it `is_irregular`, because rounded measurements repeat as well, and vectors for
    their values would learn noise. The codes are the values of at least `categories.FEWEST_ROWS` rows. Numbers
    with fewer values come first, and a number has none if the different values up to it are more than
    `MOST_CODES` or than one for `ROWS_OF_CODE` rows.

    Args:
        features: The features of the preparation.
        counts: Cell → number of its training rows, for each feature.
        rows: Number of training rows.

    Returns:
        The codes of each stored value in ascending order, empty for one without.
    """
    found: list[list[tuple[float, ...]]] = [[()] * stored_column(feature).size for feature in features]
    left = min(MOST_CODES, rows // ROWS_OF_CODE)
    for place in sorted(range(len(features)), key=lambda place: len(counts[place])):
        values = _float_counts(counts[place]) if features[place]["type"] == "number" else {}
        if FEWEST_CODES < len(values) <= left and is_irregular(values):
            found[place][0] = tuple(sorted(value for value, count in values.items() if count >= FEWEST_ROWS))
            left -= len(values)
    return [codes for one in found for codes in one]


def is_irregular(values: Iterable[float]) -> bool:
    """Whether values are not those of a regular grid, as numbers with a fixed number of digits are.

    Most distances between neighbours on a grid are its step: their first decile is equal to their median. The
    ratio of both is 0.15 for random places.

    Args:
        values: Different values, at least 3.
    """
    gaps = np.diff(np.sort(np.fromiter(values, np.float64)))
    first, median = np.quantile(gaps, (0.1, 0.5))
    return bool(first < median / 2)


def _float_counts(counts: Mapping[str, int]) -> Counter[float]:
    """Number in float32 → number of its cells."""
    found = Counter[float]()
    for cell, count in counts.items():
        if (number := cell_number(cell)) is not None:
            found[float(np.float32(number))] += count
    return found


def robust_scales(feature: Mapping[str, Any], values: np.ndarray, scales: Scales) -> Scales:
    """Median and interquartile range of the stored values of a feature, over the rows that have it.

    They are those of scikit-learn's `RobustScaler`. Numbers half of which are equal have no such range: they keep
    the standard deviation.

    Args:
        feature: The feature of the preparation.
        values: `(n, S)`.
        scales: Mean and standard deviation of each stored value.
    """
    found: Scales = []
    for numbers, (_, deviation) in zip(_numbers(feature, values), scales, strict=False):
        low, median, high = np.quantile(numbers.astype(np.float64), (0.25, 0.5, 0.75)).tolist()
        found.append((median, high - low if high - low > FINEST * abs(median) else deviation))
    return found + scales[len(found) :]


def filled_with(feature: Mapping[str, Any], scales: Scales) -> dict[str, Any]:
    """The feature with the offsets of its scales in place of missing numbers, dates and descriptors."""
    if feature["type"] == "number":
        return {**feature, "mean": scales[0][0]}
    if "means" in feature:
        return {**feature, "means": [offset for offset, _ in scales[: len(feature["means"])]]}
    return dict(feature)


def _numbers(feature: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    """The stored numbers `(P, n)` of a feature, without missing ones; none of a category.

    Few molecules have all descriptors in some tables. So missing descriptors count, with the mean that they have.
    """
    if feature["type"] == "molecule":
        return values[:, : len(feature["parts"])].T
    if feature["type"] not in ("number", "date"):
        return values[:, :0].T
    if not feature["gaps"]:
        return values.T
    return values[values[:, -1] == 0, :-1].T
