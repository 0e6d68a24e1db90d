"""`TrainState`: a network in training, its optimiser and its history, with reading and writing of checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmtg_core.network.grouping_network import GroupingNetwork, clone
from dmtg_core.training import checkpoint
from dmtg_core.training.context import TrainContext
from dmtg_core.training.objective.optimizer import build_optimizer
from dmtg_core.training.objective.scalarizers import TaskWeighting, task_weighting
from dmtg_core.training.settings import TrainSettings

WEIGHTING = "weighting.safetensors"  # state of the weighting in a checkpoint
AVERAGE = "average"  # network with averaged weights in a checkpoint


@dataclass
class TrainState:
    """A network in training: the contents of a checkpoint.

    `history` has one record for each epoch. `best` is the network after the best epoch (the lowest score), with
    the heads that it had then. `take_best` replaces the network with it. `decay` has the first and the last epoch
    of the decay of the learning rate, once it has begun; see `dmtg_core.search.extendable`. `average` is the
    network with averaged weights, if there is one; it is validated, and copied to `best`, instead of `network`.
    `partial` has the sums of an unfinished epoch. It is empty between epochs. `weighting` is the weighting of the
    tasks by a scalarizer.
    """

    network: GroupingNetwork
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = math.inf
    best: GroupingNetwork | None = None
    decay: tuple[int, int] | None = None
    average: GroupingNetwork | None = None
    partial: dict[str, Any] = field(default_factory=dict)
    weighting: TaskWeighting | None = None

    @classmethod
    def fresh(cls, network: GroupingNetwork, settings: TrainSettings) -> TrainState:
        """Return the state at the beginning of a run."""
        return cls(network, build_optimizer(network, settings), weighting=task_weighting(network, settings))

    @classmethod
    def begin(cls, network: GroupingNetwork, settings: TrainSettings, context: TrainContext) -> TrainState:
        """Return the state of `resumed`; without a checkpoint, the fresh state of `network`."""
        return cls.resumed(settings, context) or cls.fresh(network.to(context.device), settings)

    @classmethod
    def resumed(cls, settings: TrainSettings, context: TrainContext) -> TrainState | None:
        """Return the state of the context's latest checkpoint, or None if there is no checkpoint.

        Raises:
            ValueError: If the checkpoint is damaged.
        """
        latest = context.latest()
        return None if latest is None else cls.load(latest, settings, context.device)

    def save(self, folder: Path) -> None:
        """Write the state into `folder`."""
        checkpoint.save_network(folder, self.network)
        checkpoint.save_optimizer(folder / "optimizer.safetensors", self.optimizer, self.network)
        if self.best is not None:
            checkpoint.save_network(folder / "best", self.best)
        if self.average is not None:
            checkpoint.save_network(folder / AVERAGE, self.average)
        if self.weighting is not None:
            checkpoint.save_tensors(folder / WEIGHTING, self.weighting.state())
        score = self.best_score if math.isfinite(self.best_score) else None
        loop = {
            "epoch": self.epoch, "step": self.step, "best_score": score, "history": self.history,
            "decay": self.decay, "partial": self.partial,
        }  # fmt: skip
        checkpoint.write_json(folder / "loop.json", loop, indent=None)

    @classmethod
    def load(cls, folder: Path, settings: TrainSettings, device: torch.device) -> TrainState:
        """Read the state that `save` wrote.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        network = checkpoint.load_network(folder, device)
        state = cls.fresh(network, settings)
        checkpoint.load_optimizer(folder / "optimizer.safetensors", state.optimizer, network)
        loop = checkpoint.read_json(folder / "loop.json", "epoch", "step", "history", "best_score", "partial")
        state.epoch, state.step, state.history = loop["epoch"], loop["step"], loop["history"]
        state.partial = loop["partial"]
        state.decay = tuple(loop["decay"]) if loop.get("decay") else None
        state.best_score = math.inf if loop["best_score"] is None else loop["best_score"]
        if state.weighting is not None:
            state.weighting.load_state(checkpoint.load_tensors(folder / WEIGHTING))
        if (folder / AVERAGE).exists():
            state.average = checkpoint.load_network(folder / AVERAGE, device)
        if loop["best_score"] is not None:
            state.best = checkpoint.load_network(folder / "best", device)
        return state

    @property
    def validated(self) -> GroupingNetwork:
        """The network that is validated: the one with averaged weights, if there is one."""
        return self.networks[-1]

    @property
    def networks(self) -> list[GroupingNetwork]:
        """The network, and the one with averaged weights if there is one."""
        return [self.network, *([self.average] if self.average is not None else [])]

    def take_best(self) -> None:
        """Replace the network with the hard network of the best epoch. There is no average any more."""
        self.network, self.average = self.validated if self.best is None else self.best, None
        self.network.keep(self.network.gate.survivors(2.0))

    def restart_from_best(self, settings: TrainSettings) -> None:
        """Go on from the network of the best epoch, with a new optimiser. The epochs are counted on."""
        if self.best is not None:
            self.network = clone(self.best)
        if self.average is not None:
            self.average = clone(self.network)
        self.optimizer = build_optimizer(self.network, settings)

    def consider(self, score: float) -> None:
        """Copy the network if `score` is the lowest so far."""
        if score < self.best_score:
            self.best_score = score
            self.best = clone(self.validated)

    def keep(self, alive: Tensor, settings: TrainSettings) -> None:
        """Prune network and optimiser together. The moments of the kept parameters stay."""
        before = {name: self.optimizer.state.get(p, {}) for name, p in self.network.named_parameters()}
        old_names = {p: name for name, p in self.network.named_parameters()}
        followed = self.network.keep(alive)
        if self.average is not None:
            self.average.keep(alive)
        self.optimizer = build_optimizer(self.network, settings)
        for name, parameter in self.network.named_parameters():
            old, rows = followed.get(parameter, (parameter, None))
            held = before.get(old_names.get(old, name), {})
            for key, value in held.items():
                moved = value[rows].clone() if rows is not None and value.dim() else value
                self.optimizer.state[parameter][key] = moved
