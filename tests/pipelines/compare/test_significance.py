"""Intervals and correlations, against published values and values calculated by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dmtg_core import Grouping
from pipelines.compare.significance import agreement, intraclass_correlation, mean_of, together_share


def test_the_interval_of_a_mean_is_that_of_student() -> None:
    values = [1.0, 2.0, 4.0, 7.0]
    found = mean_of(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.value, found.low, found.high, found.count) == (3.5, pytest.approx(low), pytest.approx(high), 4)


def test_one_value_has_no_interval_and_undefined_values_are_left_out() -> None:
    assert math.isnan(mean_of([2.0]).low)
    assert mean_of([2.0]).value == 2
    assert mean_of([1.0, math.nan, 3.0]).value == 2
    assert math.isnan(mean_of([]).value)


def test_the_intraclass_correlation_equals_that_of_shrout_and_fleiss() -> None:
    ratings = [
        [9, 2, 5, 8],
        [6, 1, 3, 2],
        [8, 4, 6, 8],
        [7, 1, 2, 6],
        [10, 5, 6, 9],
        [6, 2, 4, 7],
    ]  # their table 2
    found = intraclass_correlation([[float(v) for v in row] for row in ratings])
    assert found.value == pytest.approx(0.17, abs=0.005)  # their table 4, ICC(1, 1)
    assert found.low == pytest.approx(-0.133, abs=0.005)
    assert found.high == pytest.approx(0.723, abs=0.005)


def test_different_groups_have_a_high_correlation_and_equal_ones_a_low_one() -> None:
    rng = np.random.default_rng(0)
    apart = np.arange(8)[:, None] + 0.1 * rng.normal(size=(8, 4))
    assert intraclass_correlation(apart.tolist()).low > 0.9
    same = intraclass_correlation(rng.normal(size=(8, 4)).tolist())
    assert same.low < 0 < same.high
    assert math.isnan(intraclass_correlation([[1.0, 1.0], [1.0, 1.0]]).value)
    with pytest.raises(ValueError, match=r"at least 2 groups of at least 2 values each, got shape \(1, 3\)"):
        intraclass_correlation([[1.0, 2.0, 3.0]])


def test_agreement_is_the_mean_over_pairs_and_shares_count_groupings() -> None:
    tasks = ["a", "b", "c", "d"]
    one, two = (Grouping.from_assignment(tasks, a) for a in ([0, 0, 1, 1], [0, 1, 0, 1]))
    assert agreement([one, one, two]) == pytest.approx((1 + 2 * one.adjusted_rand_index(two)) / 3)
    assert math.isnan(agreement([one]))
    share = together_share([one, one, two])
    assert share[0] == pytest.approx([1, 2 / 3, 1 / 3, 0])
