"""Intervals and correlations, against published values and values calculated by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from dmtg_core import Grouping
from pipelines.compare.significance import (
    agreement,
    holm,
    intraclass_correlation,
    mean_of,
    one_group_share,
    p_value,
    several,
    together_share,
)


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


TASKS = ["a", "b", "c", "d"]
ONE, TWO, WHOLE = (Grouping.from_assignment(TASKS, a) for a in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]))


def test_agreement_is_the_mean_over_pairs_of_groupings_and_shares_count_them() -> None:
    found = agreement([ONE, ONE, WHOLE, TWO])
    assert (found.value, found.count) == (pytest.approx((1 - 0.5 - 0.5) / 3), 3)  # an index of -0.5, see its test
    assert math.isnan(agreement([ONE, WHOLE, WHOLE]).value)
    assert math.isnan(agreement([ONE, TWO]).low)
    assert several([ONE, WHOLE, TWO]) == [ONE, TWO]
    assert one_group_share([ONE, WHOLE, WHOLE, TWO]) == 0.5
    share = together_share([ONE, ONE, TWO])
    assert share[0] == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_the_interval_of_an_agreement_is_that_of_the_jackknife() -> None:
    rng = np.random.default_rng(3)
    names = [f"t{n}" for n in range(7)]
    drawn = [Grouping.from_assignment(names, rng.integers(0, 3, 7).tolist()) for _ in range(6)]
    found = agreement(drawn)

    def mean_index(kept: list[Grouping]) -> float:
        return float(np.mean([a.adjusted_rand_index(b) for a, b in combinations(kept, 2)]))

    pseudo = [6 * mean_index(drawn) - 5 * mean_index(drawn[:i] + drawn[i + 1 :]) for i in range(6)]
    low, high = stats.t.interval(0.95, 5, np.mean(pseudo), stats.sem(pseudo))
    assert found.value == pytest.approx(mean_index(drawn))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(("count", "low"), [(3, 2 / 4), (5, 4 / 6), (10, 9 / 11)])
def test_equal_groupings_leave_room_for_one_that_agrees_with_none(count: int, low: float) -> None:
    found = agreement([ONE] * count)
    assert (found.value, found.low, found.high) == (1, pytest.approx(low), 1)
    assert low == pytest.approx(math.comb(count, 2) / math.comb(count + 1, 2))


def test_the_interval_of_an_agreement_contains_the_true_one() -> None:
    rng = np.random.default_rng(0)
    names = [f"t{n}" for n in range(9)]

    def drawn(count: int) -> list[Grouping]:
        """The groups of nine tasks, with each task in a random group with probability 0.2."""
        moved, groups = rng.random((count, 9)) < 0.2, rng.integers(0, 3, (count, 9))
        return [
            Grouping.from_assignment(names, row.tolist()) for row in np.where(moved, groups, np.arange(9) // 3)
        ]

    true = agreement(drawn(250)).value
    inside = [found.low <= true <= found.high for found in (agreement(drawn(8)) for _ in range(100))]
    assert 0.85 <= np.mean(inside) < 1
    assert 0.3 < true < 0.5


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [-3.0, 0.5, 0.2, 0.1], [2.0, 2.0, 2.5, -9.0, 1.0]])
def test_the_p_value_is_that_of_the_paired_t_test(values: list[float]) -> None:
    other = np.arange(len(values))
    expected = stats.ttest_rel(np.add(values, other), other).pvalue
    assert p_value(mean_of(values)) == pytest.approx(expected)


def test_equal_differences_have_the_p_value_of_their_sign() -> None:
    assert p_value(mean_of([0.0, 0.0])) == 1
    assert p_value(mean_of([2.0, 2.0])) == 0
    assert math.isnan(p_value(mean_of([2.0])))


def test_holm_multiplies_by_the_number_of_tests_that_are_left() -> None:
    # sorted: 0.005 · 4, 0.01 · 3, 0.03 · 2, 0.04 · 1 raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.5]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.6, 0.7]) == [1, 1, 1]
    assert holm([]) == []
    found = holm([0.02, math.nan, 0.03])  # NaN is no test
    assert found[::2] == pytest.approx([0.04, 0.04])
    assert math.isnan(found[1])


def test_holm_rejects_what_its_steps_reject() -> None:
    """Compare the smallest p-value with α / m, the next one with α / (m - 1), until one is larger."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        values = (rng.random(7) ** 3).tolist()
        rejected = set()
        for rank, n in enumerate(np.argsort(values)):
            if values[n] > 0.05 / (7 - rank):
                break
            rejected.add(int(n))
        assert {n for n, p in enumerate(holm(values)) if p <= 0.05} == rejected
