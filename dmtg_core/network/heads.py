"""Heads of sample-wise tasks: a bank that computes all of them as one batched product."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dmtg_core.network.numbered import Numbered
from dmtg_core.tasks import Task


class HeadBank(nn.Module):
    """The linear heads of all sample-wise tasks on all branches.

    The heads of branch k are the rows of one weight `(C_k, F)`: `channels` rows for each task that is live there,
    in the order of the tasks. Training computes all heads at once. Evaluation computes head by head, so that the
    output of a head is bit-identical whatever other heads exist.

    Args:
        tasks: The sample-wise tasks.
        features: F.
        groups: K.
    """

    index: Tensor

    def __init__(self, tasks: Sequence[Task], features: int, groups: int) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        rows = sum(task.channels for task in tasks)
        self.kept = {k: _places(tasks) for k in range(groups) if tasks}
        self.weights = Numbered({k: nn.Parameter(torch.empty(rows, features)) for k in self.kept})
        self.biases = Numbered({k: nn.Parameter(torch.zeros(rows)) for k in self.kept})
        for weight in self.weights.values():
            nn.init.uniform_(weight, -1 / math.sqrt(features), 1 / math.sqrt(features))
        self.register_buffer("index", self._index(), persistent=False)

    def forward(self, features: Mapping[int, Tensor]) -> Tensor:
        """Compute all live heads.

        Args:
            features: Branch number → features of the branch, `(B, F)`.

        Returns:
            `(M, B)`: the rows of branch 0, then of branch 1, and so on.
        """
        if not self.training:
            return torch.cat([self._linear(k, t, features[k]).T for k, kept in self.kept.items() for t in kept])
        x = torch.stack([features[k] for k in self.kept])  # (K, B, F)
        # (K, C, F) and (K, C), C = max of C_k
        weight = pad_sequence([self.weights[k] for k in self.kept], batch_first=True)
        bias = pad_sequence([self.biases[k] for k in self.kept], batch_first=True)
        out = torch.baddbmm(bias.unsqueeze(2), weight, x.transpose(1, 2))  # (K, C, B)
        return out.flatten(0, 1).index_select(0, self.index)  # (M, B)

    def head(self, k: int, task: Task, features: Tensor) -> Tensor:
        """Compute one head: `(B, F)` to `(B,)` for a single channel, else `(B, C)`."""
        out = self._linear(k, task, features)
        return out.squeeze(1) if task.channels == 1 else out

    def _linear(self, k: int, task: Task, features: Tensor) -> Tensor:
        rows = self.rows(k, task)
        return nn.functional.linear(features, self.weights[k][rows], self.biases[k][rows])  # (B, C)

    def rows(self, k: int, task: Task) -> slice:
        """Rows of the head of `task` in the weight of branch `k`."""
        return self.kept[k][task]

    def keep(self, kept: Mapping[int, Sequence[Task]]) -> dict[nn.Parameter, tuple[nn.Parameter, Tensor]]:
        """Remove all heads except those of `kept` (branch number → tasks).

        Returns:
            For each parameter that lost rows: new parameter → (old parameter, kept rows).
        """
        followed: dict[nn.Parameter, tuple[nn.Parameter, Tensor]] = {}
        for k in list(self.kept):
            stay = [task for task in self.kept[k] if task in kept.get(k, ())]
            if len(stay) == len(self.kept[k]):
                continue
            device = self.weights[k].device
            rows = torch.cat(
                [torch.arange(self.rows(k, t).start, self.rows(k, t).stop) for t in stay]
                or [torch.empty(0).long()]
            ).to(device)
            if not stay:
                del self.weights[k], self.biases[k], self.kept[k]
                continue
            for store in (self.weights, self.biases):
                old = store[k]
                store[k] = nn.Parameter(old.detach()[rows].clone())
                followed[store[k]] = (old, rows)
            self.kept[k] = _places(stay)
        self.index = self._index().to(self.index.device)
        return followed

    def _index(self) -> Tensor:
        """Positions of the live rows in the flattened padded product."""
        counts = [sum(task.channels for task in kept) for kept in self.kept.values()]
        widest = max(counts, default=0)
        return torch.cat([torch.arange(c) + i * widest for i, c in enumerate(counts)] or [torch.empty(0).long()])


def _places(kept: Sequence[Task]) -> dict[Task, slice]:
    """Map the tasks of a branch, in their order, to the rows of their heads."""
    ends = accumulate(task.channels for task in kept)
    return {task: slice(end - task.channels, end) for task, end in zip(kept, ends, strict=True)}
