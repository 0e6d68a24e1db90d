"""Batches of stored samples, and a data set that fits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dmtg_core.tasks import Task


@dataclass(frozen=True)
class Batch:
    """Stored input `(B, …)` and encoded targets, on the training device."""

    inputs: Tensor
    targets: dict[str, Tensor]


class Data(Protocol):
    """What training reads. Every worker has its own, which gives that worker's part."""

    def train(self, epoch: int, batch_size: int) -> Iterator[Batch]:
        """This worker's part of every global batch of an epoch.

        Every sample comes once in an epoch, in an order that depends on the seed and the epoch alone. All
        workers get the same number of batches, none of them empty.
        """
        ...

    def steps(self, batch_size: int) -> int:
        """Global batches in an epoch."""
        ...

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """This worker's part of a split, each sample on exactly one worker."""
        ...


@dataclass(frozen=True)
class Arrays:
    """One split as arrays of n stored samples.

    Args:
        inputs: `(n, …)`.
        labels: Task name → `(n, …)` raw labels.
        present: Task name → bool `(n,)` or `(n, H, W)`, False where there is no label; a task without an entry
            has all labels.
    """

    inputs: np.ndarray
    labels: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, tasks: Sequence[Task], rows: np.ndarray, device: torch.device) -> Batch:
        """The samples at `rows`, encoded on `device`."""
        targets = {}
        for task in tasks:
            raw = _to(self.labels[task.name][rows], device)
            held = self.present.get(task.name)
            targets[task.name] = task.encode(raw, None if held is None else _to(held[rows], device))
        return Batch(_to(self.inputs[rows], device), targets)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    # torch computes little with uint16, and int32 holds all of its values
    tensor = torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class ArrayData:
    """A data set in memory; workers of one seed cut the same global batches.

    Args:
        splits: Split name → arrays.
        tasks: The tasks to give targets for.
        seed: Of the order of the training samples.
        rank, world_size: Which part is given.
        device: Where batches are made.

    Raises:
        ValueError: When a split has fewer samples than there are workers.
    """

    def __init__(
        self,
        splits: Mapping[str, Arrays],
        tasks: Sequence[Task],
        *,
        seed: int = 22,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, arrays in splits.items():
            if len(arrays) < world_size:
                raise ValueError(f"split {name!r} has {len(arrays)} samples for {world_size} workers")
        self.splits = dict(splits)
        self.tasks = tuple(tasks)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.device = torch.device(device)

    def steps(self, batch_size: int) -> int:
        """Global batches in an epoch; a remainder of less than two samples a worker joins the last."""
        if batch_size < self.world_size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {self.world_size} workers")
        rows = len(self.splits["train"])
        full, rest = divmod(rows, batch_size)
        return max(full + (rest >= 2 * self.world_size), 1)

    def train(self, epoch: int, batch_size: int) -> Iterator[Batch]:
        """See `Data.train`."""
        arrays = self.splits["train"]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(arrays))
        edges = [*range(0, len(order), batch_size)[: self.steps(batch_size)], len(order)]
        for start, stop in pairwise(edges):
            rows = np.array_split(order[start:stop], self.world_size)[self.rank]
            yield arrays.batch(self.tasks, rows, self.device)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`."""
        arrays = self.splits[split]
        mine = np.array_split(np.arange(len(arrays)), self.world_size)[self.rank]
        for start in range(0, len(mine), batch_size):
            yield arrays.batch(self.tasks, mine[start : start + batch_size], self.device)
