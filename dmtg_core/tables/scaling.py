"""Scaling of the numbers of a table: constants of `InputSpec`, from stored values of the training rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SCALINGS = ("standard", "quantile", "robust")
MOST_QUANTILES = 256  # of a feature
FINEST = 1e-5  # ratio of deviation and mean below which float32, with 24 bits, loses the differences
Scales = list[tuple[float, float]]  # offset and divisor of each stored value of a feature


def feature_quantiles(feature: Mapping[str, Any], values: np.ndarray) -> list[tuple[float, ...]]:
    """Quantiles of the stored values of a feature, over the rows that have it; none for flags.

    Their number is that of TabM (Gorishniy et al. 2025): one for 30 rows, at least 10, here at most
    `MOST_QUANTILES`.

    Args:
        feature: The feature of the preparation.
        values: `(n, S)`.
    """
    levels = np.linspace(0, 1, min(max(len(values) // 30, 10), MOST_QUANTILES))
    found: list[tuple[float, ...]] = []
    for numbers in _numbers(feature, values):
        flag = len(np.unique(numbers)) <= 2
        found.append(() if flag else tuple(np.quantile(numbers, levels).astype(np.float32).tolist()))
    return found + [()] * (values.shape[1] - len(found))


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
    """The feature with the offsets of its scales in place of missing numbers and dates."""
    if feature["type"] == "number":
        return {**feature, "mean": scales[0][0]}
    if feature["type"] == "date":
        return {**feature, "means": [offset for offset, _ in scales[: len(feature["means"])]]}
    return dict(feature)


def _numbers(feature: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    """The stored numbers `(P, n)` of a feature, without missing ones; none of a category."""
    if feature["type"] not in ("number", "date"):
        return values[:, :0].T
    if not feature["gaps"]:
        return values.T
    return values[values[:, -1] == 0, :-1].T
