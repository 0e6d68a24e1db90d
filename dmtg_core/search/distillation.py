"""Distillation of an ensemble of networks into one network, with no additional inference cost.

The errors of independently trained networks differ, and the mean of their predictions is better than that of each.
A single network learns most of this from targets that mix labels with the mean of the teachers (Hinton, Vinyals
and Dean 2015). For a network that would overfit, the share of the teachers is constant. For any other network it
decreases to 0, because teachers that are no better than the network limit it (teacher annealing, Clark et al.
2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmtg_core.network.grouping_network import GroupingNetwork, clone
from dmtg_core.network.members import average
from dmtg_core.tasks import Task
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Batch, Data
from dmtg_core.training.loop import NO_HOOKS, Hooks, advance
from dmtg_core.training.losses import valid
from dmtg_core.training.settings import TrainSettings, resolve
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import autocast

WEIGHT = 0.8  # weight of the teachers' mean in a target with a label
OVERFIT = 0.25  # generalisation gap of a network that would overfit: validation losses 28 % above training losses


class Ensemble(nn.Module):
    """The mean prediction of hard networks with the same tasks: probabilities are averaged, or values.

    Args:
        networks: The networks. They are not changed.
    """

    def __init__(self, networks: Sequence[GroupingNetwork]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.tasks = networks[0].tasks
        self.eval()

    def forward(self, raw: Tensor) -> dict[str, Tensor]:
        """Compute outputs in the form of `GroupingNetwork.forward`."""
        outputs = [network(raw) for network in self.networks]
        stacked = {task.name: torch.stack([out[task.name] for out in outputs], 1) for task in self.tasks}
        return {task.name: average(task, stacked[task.name]) for task in self.tasks}


class Teachers:
    """A teacher ensemble that mixes the labels of training batches with its predictions.

    A missing label is replaced by the prediction.

    Args:
        networks: Hard networks with the same tasks. They are not changed.
        precision: Precision of the computation, see `TrainSettings`.
        share: Weight of the teachers' mean in a target with a label. It is called for each batch.
    """

    def __init__(
        self,
        networks: Sequence[GroupingNetwork],
        precision: str = "fp32",
        share: Callable[[], float] = lambda: WEIGHT,
    ) -> None:
        self.networks, self.precision, self.share = [network.eval() for network in networks], precision, share

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with mixed targets."""
        with torch.no_grad(), autocast(self.precision, batch.inputs.device):
            outputs = [network(batch.inputs) for network in self.networks]
        share = self.share()
        targets = {
            task.name: mixed_target(task, batch.targets[task.name], [out[task.name] for out in outputs], share)
            for task in self.networks[0].tasks
        }
        return Batch(batch.inputs, targets)


def distillation_state(network: GroupingNetwork, score: float, settings: TrainSettings) -> TrainState:
    """Return the state at the beginning of a distillation. The network is the best until an epoch is better.

    Args:
        network: A trained network. It is copied.
        score: Validation score of the network.
        settings: Training settings of the distillation.
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
    """Train on labels mixed with the predictions of teachers, and take the weights of the best epoch.

    Args:
        state: A state of `distillation_state`, at any epoch.
        teachers: See `Teachers`.
        data, settings, context, hooks: As for `advance`.
        gap: `generalisation_gap` of the last epoch of the network with labels alone.

    Raises:
        NonFiniteLossError: If the loss is not finite.
    """
    settings = resolve(settings, state.network, context.device, context.world_size)
    teach = Teachers(teachers, settings.precision, lambda: teacher_share(gap, state.epoch, settings.epochs))
    mixed = replace(hooks, prepare=teach)
    advance(state, data, settings, context, until=settings.epochs, hooks=mixed)
    state.take_best()


def teacher_share(gap: float, epoch: int, epochs: int) -> float:
    """Return the weight of the teachers' mean: `WEIGHT`, decreasing to 0 unless the network would overfit.

    Args:
        gap: See `distil`.
        epoch: Number of completed epochs.
        epochs: Number of all epochs.
    """
    return WEIGHT if gap > OVERFIT else WEIGHT * (1 - epoch / max(epochs - 1, 1))


def mixed_target(task: Task, target: Tensor, outputs: Sequence[Tensor], share: float = WEIGHT) -> Tensor:
    """Mix a target with the mean prediction of the teachers. A missing label is replaced by the mean.

    Args:
        task: The task.
        target: Encoded labels, see `Task.encode`.
        outputs: Output of each teacher, see `GroupingNetwork.forward`.
        share: Weight of the mean.

    Returns:
        Probabilities of classes `(B, C)` or `(B, C, H, W)`, of the positive class `(B,)`, or values in network
        units of the shape of the target.
    """
    if task.classes:
        mean = torch.stack([out.float().softmax(1) for out in outputs]).mean(0)
        known = valid(task, target)
        labels = F.one_hot(target.where(known, 0), task.channels).movedim(-1, 1)
        return torch.where(known.unsqueeze(1), torch.lerp(labels.float(), mean, share), mean)
    values = [out.float().sigmoid() if task.kind == "binary" else out.float() for out in outputs]
    mean = torch.stack(values).mean(0)
    return torch.where(target.isnan(), mean, torch.lerp(target, mean, share))
