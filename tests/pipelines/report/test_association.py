"""Measures of association against scipy and scikit-learn, and columns without a measure."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_selection import f_classif

from pipelines.report.association import of_classes, of_number_and_class, of_numbers

RNG = np.random.default_rng(3)
NUMBERS = RNG.normal(size=300)
OTHER = NUMBERS**3 + RNG.normal(size=300)
CLASSES = np.digitize(NUMBERS + RNG.normal(size=300), [-1.0, 0.0, 1.0])
FLAG = (OTHER > 0.2).astype(np.int64)


def with_gaps(values: np.ndarray, gap: float) -> np.ndarray:
    changed = values.copy()
    changed[::7] = gap
    return changed


KEPT = np.arange(300) % 7 > 0


def test_numbers_have_the_rank_correlation_of_scipy() -> None:
    assert of_numbers(NUMBERS, -OTHER) == pytest.approx(stats.spearmanr(NUMBERS, -OTHER).statistic)
    assert of_numbers(NUMBERS, np.exp(NUMBERS)) == pytest.approx(1.0)
    gaps = of_numbers(with_gaps(NUMBERS, math.nan), OTHER)
    assert gaps == pytest.approx(stats.spearmanr(NUMBERS[KEPT], OTHER[KEPT]).statistic)


def test_the_correlation_ratio_follows_from_the_analysis_of_variance_of_scikit_learn() -> None:
    (f,), _ = f_classif(NUMBERS[:, None], CLASSES)
    between = len(np.unique(CLASSES)) - 1
    ratio = math.sqrt(f * between / (f * between + 300 - between - 1))
    assert of_number_and_class(NUMBERS, CLASSES) == pytest.approx(ratio)
    assert of_number_and_class(1e6 + NUMBERS, CLASSES) == pytest.approx(ratio, rel=1e-6)
    flag = abs(stats.pearsonr(NUMBERS[KEPT], FLAG[KEPT]).statistic)
    assert of_number_and_class(NUMBERS, with_gaps(FLAG, -1)) == pytest.approx(flag)


def test_classes_have_the_corrected_chi_square_of_scipy() -> None:
    table = stats.contingency.crosstab(CLASSES[KEPT], FLAG[KEPT]).count
    square = stats.chi2_contingency(table, correction=False).statistic
    assert of_classes(with_gaps(CLASSES, -1), FLAG) == pytest.approx(math.sqrt(square / KEPT.sum()))
    assert of_classes(CLASSES, 3 - CLASSES) == pytest.approx(1.0)


@pytest.mark.parametrize("rows", [2, 300])
def test_constant_or_few_values_have_no_measure(rows: int) -> None:
    constant = np.ones(rows)
    assert of_numbers(NUMBERS[:rows], constant) is None
    assert of_number_and_class(constant, CLASSES[:rows]) is None
    assert of_number_and_class(NUMBERS[:rows], constant.astype(int)) is None
    assert of_classes(CLASSES[:rows], constant.astype(int)) is None
    assert of_numbers(np.full(rows, math.nan), NUMBERS[:rows]) is None
