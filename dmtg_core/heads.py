"""Heads: a bank that holds all small heads as one batched product, and a decoder for dense tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dmtg_core.tasks import Task


class HeadBank(nn.Module):
    """The linear heads of every sample-wise task on every branch.

    The heads of branch k are the rows of one weight `(C_k, F)`: `channels` rows for each task that is alive
    there, in the order of the tasks. Training multiplies all of them at once; evaluation multiplies head by
    head, so that a head gives bit for bit the same whatever other heads are beside it.

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
        self.kept: dict[int, list[Task]] = {k: list(tasks) for k in range(groups) if tasks}
        self.weights = nn.ParameterDict({str(k): nn.Parameter(torch.empty(rows, features)) for k in self.kept})
        self.biases = nn.ParameterDict({str(k): nn.Parameter(torch.zeros(rows)) for k in self.kept})
        for weight in self.weights.values():
            nn.init.uniform_(weight, -1 / math.sqrt(features), 1 / math.sqrt(features))
        self.register_buffer("index", self._index(), persistent=False)

    def forward(self, features: Mapping[int, Tensor]) -> Tensor:
        """All heads that are alive.

        Args:
            features: Branch number to its features, `(B, F)`.

        Returns:
            `(M, B)`: the rows of branch 0, of branch 1, and so on.
        """
        if not self.training:
            return torch.cat([self._apart(k, t, features[k]).T for k, kept in self.kept.items() for t in kept])
        x = torch.stack([features[k] for k in self.kept])  # (K, B, F)
        weight = pad_sequence(list(self.weights.values()), batch_first=True)  # (K, C, F), C = max of C_k
        bias = pad_sequence(list(self.biases.values()), batch_first=True)  # (K, C)
        out = torch.baddbmm(bias.unsqueeze(2), weight, x.transpose(1, 2))  # (K, C, B)
        return out.flatten(0, 1).index_select(0, self.index)  # (M, B)

    def head(self, k: int, task: Task, features: Tensor) -> Tensor:
        """One head: `(B, F)` to `(B,)` for a single channel, else `(B, C)`."""
        out = self._apart(k, task, features)
        return out.squeeze(1) if task.channels == 1 else out

    def _apart(self, k: int, task: Task, features: Tensor) -> Tensor:
        rows = self.rows(k, task)
        return nn.functional.linear(features, self.weights[str(k)][rows], self.biases[str(k)][rows])  # (B, C)

    def rows(self, k: int, task: Task) -> slice:
        """Where the head of `task` lies in the weight of branch `k`."""
        before = self.kept[k][: self.kept[k].index(task)]
        start = sum(t.channels for t in before)
        return slice(start, start + task.channels)

    def keep(self, kept: Mapping[int, Sequence[Task]]) -> dict[nn.Parameter, tuple[nn.Parameter, Tensor]]:
        """Remove all heads but those of `kept` (branch number to its tasks).

        Returns:
            For each parameter that shrank: new parameter → (old parameter, rows of it that stayed).
        """
        followed: dict[nn.Parameter, tuple[nn.Parameter, Tensor]] = {}
        for k in list(self.kept):
            key, stay = str(k), [task for task in self.kept[k] if task in kept.get(k, ())]
            if stay == self.kept[k]:
                continue
            device = self.weights[key].device
            rows = torch.cat(
                [torch.arange(self.rows(k, t).start, self.rows(k, t).stop) for t in stay]
                or [torch.empty(0).long()]
            ).to(device)
            if not stay:
                del self.weights[key], self.biases[key], self.kept[k]
                continue
            for store in (self.weights, self.biases):
                old = store[key]
                store[key] = nn.Parameter(old.detach()[rows].clone())
                followed[store[key]] = (old, rows)
            self.kept[k] = stay
        self.index = self._index().to(self.index.device)
        return followed

    def _index(self) -> Tensor:
        """Positions of the live rows in the padded product, flattened."""
        counts = [sum(task.channels for task in kept) for kept in self.kept.values()]
        widest = max(counts, default=0)
        return torch.cat([torch.arange(c) + i * widest for i, c in enumerate(counts)] or [torch.empty(0).long()])


class DenseDecoder(nn.Module):
    """Feature map to a map of the input's size, doubling the resolution by sub-pixel convolutions.

    Shi et al. 2016: a convolution gives four times the channels, which become a map of twice the size, so that
    all computing is done at the lower resolution. The step is cheap where many decoders are trained at once.

    Args:
        features: Channels of the feature map.
        channels: Channels of the output.
        stride: Input pixels a feature pixel spans, a power of two.
        width: Channels of the first convolution, halved with every doubling down to 16.
    """

    def __init__(self, features: int, channels: int, stride: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(features, width, 3, padding=1, bias=False), *_activated(width)]
        doublings = int(math.log2(stride))
        for _ in range(doublings - 1):
            narrower = max(width // 2, 16)
            layers += [nn.Conv2d(width, 4 * narrower, 3, padding=1, bias=False), *_activated(4 * narrower)]
            layers.append(nn.PixelShuffle(2))
            width = narrower
        last = nn.Conv2d(width, channels * (4 if doublings else 1), 3, padding=1)
        self.body = nn.Sequential(*layers, last, *([nn.PixelShuffle(2)] if doublings else []))

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """`(B, F, h, w)` to `(B, C, *size)`."""
        out: Tensor = self.body(features)
        if out.shape[2:] != size:  # an input that the stride does not divide
            out = nn.functional.interpolate(out, size=size, mode="bilinear", align_corners=False)
        return out


def _activated(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]
