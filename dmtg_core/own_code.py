"""Losses and metrics that are functions of the user: their arguments, and what is done with missing labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dmtg_core.addresses import is_address, load
from dmtg_core.tasks import Task


def code_of_tasks(tasks: Iterable[Task]) -> list[tuple[str, str]]:
    """Return kind and address of the losses and metrics that are code of other packages."""
    named = [pair for task in tasks for pair in (("loss", task.loss), ("metric", task.metric))]
    return list(dict.fromkeys(pair for pair in named if is_address(pair[1])))


def labelled(task: Task, target: Tensor) -> Tensor:
    """Mask of the samples with a label, bool `(B,)`: all labels of a sample, or any pixel of a dense task."""
    if task.classes and target.is_floating_point():  # probabilities of a distillation
        return torch.ones(len(target), dtype=torch.bool, device=target.device)
    known = target != task.ignore_index if task.classes else ~target.isnan()
    known = known.reshape(len(target), -1)
    return known.any(1) if task.dense else known.all(1)


def own_loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of each sample with the function `task.loss`, `(B,)`; 0 for samples without a label.

    Args:
        task: A task whose loss is an address.
        output, target: Output and encoded target, see `Task.encode`. Both are in network units.

    Raises:
        ValueError: If the function does not return `(B,)`.
    """
    known = labelled(task, target)
    rows = known.reshape(-1, *[1] * (target.dim() - 1))
    return _called("loss", task.loss, output, target.masked_fill(~rows, 0)) * known


def own_metric_sums(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Compute the sum of `task.metric` over the samples with a label, and their number, float64 `(2,)`.

    The function gets predictions of `Task.decode` and labels in raw units.
    """
    known = labelled(task, target)
    truth = target[known]
    if task.kind in ("regression", "dense_regression"):
        truth = task.decode(truth)
    count = known.sum().double()
    if not len(truth):
        return torch.stack([torch.zeros_like(count), count])
    return torch.stack([_called("metric", task.metric, task.decode(output[known]), truth).double().sum(), count])


def _called(kind: str, address: str, output: Tensor, target: Tensor) -> Tensor:
    found: object = load(kind, address)(output, target)
    if not isinstance(found, Tensor) or found.shape != target.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{kind} {address} must return one value for each sample, ({len(target)},), got {got}")
    return found
