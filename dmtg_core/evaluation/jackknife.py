"""Validation scores without parts of the samples, and the standard error of their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dmtg_core.tasks import Task
from dmtg_core.training.context import TrainContext, gather
from dmtg_core.training.data import Data
from dmtg_core.training.loop import score_of
from dmtg_core.training.metrics import MetricSums

PARTS = 20


@dataclass(frozen=True)
class Difference:
    """A difference of validation scores.

    Args:
        value: The difference.
        error: Its standard error.
    """

    value: float
    error: float


@torch.no_grad()
def score_parts(
    tasks: Sequence[Task],
    network: nn.Module,
    data: Data,
    context: TrainContext,
    *,
    split: str = "val",
    batch_size: int = 256,
    parts: int = PARTS,
) -> list[float]:
    """Compute `score_of` a network on all samples, and on all samples without one of G parts, for each part.

    Sample i is in part i modulo G.

    Args:
        tasks: The tasks.
        network: A hard network of these tasks, in evaluation mode.
        data: Data of this worker.
        context: Context of this worker.
        split: Split on which it is evaluated.
        batch_size: Samples that are computed at a time.
        parts: G. There are never more parts than samples.
    """
    found, rows = [MetricSums(tasks) for _ in range(parts)], 0  # by the number of the sample of this worker
    for batch in data.evaluate(split, batch_size):
        outputs, size = network(batch.inputs), len(batch.inputs)
        for first in range(min(parts, size)):
            own = slice(first, None, parts)
            targets = {name: target[own] for name, target in batch.targets.items()}
            found[(rows + first) % parts].update({name: out[own] for name, out in outputs.items()}, targets)
        rows += size
    counts = torch.cat(gather(torch.tensor([rows], device=context.device), context))
    before = int(counts[: context.rank].sum()) % parts
    found = (found[-before:] + found[:-before])[: int(counts.sum())] if before else found[: int(counts.sum())]
    filled = next(part for part in found if part.sums)
    for part in found:
        if not part.sums:  # this worker has no sample of it
            part.start_as(filled)
        part.reduce(context)
    kept = [found] + [[*found[:k], *found[k + 1 :]] for k in range(len(found)) if len(found) > 1]
    return [score_of(tasks, MetricSums.joined(some).compute()) for some in kept]


def difference_of(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Return the second score minus the first, on the same samples.

    The standard error is that of the jackknife that omits one part of the samples after the other (Kott 2001).
    With G parts it is the square root of (G - 1) / G times the sum of the squared deviations of the G differences
    from their mean. It is infinite for a single sample.

    Args:
        first, second: Results of `score_parts` with the same parts.
    """
    value, *without = (b - a for a, b in zip(first, second, strict=True))
    if not without:
        return Difference(value, math.inf)
    mean = sum(without) / len(without)
    squares = sum((one - mean) ** 2 for one in without)
    return Difference(value, math.sqrt((len(without) - 1) / len(without) * squares))
