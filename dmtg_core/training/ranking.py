"""Ranking metrics of a binary task: AUROC and average precision.

Both are exact for up to `EXACT` scores of a split. For more scores, neighbouring scores are counted in bins. When
a bin is created, it has at most a share of 1 / `BINS` of the positives and of the negatives. A bin is an interval
of numbers with common leading bits. Two bins are therefore disjoint or nested, and the bins of several workers can
be joined. Scores of one bin count as tied, which changes AUROC by at most half of a bin's share.
`Bins.error_bounds` computes bounds for given scores, and `MetricSums` logs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EXACT = 10_000_000  # scores of a split that are stored individually
BINS = 2**16
TAKEN = 2**20  # scores that are collected on the device before they are moved to the host

AUROC, AVERAGE_PRECISION = "auroc", "average_precision"


@dataclass(frozen=True)
class Bins:
    """Label counts of scores in disjoint intervals, by ascending score. Arrays are int64 `(n,)`.

    Args:
        start, end: First and last score of each interval, see `ordered`. They are equal for a single score.
        positive, negative: Number of positive and of negative labels in each interval, at least one in total.
    """

    start: np.ndarray
    end: np.ndarray
    positive: np.ndarray
    negative: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> Bins:
        """Build an interval for each different score.

        Args:
            scores: Without NaN, `(n,)`.
            labels: Bool, `(n,)`.
        """
        key = ordered(scores)
        if np.bitwise_or.reduce(key, initial=0) & 1:
            order = key.argsort()
            key, label = key[order], labels[order]
        else:  # the last bit of float32 scores is free: it holds the label, so that only one array is sorted
            key = np.sort(key + labels)
            label = (key & 1).astype(bool)
            key -= label
        first = _starts(key)
        positive = _sums(label.astype(np.int64), first)
        count = np.diff(first, append=len(key))
        return cls(key[first], key[first], positive, count - positive)

    def auroc(self) -> float:
        """Compute the share of correctly ordered pairs of a positive and a negative. A tie counts half.

        Hanley and McNeil 1982. NaN if there is no pair.
        """
        pairs = float(self.positive.sum()) * float(self.negative.sum())
        below = np.cumsum(self.negative) - self.negative / 2
        return float(self.positive @ below) / pairs if pairs else math.nan

    def average_precision(self) -> float:
        """Sum precision times the step of recall over the different scores, as in scikit-learn.

        NaN if there is no positive.
        """
        total = int(self.positive.sum())
        found, wrong = self._above()
        return float(self.positive @ (found / (found + wrong))) / total if total else math.nan

    def _above(self) -> tuple[np.ndarray, np.ndarray]:
        """Positives and negatives in each interval and all higher ones."""
        return np.cumsum(self.positive[::-1])[::-1], np.cumsum(self.negative[::-1])[::-1]

    def error_bounds(self) -> dict[str, float]:
        """Bound the difference of each metric to its value for the individual scores; 0 if it is exact."""
        wide = self.end > self.start
        positive, negative = self.positive[wide], self.negative[wide]
        pairs = float(self.positive.sum()) * float(self.negative.sum())
        found, wrong = (above[wide] for above in self._above())
        before, ahead = found - positive, wrong - negative  # of higher intervals
        # bounds of the precision at a positive of an interval, for any order within the interval
        with np.errstate(invalid="ignore"):
            used, most = found / (found + wrong), np.nan_to_num(found / (found + ahead))
            least = (before + 1) / (before + 1 + wrong)
        off = max(float(positive @ (most - used)), float(positive @ (used - least)))
        total = float(self.positive.sum())
        return {
            AUROC: float(positive @ negative.astype(float)) / (2 * pairs) if pairs else 0.0,
            AVERAGE_PRECISION: off / total if total else 0.0,
        }

    def coarser(self, bins: int = BINS) -> Bins:
        """Join neighbouring intervals while each has at most 1/bins of the positives and of the negatives.

        Only intervals whose scores have common leading bits are joined.
        """
        most = self.positive.sum() / bins, self.negative.sum() / bins
        done, rest = [], self
        large = np.zeros(len(rest), dtype=bool)  # stays in `rest` so that no intervals are joined across it
        level = _trailing_zeros(
            int(np.bitwise_or.reduce(self.start, initial=0))
        )  # no two scores have more common bits
        while not large.all() and level < 62:
            level += 1
            first = _starts(rest.start >> level)
            joined, count = rest.added(first), np.diff(first, append=len(rest))
            small = (joined.positive <= most[0]) & (joined.negative <= most[1])
            done.append(rest._where(np.repeat(~small, count) & ~large))
            begin = joined.start >> level << level
            wide = small & (count > 1)
            rest = Bins(
                np.where(wide, begin, joined.start),
                np.where(wide, begin + (1 << level) - 1, joined.end),
                joined.positive,
                joined.negative,
            )
            large = ~small
        return joined_bins([*done, rest._where(~large)])[0]

    def _where(self, chosen: np.ndarray) -> Bins:
        return Bins(self.start[chosen], self.end[chosen], self.positive[chosen], self.negative[chosen])

    def added(self, first: np.ndarray) -> Bins:
        """Sum neighbouring intervals. `first` are the positions where a sum begins."""
        last = np.append(first, len(self))[1:] - 1
        return Bins(self.start[first], self.end[last], _sums(self.positive, first), _sums(self.negative, first))


def joined_bins(parts: Sequence[Bins]) -> tuple[Bins, np.ndarray]:
    """Join the intervals of several parts. Also return the new position of each interval, part by part.

    Intervals of two parts are disjoint or nested. Of nested intervals the larger one is kept.
    """
    start, end, positive, negative = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("start", "end", "positive", "negative")
    )
    order = np.lexsort((-end, start)) if (end > start).any() else start.argsort(kind="stable")
    reach = np.maximum.accumulate(end[order])
    new = np.ones(len(order), dtype=bool)
    new[1:] = start[order][1:] > reach[:-1]
    place = np.empty(len(order), np.int64)
    place[order] = np.cumsum(new) - 1
    sorted_parts = Bins(start[order], reach, positive[order], negative[order])
    return sorted_parts.added(np.flatnonzero(new)), place


class Scores:
    """Scores of a binary task with their labels, added batch by batch and joined over workers.

    Args:
        exact: Number of scores that are stored individually. More scores are counted in bins, see the module.
    """

    def __init__(self, exact: int = EXACT) -> None:
        self.exact = exact
        self.undefined = 0  # labelled scores that are NaN
        self.held = 0  # scores that are stored individually
        self._waiting: list[Tensor] = []
        self._wait = 0
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []
        self._bins: list[Bins] = []  # at most one

    def add(self, score: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            score: `(B,)`, higher for the positive class.
            target: `(B,)`, positive above 0.5; NaN for a missing label.
        """
        score = score.detach() if score.dtype == torch.float64 else score.detach().float()
        self._waiting.append(torch.stack([score, target.to(score)]))
        self._wait += len(score)
        if self._wait >= min(TAKEN, self.exact):
            self._take()

    def _take(self) -> None:
        """Move the collected scores to the host."""
        if not self._waiting:
            return
        score, target = torch.cat([w.to(self._waiting[0]) for w in self._waiting], 1).cpu().numpy()
        self._waiting, self._wait = [], 0
        unknown, undefined = np.isnan(target), np.isnan(score)
        self.undefined += int((undefined & ~unknown).sum())
        kept = ~(unknown | undefined)
        self._chunks.append((score[kept], target[kept] > 0.5))
        self.held += int(kept.sum())
        if self.held > self.exact:
            self._count_in_bins()

    def _count_in_bins(self) -> None:
        self._bins = [self.bins().coarser()]
        self._chunks, self.held = [], 0

    @property
    def count(self) -> int:
        """Number of labelled scores."""
        self._take()
        return self.held + self.undefined + sum(int(b.positive.sum() + b.negative.sum()) for b in self._bins)

    def bins(self) -> Bins:
        """Return all scores that are not NaN."""
        self._take()
        scores, labels = (np.concatenate(columns) for columns in zip(_NO_SCORES, *self._chunks, strict=True))
        parts = [*self._bins, Bins.of(scores, labels)]
        return joined_bins(parts)[0] if self._bins else parts[0]

    def metrics(self, bins: Bins | None = None) -> dict[str, float]:
        """Compute metric → value; NaN if a score is NaN or a class is missing.

        Args:
            bins: Result of `bins` if it is available, because sorting the scores takes time.
        """
        bins = self.bins() if bins is None else bins
        if self.undefined:
            return {AUROC: math.nan, AVERAGE_PRECISION: math.nan}
        return {AUROC: bins.auroc(), AVERAGE_PRECISION: bins.average_precision()}

    def packed(self, *, coarse: bool) -> Tensor:
        """Pack all scores into int64 numbers, `(m,)`, for another worker. `joined` reads them.

        Args:
            coarse: Count the scores in bins first.
        """
        self._take()
        if coarse:
            self._count_in_bins()
        bins = self.bins()
        ends = [bins.end] if (bins.end > bins.start).any() else []
        sizes = np.array([self.undefined, len(bins)])
        return torch.from_numpy(np.concatenate([sizes, bins.start, bins.positive, bins.negative, *ends]))

    @classmethod
    def joined(cls, packs: Sequence[Tensor], exact: int = EXACT) -> Scores:
        """Join the packed scores of several workers."""
        whole, parts = cls(exact), []
        for pack in packs:
            undefined, size = pack[:2].tolist()
            start, positive, negative, *end = pack[2:].cpu().split(size) if size else [pack[:0].cpu()] * 3
            columns = (column.numpy() for column in (start, *(end or [start]), positive, negative))
            whole.undefined += undefined
            parts.append(Bins(*columns))
        whole._bins = [joined_bins(parts)[0]]
        return whole


_NO_SCORES = (np.zeros(0, np.float32), np.zeros(0, dtype=bool))


def ordered(scores: np.ndarray) -> np.ndarray:
    """Map scores to int64 numbers in the same order. Equal scores have equal numbers, also -0 and 0.

    The numbers are the bits of the float64 scores, reversed in order for negative scores.
    """
    bits = scores.astype(np.float64).view(np.int64)
    return np.where(bits < 0, np.iinfo(np.int64).min - bits, bits)


def _starts(values: np.ndarray) -> np.ndarray:
    """Positions in a sorted array where a new value begins."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return np.flatnonzero(new)


def _sums(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, first) if len(first) else values[:0]


def _trailing_zeros(number: int) -> int:
    return (number & -number).bit_length() - 1 if number else 63
