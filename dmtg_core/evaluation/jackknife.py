"""Validation scores without parts of the samples, and the standard error of their difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmtg_core.tasks import Task
from dmtg_core.training.context import TrainContext, gather
from dmtg_core.training.data import Batch, Data
from dmtg_core.training.loop import score_of
from dmtg_core.training.metrics import MetricSums

PARTS = 20
ROWS_OF_PART = 128  # samples of a part for which its sums are computed at a time, unless a task is dense

Outputs = Mapping[str, Tensor]


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
    least = 1 if any(task.dense for task in tasks) else ROWS_OF_PART * parts
    for outputs, targets, size in _joined(network, data.evaluate(split, batch_size), least):
        for first in range(min(parts, size)):
            own = slice(first, None, parts)
            found[(rows + first) % parts].update(
                {name: output[own] for name, output in outputs.items()},
                {name: target[own] for name, target in targets.items()},
            )
        rows += size
    counts = torch.cat(gather(torch.tensor([rows], device=context.device), context))
    turn = parts - int(counts[: context.rank].sum()) % parts
    found = (found[turn:] + found[:turn])[: int(counts.sum())]  # by the number of the sample of all workers
    filled = next(part for part in found if part.sums)
    for part in found:
        if not part.sums:  # this worker has no sample of it
            part.start_as(filled)
        part.reduce(context)
    kept = [found] + [[*found[:k], *found[k + 1 :]] for k in range(len(found)) if len(found) > 1]
    return [score_of(tasks, MetricSums.joined(some).compute()) for some in kept]


def _joined(network: nn.Module, batches: Iterable[Batch], least: int) -> Iterator[tuple[Outputs, Outputs, int]]:
    """Outputs, targets and number of at least `least` samples at a time, unless no more follow."""
    outputs, targets, size = list[Outputs](), list[Outputs](), 0
    for batch in batches:
        outputs.append(network(batch.inputs))
        targets.append(batch.targets)
        size += len(batch.inputs)
        if size >= least:
            yield _joint(outputs), _joint(targets), size
            outputs, targets, size = [], [], 0
    if size:
        yield _joint(outputs), _joint(targets), size


def _joint(parts: Sequence[Outputs]) -> Outputs:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
