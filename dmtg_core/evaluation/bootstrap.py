"""Paired bootstrap: the gain of one model over another on the same samples, with confidence intervals.

A metric that is a function of sums over samples (`dmtg_core.training.metrics`) is computed from the resampled
sums. AUROC and average precision (`dmtg_core.training.ranking`) are computed from the scores of each resample.
Samples are resampled in blocks. With as many blocks as samples this is the bootstrap of Efron (1979). With fewer
blocks the intervals are the same up to the noise of a few hundred blocks, and memory is bounded. The resamples are
paired: both models are evaluated on the same resamples, which removes the effect of samples that are hard for
both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmtg_core.tasks import Task
from dmtg_core.training.metrics import Metrics, MetricSums, error_of, task_metrics
from dmtg_core.training.ranking import AUROC, AVERAGE_PRECISION, EXACT, joined_bins

BLOCKS = 256
AT_ONCE = 2**22  # numbers that are processed at once


class BlockSums:
    """Sums of the metrics of all tasks, a `MetricSums` for each block of samples.

    A block is a sequence of consecutive samples. All compared models must see the samples in the same order, and
    the order must not depend on their contents.

    Args:
        tasks: The tasks.
        samples: Total number of samples.
        blocks: Largest number of blocks. There are never more blocks than samples.
        exact: See `MetricSums`.

    Raises:
        ValueError: For fewer than two samples.
    """

    def __init__(self, tasks: Sequence[Task], samples: int, blocks: int = BLOCKS, exact: int = EXACT) -> None:
        if samples < 2:
            raise ValueError(f"a comparison needs at least 2 samples, got {samples}")
        self.tasks, self.samples = tuple(tasks), samples
        self.edges = [i * samples // min(blocks, samples) for i in range(min(blocks, samples) + 1)]
        self.exact = exact
        self.blocks = [MetricSums(tasks, max(exact // (len(self.edges) - 1), 1)) for _ in self.edges[1:]]
        self.seen = 0

    def update(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        """Add a batch. See `MetricSums.update`.

        Raises:
            ValueError: If there are more than `samples` samples.
        """
        rows = len(next(iter(targets.values())))
        if self.seen + rows > self.samples:
            raise ValueError(f"expected {self.samples} samples, got {self.seen + rows} so far")
        for block, first, last in zip(self.blocks, self.edges, self.edges[1:], strict=False):
            part = slice(max(first - self.seen, 0), min(last - self.seen, rows))
            if part.start < part.stop:
                block.update({n: t[part] for n, t in outputs.items()}, {n: t[part] for n, t in targets.items()})
        self.seen += rows

    def matrix(self, task: Task) -> Tensor:
        """Return the sums of a task, one row for each block, float64 `(blocks, sums)`."""
        return torch.stack([block.sums[task.name].cpu() for block in self.blocks])

    def metrics(self) -> Metrics:
        """Compute task → metric → value over all samples."""
        return MetricSums.joined(self.blocks, self.exact).compute()

    def resampled(self, task: Task, counts: Tensor) -> list[float]:
        """Compute the headline error of a task in resamples.

        Args:
            task: The task.
            counts: Multiplicity of each block in each resample, float64 `(R, blocks)`.

        Returns:
            R errors; NaN if an error is not defined.
        """
        if task.metric in (AUROC, AVERAGE_PRECISION):
            values = self._ranked(task).resampled(task.metric, counts)
        else:
            matrix = self.matrix(task)
            rows = (row for part in counts.split(max(AT_ONCE // matrix.shape[1], 1)) for row in part @ matrix)
            values = [_from_sums(task, row) for row in rows]
        return [error_of(task.metric, value) for value in values]

    def _ranked(self, task: Task) -> _Ranked:
        parts = [block.scores[task.name].bins() for block in self.blocks]
        _, place = joined_bins(parts)
        order = torch.from_numpy(place.argsort(kind="stable"))
        block = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        positive, negative = (
            torch.from_numpy(np.concatenate([getattr(part, name) for part in parts])).double()
            for name in ("positive", "negative")
        )
        undefined = torch.tensor([float(held.scores[task.name].undefined) for held in self.blocks]).double()
        return _Ranked(torch.from_numpy(place)[order], block[order], positive[order], negative[order], undefined)


@dataclass(frozen=True)
class _Ranked:
    """Label counts by ascending score and block. Entry i belongs to interval `place[i]` of the scores.

    Args:
        place, block: Number of the interval and of the block, int64 `(m,)`, by ascending interval.
        positive, negative: Number of positive and of negative labels, float64 `(m,)`.
        undefined: Number of scores of each block that are NaN, float64 `(blocks,)`.
    """

    place: Tensor
    block: Tensor
    positive: Tensor
    negative: Tensor
    undefined: Tensor

    def resampled(self, metric: str, counts: Tensor) -> list[float]:
        """Compute a metric in resamples. It is NaN if a class is missing or a score is NaN."""
        values = (self._auroc if metric == AUROC else self._average_precision)(counts)
        return values.masked_fill(counts @ self.undefined > 0, torch.nan).tolist()

    def _by_block(self, values: Tensor, blocks: int) -> Tensor:
        return torch.zeros(blocks, dtype=torch.float64).index_add_(0, self.block, values)

    def _auroc(self, counts: Tensor) -> Tensor:
        """AUROC as a quadratic form: a resample has n_a · n_b copies of a pair of samples from blocks a and b."""
        blocks = counts.shape[1]
        won = torch.zeros(blocks, blocks, dtype=torch.float64)
        below = torch.zeros(blocks, dtype=torch.float64)
        last = int(self.place[-1]) + 1 if len(self.place) else 0
        size = max(AT_ONCE // blocks, 1)
        for start in range(0, last, size):
            first, stop = torch.searchsorted(self.place, torch.tensor([start, min(start + size, last)])).tolist()
            entries = slice(first, stop)
            place, block = self.place[entries] - start, self.block[entries]
            negative = torch.zeros(min(size, last - start), blocks, dtype=torch.float64)
            negative.index_put_((place, block), self.negative[entries], accumulate=True)
            up_to = below + negative.cumsum(0)
            rows = (up_to - negative / 2)[place] * self.positive[entries].unsqueeze(1)  # a tie counts half
            won.index_add_(0, block, rows)
            below = up_to[-1]
        pairs = (counts @ self._by_block(self.positive, blocks)) * (counts @ self._by_block(self.negative, blocks))
        return ((counts @ won) * counts).sum(1) / pairs  # 0 / 0 is NaN

    def _average_precision(self, counts: Tensor) -> Tensor:
        """Sum over intervals of precision times the step of recall, by descending interval."""
        place, block = self.place.flip(0), self.block.flip(0)
        positive, negative = self.positive.flip(0), self.negative.flip(0)
        ends = torch.cat([place[1:] != place[:-1], torch.ones(min(len(place), 1), dtype=torch.bool)])
        found = []
        for part in counts.split(max(AT_ONCE // max(len(place), 1), 1)):
            often = part[:, block]  # (r, m)
            right = (often * positive).cumsum(1)[:, ends]
            wrong = (often * negative).cumsum(1)[:, ends]
            step = right.diff(dim=1, prepend=right.new_zeros(len(right), 1))
            found.append((step * (right / (right + wrong)).nan_to_num(0.0)).sum(1))
        return torch.cat(found) / (counts @ self._by_block(self.positive, counts.shape[1]))  # 0 / 0 is NaN


@dataclass(frozen=True)
class Gain:
    """Relative reduction of an error in per cent. Positive is better.

    Args:
        value: Gain on all samples; -inf if only the champion's error is 0, NaN if the gain is not defined.
        low, high: Ends of the bootstrap interval; NaN if no resample is defined.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Comparison of a challenger with a champion on the same samples.

    Args:
        gain: Mean gain of the challenger over the tasks, from the headline metrics (`normalized_gain`).
        by_task: Gain of each task.
        champion, challenger: Task → metric → value.
        likely: Share of the resamples in which the challenger's mean gain is positive.
        samples: Number of samples.
    """

    gain: Gain
    by_task: dict[str, Gain]
    champion: Metrics
    challenger: Metrics
    likely: float
    samples: int


def compare(
    champion: BlockSums, challenger: BlockSums, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Compare two models with a paired bootstrap over blocks of samples and percentile intervals.

    Resamples in which a task's metric is not defined (a class is missing) are omitted for that task. The mean is
    over the tasks whose metric is defined.

    Raises:
        ValueError: If the tasks or the numbers of samples differ, or if samples are missing.
    """
    _check(champion, challenger)
    generator = torch.Generator().manual_seed(seed)
    blocks = len(champion.blocks)
    drawn = torch.randint(blocks, (resamples, blocks), generator=generator)
    counts = torch.zeros(resamples, blocks, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    before, after = champion.metrics(), challenger.metrics()
    by_task, values, rows = {}, [], []
    for task in champion.tasks:
        one = _relative(*(error_of(task.metric, m[task.name][task.metric]) for m in (before, after)))
        many = torch.tensor(
            [
                _relative(a, b)
                for a, b in zip(champion.resampled(task, counts), challenger.resampled(task, counts), strict=True)
            ],
            dtype=torch.float64,
        )
        by_task[task.name] = Gain(one, *_interval(many, confidence))
        values.append(one)
        rows.append(many)
    means = torch.stack(rows).nanmean(0)
    gain = Gain(float(torch.tensor(values, dtype=torch.float64).nanmean()), *_interval(means, confidence))
    known = means[~means.isnan()]
    likely = float((known > 0).double().mean()) if len(known) else math.nan
    return Comparison(gain, by_task, before, after, likely, champion.samples)


def _check(champion: BlockSums, challenger: BlockSums) -> None:
    for sums in (champion, challenger):
        if sums.seen != sums.samples:
            raise ValueError(f"expected {sums.samples} samples, got {sums.seen}")
    found = [([task.name for task in sums.tasks], sums.edges) for sums in (champion, challenger)]
    if found[0] != found[1]:
        raise ValueError("champion and challenger must be evaluated on the same tasks and samples")


def _from_sums(task: Task, row: Tensor) -> float:
    """Compute the headline metric from sums of `MetricSums`."""
    return task_metrics(task, row[2:])[task.metric]


def _relative(before: float, after: float) -> float:
    """Relative reduction of an error in per cent."""
    if before > 0:
        return 100 * (before - after) / before
    if math.isnan(before) or math.isnan(after):
        return math.nan
    return 0.0 if after <= before else -math.inf


def _interval(values: Tensor, confidence: float) -> tuple[float, float]:
    known = values[~values.isnan()]
    if not len(known):
        return math.nan, math.nan
    ordered = known.sort().values  # no interpolation: it is not defined for infinite values
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = (float(ordered[min(int(end * len(ordered)), len(ordered) - 1)]) for end in ends)
    return low, high
