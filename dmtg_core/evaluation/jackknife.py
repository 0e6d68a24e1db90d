"""The difference of two networks in the validation score, with its standard error over samples."""

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
def score_difference(
    tasks: Sequence[Task],
    first: nn.Module,
    second: nn.Module,
    data: Data,
    context: TrainContext,
    *,
    split: str = "val",
    batch_size: int = 256,
    parts: int = PARTS,
) -> Difference:
    """Compute `score_of` of the second network minus that of the first, on the same samples.

    The standard error is that of the jackknife that omits one part of the samples after the other (Kott 2001).
    With G parts it is the square root of (G - 1) / G times the sum of the squared deviations of the G differences
    from their mean. Sample i is in part i modulo G.

    Args:
        tasks: The tasks.
        first, second: Hard networks of these tasks, in evaluation mode.
        data: Data of this worker.
        context: Context of this worker.
        split: Split on which both are evaluated.
        batch_size: Samples that are computed at a time.
        parts: G. There are never more parts than samples. The error of a single sample is infinite.
    """
    own_rows = sum(len(batch.inputs) for batch in data.evaluate(split, batch_size))
    counts = gather(torch.tensor([own_rows], device=context.device), context)
    place = int(torch.cat(counts[: context.rank]).sum()) if context.rank else 0
    parts = min(parts, int(torch.cat(counts).sum()))
    found = [[MetricSums(tasks) for _ in range(parts)] for _ in range(2)]
    for batch in data.evaluate(split, batch_size):
        outputs = [network(batch.inputs) for network in (first, second)]
        rows = len(batch.inputs)
        for first_row in range(min(parts, rows)):
            part, own = (place + first_row) % parts, slice(first_row, None, parts)
            targets = {name: target[own] for name, target in batch.targets.items()}
            for sums, out in zip(found, outputs, strict=True):
                sums[part].update({name: value[own] for name, value in out.items()}, targets)
        place += rows
    for sums in found:
        filled = next(part for part in sums if part.sums)
        for sums_of_part in sums:
            if not sums_of_part.sums:  # this worker has no sample of it
                sums_of_part.start_as(filled)
            sums_of_part.reduce(context)

    def difference(omitted: int | None) -> float:
        before, after = (
            score_of(tasks, MetricSums.joined([part for k, part in enumerate(sums) if k != omitted]).compute())
            for sums in found
        )
        return after - before

    if parts < 2:
        return Difference(difference(None), math.inf)
    without = torch.tensor([difference(part) for part in range(parts)], dtype=torch.float64)
    squares = float((without - without.mean()).square().sum())
    return Difference(difference(None), ((parts - 1) / parts * squares) ** 0.5)
