"""Whether one model is better than another on the same samples, by how much, and how sure that is.

Every metric here is a function of sums over samples (`dmtg_core.metrics`), so a resample of them has the metrics
of the resampled sums. Samples are resampled in blocks: with as many blocks as samples this is the bootstrap itself
(Efron 1979), with fewer its intervals are the same up to the noise of a few hundred blocks, at a bounded size. The
resamples are paired: both models are judged on the same ones, which takes out what samples are hard for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmtg_core.metrics import Metrics, MetricSums, error_of
from dmtg_core.tasks import Task

BLOCKS = 256


class BlockSums:
    """Sums of every task's metrics, a `MetricSums` for each block of samples.

    Samples have to come in the same order for every model that is compared, in an order that says nothing about
    them: a block is a stretch of it.

    Args:
        tasks: What is measured.
        samples: How many will come.
        blocks: How many blocks, at most; never more than samples.

    Raises:
        ValueError: For fewer than two samples.
    """

    def __init__(self, tasks: Sequence[Task], samples: int, blocks: int = BLOCKS) -> None:
        if samples < 2:
            raise ValueError(f"a comparison needs at least 2 samples, got {samples}")
        self.tasks, self.samples = tuple(tasks), samples
        self.edges = [i * samples // min(blocks, samples) for i in range(min(blocks, samples) + 1)]
        self.blocks = [MetricSums(tasks) for _ in self.edges[1:]]
        self.seen = 0

    def update(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
        """Add a batch, as `MetricSums.update`.

        Raises:
            ValueError: For more samples than were announced.
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
        """The sums of a task, a row a block, float64 `(blocks, sums)`."""
        return torch.stack([block.sums[task.name].cpu() for block in self.blocks])

    def metrics(self) -> Metrics:
        """Task → metric → value over all samples."""
        total = MetricSums(self.tasks)
        total.sums = {task.name: self.matrix(task).sum(0) for task in self.tasks}
        return total.compute()


@dataclass(frozen=True)
class Gain:
    """By how many per cent an error fell; negative where it rose.

    Args:
        value: On all samples; -inf where the error was 0 and is not now, NaN where it is not defined.
        low, high: Ends of the bootstrap interval; NaN where nothing is defined.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A challenger beside a champion on the same samples.

    Args:
        gain: Mean over the tasks of the relative fall of the headline metric's error (`normalized_gain`).
        by_task: The same for each task.
        champion, challenger: Task → metric → value.
        likely: Share of the resamples in which the challenger's mean error is lower.
        samples: How many were judged on.
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
    """A paired bootstrap over blocks of samples, with percentile intervals.

    Resamples in which a task's metric is not defined (a class that does not occur) are left out for that task, and
    the mean is over the tasks that are defined.

    Raises:
        ValueError: When the two have not seen the same tasks and the same number of samples, all of them.
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
                for a, b in zip(
                    _errors(task, counts @ champion.matrix(task)),
                    _errors(task, counts @ challenger.matrix(task)),
                    strict=True,
                )
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
        raise ValueError("champion and challenger must be judged on the same tasks and samples")


def _errors(task: Task, sums: Tensor) -> list[float]:
    """The headline error of each row of sums."""
    found = []
    for row in sums:
        one = MetricSums([task])
        one.sums = {task.name: row}
        found.append(error_of(task.metric, one.compute()[task.name][task.metric]))
    return found


def _relative(before: float, after: float) -> float:
    """Fall of an error in per cent of what it was."""
    if before > 0:
        return 100 * (before - after) / before
    if math.isnan(before) or math.isnan(after):
        return math.nan
    return 0.0 if after <= before else -math.inf


def _interval(values: Tensor, confidence: float) -> tuple[float, float]:
    known = values[~values.isnan()]
    if not len(known):
        return math.nan, math.nan
    ordered = known.sort().values  # an infinite one has no place between two others
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = (float(ordered[min(int(end * len(ordered)), len(ordered) - 1)]) for end in ends)
    return low, high
