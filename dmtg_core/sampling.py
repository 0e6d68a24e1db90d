"""Which training samples an epoch has and how often, and weights from the labels of the training samples.

The sampler "balanced" draws samples of rare classes more often. A sample has the weight n / (C · n_c) of its
class c, with n_c of n labels in C classes. With several tasks it is the largest weight of its labels, as in
repeat-factor sampling (Gupta, Dollár and Girshick 2019), and 1 without a label. An epoch has as many samples as
the data set. Each sample occurs as often as its share of the sum of weights says, rounded up or down at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dmtg_core.tasks import Task

SAMPLERS = ("uniform", "balanced")


class Labelled(Protocol):
    """Samples with labels, such as `Arrays`."""

    @property
    def labels(self) -> Mapping[str, Any]:
        """Task name → raw labels `(n, …)`, on any device."""
        ...

    @property
    def present(self) -> Mapping[str, Any]:
        """Task name → whether each label exists."""
        ...


def epoch_steps(rows: int, batch_size: int, world_size: int) -> int:
    """Number of global batches of an epoch.

    A remainder of less than two samples for each worker is added to the last batch.

    Raises:
        ValueError: If a batch is smaller than the number of workers.
    """
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} workers")
    full, rest = divmod(rows, batch_size)
    return max(full + (rest >= 2 * world_size), 1)


def sampled_tasks(tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks whose labels weight the samples: those with one flag or one class for each sample.

    Raises:
        ValueError: If there is none.
    """
    found = [task for task in tasks if task.kind in ("binary", "multiclass")]
    if not found:
        raise ValueError("sampler balanced needs a binary or multiclass task: use sampler uniform")
    return found


def class_ids(task: Task, part: Labelled) -> np.ndarray:
    """Return the class of each label of a task, int64, flattened; -1 for a missing label."""
    raw = _on_host(part.labels[task.name])
    known = np.ones(raw.shape, bool) if task.kind == "binary" else raw.astype(np.int64) != task.ignore_index
    if np.issubdtype(raw.dtype, np.floating):
        known &= ~np.isnan(raw)
    if (held := part.present.get(task.name)) is not None:
        present = _on_host(held)
        known &= present.reshape(present.shape + (1,) * (raw.ndim - present.ndim))
    ids = np.full(raw.shape, -1)
    np.copyto(ids, raw, where=known, casting="unsafe")
    return ids.ravel()


def _on_host(values: np.ndarray | Tensor) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def class_counts(task: Task, parts: Iterable[Labelled]) -> np.ndarray:
    """Count the labels of each class, int64 `(C,)`, with C = 2 for a binary task."""
    size = 2 if task.kind == "binary" else task.channels
    counts = np.zeros(size + 1, np.int64)
    for part in parts:
        counts += np.bincount(class_ids(task, part) + 1, minlength=size + 1)
    return counts[1:]


def balanced_tasks(tasks: Sequence[Task], parts: Sequence[Labelled]) -> tuple[Task, ...]:
    """Return the tasks with numbers in place of balanced weights of their losses.

    Args:
        tasks: The tasks.
        parts: The training samples.
    """
    return tuple(
        replace(task, loss_options=task.loss_options.counted(class_counts(task, parts).tolist()))
        if task.loss_options.balanced
        else task
        for task in tasks
    )


def sample_weights(tasks: Sequence[Task], parts: Sequence[Labelled]) -> np.ndarray:
    """Return the weight of each training sample, float64 `(n,)`; see the module.

    Raises:
        ValueError: As `sampled_tasks`.
    """
    weights = np.full(sum(len(part.labels[tasks[0].name]) for part in parts), -np.inf)
    for task in sampled_tasks(tasks):
        ids = np.concatenate([class_ids(task, part) for part in parts])
        counts = np.bincount(ids + 1, minlength=2)[1:]
        of_class = counts.sum() / (max((counts > 0).sum(), 1) * np.maximum(counts, 1))
        np.maximum(weights, np.append(of_class, -np.inf)[ids], out=weights)  # the last one is that of -1
    weights[np.isneginf(weights)] = 1.0
    return weights


def repeats(weights: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Return how often each sample occurs in an epoch, int64 `(n,)` with the sum n.

    It is systematic sampling over a random order of the samples: sample i occurs n · w_i / Σ w times, rounded up
    or down, with this mean.

    Args:
        weights: Weight of each sample.
        seed: Seed of the epoch.
    """
    rng = np.random.default_rng([*seed, 1])
    order = rng.permutation(len(weights))
    ends = np.cumsum(weights[order])
    edges = np.floor(ends * (len(weights) / ends[-1]) + rng.random()).astype(np.int64)
    edges[-1] = len(weights)  # exactly, whatever the rounding
    found = np.empty(len(weights), np.int64)
    found[order] = np.diff(np.minimum(edges, len(weights)), prepend=0)
    return found


def epoch_order(rows: int, weights: np.ndarray | None, seed: Sequence[int]) -> np.ndarray:
    """Return the samples of an epoch in their order: each once, or drawn with `weights`."""
    rng = np.random.default_rng(seed)
    if weights is None:
        return rng.permutation(rows)
    return rng.permutation(np.repeat(np.arange(rows), repeats(weights, seed)))
