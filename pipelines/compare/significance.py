"""Statistics over seeds: intervals, p-values, intraclass correlation, and agreement of groupings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dmtg_core.grouping import Grouping

SIGNIFICANT = 0.05  # p-values below it


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its confidence interval.

    Args:
        value: The mean; NaN for no values.
        low, high: Ends of Student's interval; NaN for fewer than two values.
        count: Number of values.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def mean_of(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """The mean of independent values with Student's t interval. For differences it is the paired interval."""
    known = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    if not len(known):
        return Mean(math.nan, math.nan, math.nan, 0)
    value = float(known.mean())
    if len(known) < 2:
        return Mean(value, math.nan, math.nan, len(known))
    half = float(stats.t.ppf((1 + confidence) / 2, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return Mean(value, value - half, value + half, len(known))


@dataclass(frozen=True)
class Correlation:
    """An intraclass correlation: the share of the variance that lies between groups.

    Args:
        value: The correlation. It is negative if groups differ less than their members.
        low, high: Ends of its interval.
        between, within: Standard deviations between groups (at least 0) and within them.
    """

    value: float
    low: float
    high: float
    between: float
    within: float


def intraclass_correlation(values: Sequence[Sequence[float]], confidence: float = 0.95) -> Correlation:
    """ICC(1) of a one-way layout with its F interval (Shrout and Fleiss 1979, case 1).

    Args:
        values: A row for each group (a partition of tasks) with a value for each member (a seed). All rows have
            the same length.

    Returns:
        The correlation; all its fields are NaN if the values do not vary.

    Raises:
        ValueError: For fewer than two groups, or fewer than two members in each.
    """
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError(f"expected at least 2 groups of at least 2 values each, got shape {table.shape}")
    groups, members = table.shape
    among = members * table.mean(1).var(ddof=1)
    within = table.var(axis=1, ddof=1).mean()
    if not within > 0:
        return Correlation(*[math.nan] * 5)
    ratio, free = among / within, (groups - 1, groups * (members - 1))
    low = ratio / stats.f.ppf((1 + confidence) / 2, *free)
    high = ratio * stats.f.ppf((1 + confidence) / 2, *reversed(free))
    value, least, most = (float((f - 1) / (f + members - 1)) for f in (ratio, low, high))
    return Correlation(value, least, most, math.sqrt(max(among - within, 0) / members), math.sqrt(within))


def several(groupings: Sequence[Grouping]) -> list[Grouping]:
    """The groupings that have more than one group. One encoder for all tasks is no grouping."""
    return [one for one in groupings if len(one.groups) > 1]


def one_group_share(groupings: Sequence[Grouping]) -> float:
    """Share of the results that have one group: one encoder for all tasks."""
    return 1 - len(several(groupings)) / len(groupings)


def agreement(groupings: Sequence[Grouping]) -> Mean:
    """Mean adjusted Rand index over all pairs of groupings, without results of one group.

    The interval is Student's, of the jackknife's pseudo-values (Tukey 1958). Equal groupings have no variance,
    although the next seed can find another one. Therefore the lower end is at most the mean that one more grouping
    would give that agrees with no other.

    Args:
        groupings: One for each seed.

    Returns:
        The mean; NaN for fewer than two groupings. Its interval is NaN for fewer than three.
    """
    kept = several(groupings)
    count = len(kept)
    if count < 2:
        return Mean(math.nan, math.nan, math.nan, count)
    index = np.array([[a.adjusted_rand_index(b) for b in kept] for a in kept])
    pairs = math.comb(count, 2)
    total = (index.sum() - count) / 2  # an index with itself is 1
    value = float(total / pairs)
    if count < 3:
        return Mean(value, math.nan, math.nan, count)
    without = (total - (index.sum(1) - 1)) / math.comb(count - 1, 2)
    found = mean_of((count * value - (count - 1) * without).tolist())
    low = min(found.low, value * (count - 1) / (count + 1))
    return Mean(value, max(low, -1.0), min(found.high, 1.0), count)


def mutual_agreement(some: Sequence[Sequence[Grouping]], others: Sequence[Sequence[Grouping]]) -> float:
    """Mean adjusted Rand index between the groupings of two methods, without results of one group.

    Args:
        some, others: The groupings of each seed. If they are the same object, different seeds are compared.

    Returns:
        The mean; NaN if there is no pair.
    """
    found = [
        a.adjusted_rand_index(b)
        for i, of_seed in enumerate(some)
        for j, of_other in enumerate(others)
        if some is not others or i < j
        for a in several(of_seed)
        for b in several(of_other)
    ]
    return sum(found) / len(found) if found else math.nan


def p_value(difference: Mean, confidence: float = 0.95) -> float:
    """The two-sided p-value of the t test of a mean of 0. For differences it is the paired t test.

    Args:
        difference: Result of `mean_of`.
        confidence: Confidence of its interval.

    Returns:
        The p-value; NaN for fewer than two values.
    """
    if not math.isfinite(difference.half):
        return math.nan
    if difference.half == 0:
        return 1.0 if difference.value == 0 else 0.0
    free = difference.count - 1
    error = difference.half / stats.t.ppf((1 + confidence) / 2, free)
    return float(2 * stats.t.sf(abs(difference.value) / error, free))


def holm(values: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted for their number (Holm 1979). Those that are NaN are no tests."""
    adjusted = [math.nan] * len(values)
    largest = 0.0
    known = sorted((value, n) for n, value in enumerate(values) if not math.isnan(value))
    for rank, (value, n) in enumerate(known):
        largest = max(largest, min((len(known) - rank) * value, 1.0))
        adjusted[n] = largest
    return adjusted


def together_share(groupings: Sequence[Grouping]) -> list[list[float]]:
    """Share of the groupings with two tasks in one group, `(N, N)`, in the task order of the first grouping."""
    tasks = groupings[0].tasks
    group_of = [dict(zip(g.tasks, g.assignment, strict=True)) for g in groupings]
    return [[sum(g[a] == g[b] for g in group_of) / len(group_of) for b in tasks] for a in tasks]
