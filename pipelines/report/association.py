"""Measures of association between two columns: numbers or classes, each with missing values left out."""

from __future__ import annotations

import numpy as np

FEWEST = 3  # pairs of values below which there is no measure


def of_numbers(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of two columns of numbers `(n,)`, in [-1, 1].

    NaN is missing. None if fewer than `FEWEST` pairs are known or if a column is constant.
    """
    from scipy.stats import spearmanr

    a, b = _known(a, b)
    if len(a) < FEWEST or _constant(a) or _constant(b):
        return None
    return float(spearmanr(a, b).statistic)


def of_number_and_class(numbers: np.ndarray, classes: np.ndarray) -> float | None:
    """Correlation ratio of numbers `(n,)` and classes `(n,)`, in [0, 1] (Fisher 1925, section 45).

    The squared ratio is the variance between classes divided by the total variance. For two classes the ratio is
    the absolute value of Pearson's correlation with the flag. NaN and negative classes are missing. None if fewer
    than `FEWEST` pairs are known or if a column is constant.
    """
    known = ~np.isnan(numbers) & (classes >= 0)
    numbers, classes = numbers[known].astype(np.float64), classes[known]
    if len(numbers) < FEWEST or _constant(numbers) or _constant(classes):
        return None
    counts = np.bincount(classes)
    numbers = numbers - numbers.mean()
    means = np.bincount(classes, numbers) / np.maximum(counts, 1)
    return float(np.sqrt(min((counts * means**2).sum() / (numbers**2).sum(), 1.0)))


def of_classes(a: np.ndarray, b: np.ndarray) -> float | None:
    """Cramér's V of two columns of classes `(n,)`, in [0, 1] (Cramér 1946, section 21.9).

    Negative classes are missing. None if fewer than `FEWEST` pairs are known or if a column is constant.
    """
    from scipy.stats.contingency import association, crosstab

    known = (a >= 0) & (b >= 0)
    a, b = a[known], b[known]
    if len(a) < FEWEST or _constant(a) or _constant(b):
        return None
    return float(association(crosstab(a, b).count, method="cramer"))


def _known(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(a) & ~np.isnan(b)
    return a[known], b[known]


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())
