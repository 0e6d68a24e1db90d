"""One network learns on from what several have learned: better answers at no cost at inference.

Networks that were trained apart err apart, and the mean of their predictions is better than each of them. A single
network can learn most of it, with that mean in the place of a part of every label (Hinton, Vinyals and Dean 2015).
A network that would overfit needs it to the end. Any other is held back by teachers that know no more than itself:
there the part falls to nothing (teacher annealing, Clark et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dmtg_core.network.grouping_network import GroupingNetwork, clone
from dmtg_core.tasks import Task
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Batch, Data
from dmtg_core.training.loop import NO_HOOKS, Hooks, advance
from dmtg_core.training.losses import valid
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import autocast

WEIGHT = 0.8  # of the teachers' mean in a target that has a label
OVERFIT = 0.25  # generalisation gap above which a network would overfit: validation losses 28 % above training's


class Teachers:
    """Mixes labels of training batches with what networks predict; a missing label is their prediction.

    Args:
        networks: Hard networks with the same tasks, which are not changed.
        precision: What they are computed in, see `TrainSettings`.
        share: What a target that has a label takes of their mean, asked for every batch.
    """

    def __init__(
        self,
        networks: Sequence[GroupingNetwork],
        precision: str = "fp32",
        share: Callable[[], float] = lambda: WEIGHT,
    ) -> None:
        self.networks, self.precision, self.share = [network.eval() for network in networks], precision, share

    def __call__(self, batch: Batch) -> Batch:
        """The batch with mixed targets."""
        with torch.no_grad(), autocast(self.precision, batch.inputs.device):
            outputs = [network(batch.inputs) for network in self.networks]
        share = self.share()
        targets = {
            task.name: mixed_target(task, batch.targets[task.name], [out[task.name] for out in outputs], share)
            for task in self.networks[0].tasks
        }
        return Batch(batch.inputs, targets)


def distillation_state(network: GroupingNetwork, score: float, settings: TrainSettings) -> TrainState:
    """The state in which a trained network begins to learn on; it stays the best until an epoch is better.

    Args:
        network: It is copied.
        score: Its validation score.
        settings: How it will learn.
    """
    state = TrainState.fresh(clone(network), settings)
    state.consider(score)
    return state


def distil(
    state: TrainState,
    teachers: Sequence[GroupingNetwork],
    data: Data,
    settings: TrainSettings,
    context: TrainContext,
    *,
    gap: float,
    hooks: Hooks = NO_HOOKS,
) -> None:
    """Train to the end on labels mixed with what teachers predict, and take the weights of the best epoch.

    Args:
        state: As `distillation_state` gives it, of any epoch.
        teachers: See `Teachers`.
        data, settings, context, hooks: As for `advance`.
        gap: The `generalisation_gap` of the last epoch that the network was trained for on labels alone.

    Raises:
        NonFiniteLossError: When the loss stops being finite.
    """
    teach = Teachers(teachers, settings.precision, lambda: teacher_share(gap, state.epoch, settings.epochs))
    taught = replace(hooks, prepare=teach)
    advance(state, data, settings, context, until=settings.epochs, hooks=taught)
    state.take_best()


def teacher_share(gap: float, epoch: int, epochs: int) -> float:
    """What a label gives to the teachers' mean: `WEIGHT`, falling to 0 unless a network would overfit.

    Args:
        gap: See `distil`.
        epoch: Epochs that are over.
        epochs: All.
    """
    return WEIGHT if gap > OVERFIT else WEIGHT * (1 - epoch / max(epochs - 1, 1))


def mixed_target(task: Task, target: Tensor, outputs: Sequence[Tensor], share: float = WEIGHT) -> Tensor:
    """A target with a share of what teachers predict on average, all of it where there is no label.

    Args:
        task: The task.
        target: Encoded labels, see `Task.encode`.
        outputs: What each teacher gives, see `GroupingNetwork.forward`.
        share: How much of a label it replaces.

    Returns:
        Probabilities of classes `(B, C)` or `(B, C, H, W)`, of the positive class `(B,)`, or values in network
        units like the target's.
    """
    if task.classes:
        mean = torch.stack([out.float().softmax(1) for out in outputs]).mean(0)
        known = valid(task, target)
        labels = F.one_hot(target.where(known, 0), task.channels).movedim(-1, 1)
        return torch.where(known.unsqueeze(1), torch.lerp(labels.float(), mean, share), mean)
    values = [out.float().sigmoid() if task.kind == "binary" else out.float() for out in outputs]
    mean = torch.stack(values).mean(0)
    return torch.where(target.isnan(), mean, torch.lerp(target, mean, share))
