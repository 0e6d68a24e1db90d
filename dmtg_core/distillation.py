"""One network learns on from what several have learned: better answers at no cost at inference.

Networks that were trained apart err apart, and the mean of their predictions is better than each of them. A single
network can learn most of it, with that mean in the place of a part of every label (Hinton, Vinyals and Dean 2015).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dmtg_core.data import Batch, Data
from dmtg_core.losses import valid
from dmtg_core.network import GroupingNetwork
from dmtg_core.step import autocast
from dmtg_core.tasks import Task

WEIGHT = 0.8  # of the teachers' mean in a target that has a label


class TaughtData:
    """Training data whose labels are mixed with what teachers predict; a missing label is their prediction.

    What a split is evaluated on stays as it is. Teachers see samples before they are augmented.

    Args:
        data: The samples.
        teachers: Hard networks with the same tasks, which are not changed.
        precision: What they are computed in, see `TrainSettings`.
    """

    def __init__(self, data: Data, teachers: Sequence[GroupingNetwork], precision: str = "fp32") -> None:
        self.data, self.precision = data, precision
        self.teachers = [teacher.eval() for teacher in teachers]

    def steps(self, batch_size: int) -> int:
        """See `Data.steps`."""
        return self.data.steps(batch_size)

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`."""
        return self.data.evaluate(split, batch_size)

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Data.train`."""
        for batch in self.data.train(epoch, batch_size, start):
            with torch.no_grad(), autocast(self.precision, batch.inputs.device):
                outputs = [teacher(batch.inputs) for teacher in self.teachers]
            yield Batch(batch.inputs, self._mixed(batch.targets, outputs))

    def _mixed(self, targets: Mapping[str, Tensor], outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            task.name: mixed_target(task, targets[task.name], [out[task.name] for out in outputs])
            for task in self.teachers[0].tasks
        }


def mixed_target(task: Task, target: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """A target with the share `WEIGHT` of what teachers predict on average, all of it where there is no label.

    Args:
        task: The task.
        target: Encoded labels, see `Task.encode`.
        outputs: What each teacher gives, see `GroupingNetwork.forward`.

    Returns:
        Probabilities of classes `(B, C)` or `(B, C, H, W)`, of the positive class `(B,)`, or values in network
        units like the target's.
    """
    if task.classes:
        mean = torch.stack([out.float().softmax(1) for out in outputs]).mean(0)
        known = valid(task, target)
        labels = F.one_hot(target.where(known, 0), task.channels).movedim(-1, 1)
        return torch.where(known.unsqueeze(1), torch.lerp(labels.float(), mean, WEIGHT), mean)
    values = [out.float().sigmoid() if task.kind == "binary" else out.float() for out in outputs]
    mean = torch.stack(values).mean(0)
    return torch.where(target.isnan(), mean, torch.lerp(target, mean, WEIGHT))
