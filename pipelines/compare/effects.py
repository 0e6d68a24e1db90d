"""The size of the effect of grouping in gain, the conclusion from it, and how many runs are enough for one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from pipelines.compare.significance import Mean, mean_of
from pipelines.compare.verdicts import MATTERS, NOT, UNCLEAR

TIMES = 10  # more runs than this many times the runs that there are is not proposed
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Layout:
    """Scores of partitions with the same seeds: a two-way analysis of variance.

    Args:
        partitions, seeds: Number of partitions, and of seeds of each.
        among: Mean square between the partitions.
        within: Mean square of the residuals, without the effect that a seed has on all partitions.
    """

    partitions: int
    seeds: int
    among: float
    within: float

    @classmethod
    def of(cls, scores: Sequence[Sequence[float]]) -> Layout:
        """The layout of scores: mean logarithms of the losses, a row for each partition with a value a seed."""
        table = np.asarray(scores, dtype=float)
        partitions, seeds = table.shape
        among = float(seeds * table.mean(1).var(ddof=1))
        rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
        return cls(partitions, seeds, among, float((rest**2).sum()) / ((partitions - 1) * (seeds - 1)))

    @property
    def variance(self) -> float:
        """Estimated variance between partitions."""
        return max(self.among - self.within, 0.0) / self.seeds

    def spread(self) -> Mean:
        """The standard deviation between partitions, as gain in per cent, with its interval."""
        low, high = spread_interval(self.partitions, self.seeds, self.among, self.within)
        value, least, most = (100 * -math.expm1(-sd) for sd in (math.sqrt(self.variance), float(low), float(high)))
        return Mean(value, least, most, self.partitions)


def spread_interval(partitions: Any, seeds: Any, among: Any, within: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of the standard deviation between partitions (Tukey 1951, Williams 1962).

    By chance partitions can differ less than seeds. The upper end is then that of partitions that differ as much:
    otherwise noise alone could exclude an effect.

    Args:
        partitions, seeds, among, within: As of `Layout`, each a number or an array.
    """

    def end(tail: float, square: Any) -> np.ndarray:
        free = partitions - 1
        ratio = stats.f.ppf(tail, free, free * (seeds - 1))
        return np.sqrt(free * np.maximum(square - ratio * within, 0) / (seeds * stats.chi2.ppf(tail, free)))

    return end((1 + CONFIDENCE) / 2, among), end((1 - CONFIDENCE) / 2, np.maximum(among, within))


def conclude(spread: Mean, proposed: Mean, worth: float) -> str:
    """MATTERS, NOT or UNCLEAR.

    Grouping matters if one of the two effects is above `worth` with its whole interval. It does not if both are
    below it with theirs.

    Args:
        spread: Standard deviation between random partitions, as gain.
        proposed: Gain of groups with a high feature overlap over random groups.
        worth: Gain in per cent that is worth having.
    """
    if spread.low > worth or proposed.low > worth:
        return MATTERS
    return NOT if spread.high < worth and proposed.high < worth else UNCLEAR


def enough_runs(
    layout: Layout, proposed: Sequence[float], worth: float, *, others: int, most: int
) -> tuple[int, int] | None:
    """Number of partitions and seeds with which the conclusion would not be UNCLEAR, by the observed variances.

    Args:
        layout: The scores of random partitions.
        proposed: Gain of groups with a high feature overlap over random groups, of each seed.
        worth: As of `conclude`.
        others: Number of runs of a seed that are not random partitions.
        most: Largest number of different partitions.

    Returns:
        The pair with the fewest runs; None if it has more than `TIMES` as many runs as there are.
    """
    limit = TIMES * layout.seeds * (layout.partitions + others)
    seeds = np.arange(layout.seeds, max(limit // (layout.partitions + others), layout.seeds) + 1)
    last = max(min(limit // layout.seeds - others, most), layout.partitions)
    partitions = np.arange(layout.partitions, last + 1)[:, None]
    low, high = (
        100 * -np.expm1(-end)
        for end in spread_interval(partitions, seeds, layout.within + seeds * layout.variance, layout.within)
    )
    found = mean_of(proposed)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1) * np.std(proposed, ddof=1) / np.sqrt(seeds)
    above = (low > worth) | (found.value - half > worth)
    below = (high < worth) & (found.value + half < worth)
    runs = np.where(above | below, seeds * (partitions + others), limit + 1)
    runs[0, 0] = limit + 1  # these runs were not enough
    best = np.unravel_index(runs.argmin(), runs.shape)
    return (int(partitions[best[0], 0]), int(seeds[best[1]])) if runs[best] <= limit else None


def effect_text(found: Mapping[str, Any], enough: tuple[int, int] | None) -> str:
    """The sizes of the effects, and what follows from them.

    Args:
        found: As in `signal.json`.
        enough: Result of `enough_runs`.
    """
    proposed, spread, worth = found["proposed_over_random"], found["between"], found["worth"]
    text = (
        f"Groups of tasks with a high feature overlap gain {_interval(proposed, '+')} over random groups. The "
        f"standard deviation between random groupings is {_interval(spread)}. "
    )
    if found["conclusion"] == MATTERS:
        which = "gain" if proposed["low"] > worth else "standard deviation"
        return f"{text}Grouping matters here: the interval of this {which} is above {worth:g} %."
    if found["conclusion"] == NOT:
        return f"{text}Grouping does not matter here: both intervals exclude an effect of {worth:g} %."
    text += (
        "These runs cannot tell whether grouping matters: the effect can be above or below "
        f"{worth:g} % by these intervals."
    )
    if enough is None:
        return f"{text} {TIMES} times as many runs would not be enough either."
    return (
        f"{text} By the observed standard deviations, about {enough[1]} seeds and {enough[0]} partitions would be "
        f"enough ({proposed['count']} and {spread['count']} were trained)."
    )


def relation_text(gains: Mapping[str, Mapping[str, Any] | None]) -> str:
    """The gains over and of naive MTL and the wide encoder.

    Args:
        gains: `random`, `wide`, `proposed_over_wide` and `wide_over_random`; those of the wide encoder are None if
            its widths are fixed.
    """
    parts = [f"Random groups are {_relation(gains['random'], 'naive MTL')}."]
    if gains["wide"] is not None:
        parts.append(
            f"One wide encoder of the same cost is {_relation(gains['wide'], 'naive MTL')} and "
            f"{_relation(gains['wide_over_random'], 'random groups')}. "
            f"Groups of tasks with a high feature overlap are {_relation(gains['proposed_over_wide'], 'it')}."
        )
    return " ".join([*parts, "The gains are of the losses on validation data."])


def _interval(mean: Mapping[str, Any], sign: str = "-") -> str:
    ends = f"{mean['low']:{sign}.1f} to {mean['high']:{sign}.1f}"
    return f"{mean['value']:{sign}.1f} % (95 % interval {ends})"


def _relation(gain: Mapping[str, Any] | None, reference: str) -> str:
    """A gain as better than a reference, worse than it, or not significantly different from it."""
    assert gain is not None
    if not gain["low"] * gain["high"] > 0:
        relation = "not significantly different from"
    else:
        relation = "better than" if gain["value"] > 0 else "worse than"
    return f"{relation} {reference} (gain {gain['value']:+.1f} %)"
