"""The moving average of the weights of a network in training.

At a constant learning rate the weights move around a minimum. Their average is nearer to it: its validation score
is better, and varies less from epoch to epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.training.context import TrainContext

EARLY = 9  # the average has at most a ninth of the steps so far
GATE = "gate.logits"  # not averaged: heads are pruned by the present probabilities


def averaging(average: GroupingNetwork | None, network: GroupingNetwork, steps: float) -> Callable[[int], None]:
    """Return the function that moves an average towards a network after each of its steps.

    The weights after step t count with max(1 / `steps`, 9 / (t + 9)). Running statistics of batch normalisation
    are averaged like weights.

    Args:
        average: A copy of the network with the same live heads, which is changed in place; or None.
        network: The network in training.
        steps: Number of steps over which weights are averaged.

    Returns:
        A function of the number of steps that the network has been trained for, from 1 on.
    """
    if average is None:
        return lambda _step: None
    held, current = average.state_dict(), network.state_dict()
    apart = [name for name, value in held.items() if value.data_ptr() != current[name].data_ptr()]  # not frozen
    smooth = [name for name in apart if held[name].is_floating_point() and name != GATE]
    averages, weights = [held[name] for name in smooth], [current[name] for name in smooth]
    copied = [(held[name], current[name]) for name in apart if name not in smooth]

    def update(step: int) -> None:
        get_ema_multi_avg_fn(1 - max(1 / max(steps, 1), EARLY / (step + EARLY)))(averages, weights, step)
        for old, new in copied:
            old.copy_(new)

    return update


def average_statistics(networks: Sequence[GroupingNetwork], context: TrainContext) -> None:
    """Average the running statistics of networks over all workers, in one message."""
    if context.world_size == 1:
        return
    running = [part for network in networks for part in network.running]
    buffers = [b for part in running for b in part.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = context.sum(torch.cat([b.flatten() for b in buffers])) / context.world_size
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.reshape(buffer.shape))
