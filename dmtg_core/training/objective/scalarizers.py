"""Weightings of the tasks by torchjd's scalarizers, an optional library (`train.task_weighting`).

A scalarizer combines the values of the tasks, their gated losses times `Task.weight`, into one loss. Its gradient
with respect to the values is the weight of each task in a step. Values are means over the labels of the whole
batch, so that weights are equal on all workers. A task without labels in a batch keeps its last value, which is 1
at first, and has no gradient in this step. Values are at least `SMALLEST`: some scalarizers divide by them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.network.encoders import seeded
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.training.objective.optimizer import new_optimizer
from dmtg_core.training.settings import TrainSettings

SMALLEST = 1e-8
STCH_MU = 0.1  # smoothing of "stch"; the paper tries 0.01 to 1
FAMO_OPTIMIZER = "_optimizer"  # attribute of the library, which has no other access to it

# name → (torchjd.scalarization, number of tasks) → scalarizer, with the library's defaults
SCALARIZERS: Mapping[str, Callable[[Any, int], Any]] = {
    # by how fast the loss decreased over the last two epochs (Liu et al. 2019)
    "dwa": lambda library, _: library.DWA(),
    # an equal rate of decrease, from the losses before and after each step (Liu et al. 2023)
    "famo": lambda library, tasks: library.FAMO(tasks),
    # the geometric mean (Chennupati et al. 2019)
    "geometric_mean": lambda library, _: library.GeometricMean(),
    # learned scales (Liu et al. 2021, "IMTL")
    "imtl_l": lambda library, tasks: library.IMTLL(tasks),
    # random weights in each step (Lin et al. 2022)
    "random": lambda library, _: library.Random(),
    # a smooth maximum (Lin et al. 2024)
    "stch": lambda library, _: library.STCH(STCH_MU),
    # learned variances (Kendall et al. 2018), the library's form: half of "uncertainty", which has factor 1
    "uw": lambda library, tasks: library.UW(tasks),
}


def load_scalarizer(name: str, tasks: int) -> Any:
    """Return a new scalarizer for a number of tasks.

    Raises:
        ValueError: If the library is missing. The message has the command that installs it.
    """
    try:
        library = importlib.import_module("torchjd.scalarization")
    except ImportError as error:
        raise ValueError(
            f"task_weighting {name!r} needs a library that is not installed: "
            f"pip install 'dmtg[aggregators]' ({error})"
        ) from error
    return SCALARIZERS[name](library, tasks)


def task_weighting(network: GroupingNetwork, settings: TrainSettings) -> TaskWeighting | None:
    """Return the weighting of a network's tasks at the beginning of a training; None for one of our own.

    Raises:
        ValueError: For settings that do not fit it, or as `load_scalarizer`.
    """
    name = network.spec.task_weighting
    if name not in SCALARIZERS:
        return None
    if settings.accumulate > 1:
        raise ValueError(f"task_weighting {name!r} needs the losses of a whole batch: set accumulate to 1")
    if settings.aggregator != "sum":
        raise ValueError(f"task_weighting {name!r} and an aggregator both weight the tasks: choose one")
    if name == "famo" and settings.cuda_graphs:
        raise ValueError("task_weighting 'famo' computes each batch twice: set cuda_graphs to false")
    return TaskWeighting(name, [task.weight for task in network.tasks], settings, network.gate.logits.device)


class TaskWeighting:
    """A scalarizer with its state: learned parameters, their optimiser, and losses of earlier steps and epochs.

    Learned parameters of the library ("imtl_l", "uw") have the optimiser and learning rate of the network, without
    weight decay.

    Args:
        name: A key of `SCALARIZERS`.
        weights: `Task.weight` of each task.
        settings: Settings of the training.
        device: Device of the training.

    Raises:
        ValueError: As `load_scalarizer`.
    """

    def __init__(
        self, name: str, weights: Sequence[float], settings: TrainSettings, device: torch.device | str = "cpu"
    ) -> None:
        self.name, self.device = name, torch.device(device)
        self.scalarizer = load_scalarizer(name, len(weights)).to(device)
        self.factors = torch.tensor([float(w) for w in weights], device=device)
        self.values = torch.ones(len(weights), device=device)
        own: list[nn.Parameter] = [] if name == "famo" else list(self.scalarizer.parameters())
        group = {"params": own, "weight_decay": 0.0}
        self.optimizer = new_optimizer([group], settings, fused=False) if own else None
        # averages of the last two epochs, sum of this epoch and its steps, from which "dwa" follows
        self.averages: list[Tensor] = []
        self.total, self.steps = torch.zeros_like(self.values), 0

    def weigh(self, losses: Tensor, present: Tensor, seed: int) -> Tensor:
        """Return the weight of each task in a step, `(N,)`, beside `Task.weight`.

        Args:
            losses: Gated loss of each task over all workers, `(N,)`.
            present: Whether the batch has labels of each task, `(N,)`.
            seed: Seed of the step.
        """
        self.values = self._values(losses, present)
        self.total, self.steps = self.total + self.values, self.steps + 1
        # the weights of "random" do not depend on the values; drawn on the CPU, they do not depend on the device
        held = self.values.cpu() if self.name == "random" else self.values
        with seeded(seed), torch.enable_grad():
            held = held.clone().requires_grad_()
            own = list(self.optimizer.param_groups[0]["params"]) if self.optimizer else []
            found, *gradients = torch.autograd.grad(self.scalarizer(held), [held, *own])
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        return found.to(self.device) * present

    def _values(self, losses: Tensor, present: Tensor) -> Tensor:
        return torch.where(present, losses.detach() * self.factors, self.values).clamp_min(SMALLEST)

    def update(self, again: Callable[[], Tensor], present: Tensor, rate: float) -> None:
        """Go on after the optimiser's step.

        Args:
            again: Computes the gated losses of the same batch again.
            present: As for `weigh`.
            rate: Learning rate of the network.
        """
        if self.name == "famo":
            self.scalarizer.update(self._values(again(), present))
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()

    def end_epoch(self) -> None:
        """Go on after the last step of an epoch."""
        if self.name == "dwa":
            self._with_averages([*self.averages, self.total / self.steps][-2:])
        self.total, self.steps = torch.zeros_like(self.total), 0

    def _with_averages(self, averages: list[Tensor]) -> None:
        """Give "dwa" the average losses of epochs, each as an epoch of one step."""
        self.averages = averages
        self.scalarizer.reset()
        for average in averages:
            self.scalarizer(average)
            self.scalarizer.step()

    def state(self) -> dict[str, Tensor]:
        """Return the state as tensors by name. `load_state` reads them."""
        held = {"values": self.values, "total": self.total, "steps": torch.tensor(self.steps)}
        held |= {f"average.{n}": average for n, average in enumerate(self.averages)}
        held |= {f"scalarizer.{key}": value for key, value in self.scalarizer.state_dict().items()}
        for optimizer in self._optimizers():
            for n, states in optimizer.state_dict()["state"].items():
                held |= {f"optimizer.{n}.{key}": torch.as_tensor(value) for key, value in states.items()}
        return held

    def load_state(self, held: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        here = {key: value.to(self.device) for key, value in held.items()}
        self.values, self.total, self.steps = here["values"], here["total"], int(here["steps"])
        of_library = {k.removeprefix("scalarizer."): v for k, v in here.items() if k.startswith("scalarizer.")}
        self.scalarizer.load_state_dict(of_library)
        if self.name == "dwa":
            self._with_averages([here[key] for key in sorted(here) if key.startswith("average.")])
        states: dict[int, dict[str, Tensor]] = {}
        for key in (key for key in held if key.startswith("optimizer.")):
            _, number, name = key.split(".")
            states.setdefault(int(number), {})[name] = held[key]
        if states and self.name == "famo":  # the library makes its optimiser at its first step
            (logits,) = self.scalarizer.parameters()
            options = {"lr": self.scalarizer.lr, "weight_decay": self.scalarizer.weight_decay}
            vars(self.scalarizer)[FAMO_OPTIMIZER] = torch.optim.Adam([logits], **options)
        for optimizer in self._optimizers():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states})

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        of_library = vars(self.scalarizer).get(FAMO_OPTIMIZER)
        return [optimizer for optimizer in (self.optimizer, of_library) if optimizer is not None]
