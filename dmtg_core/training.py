"""Training: one evaluation, and a run over epochs that can be put down and taken up again.

All that happens is a function of the seed, the epoch and the step: data order, gate noise, temperature and
learning rate have no hidden state, so a resumed run repeats what an undisturbed one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmtg_core import checkpoint
from dmtg_core.augment import augment, augment_generator
from dmtg_core.context import LocalContext, TrainContext
from dmtg_core.data import Batch, Data
from dmtg_core.metrics import Metrics, MetricSums
from dmtg_core.network import GroupingNetwork, clone
from dmtg_core.settings import LR_SCHEDULES, TrainSettings
from dmtg_core.step import WeighedLoss, build_optimizer, step_noise, train_step

CHECK_EVERY = 100  # steps between two looks at whether one was refused


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite. The step was refused; the weights are those before it."""


@dataclass
class TrainState:
    """A network in training: all that a checkpoint holds.

    `history` has one record an epoch; `best` is the network as it was after the best epoch (the lowest score),
    heads that have gone since included; `take_best` puts it in the place of the network.
    """

    network: GroupingNetwork
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = math.inf
    best: GroupingNetwork | None = None

    @classmethod
    def fresh(cls, network: GroupingNetwork, settings: TrainSettings) -> TrainState:
        """At the beginning of a run."""
        return cls(network, build_optimizer(network, settings))

    def save(self, folder: Path) -> None:
        """Write everything into `folder`."""
        checkpoint.save_network(folder, self.network)
        checkpoint.save_optimizer(folder / "optimizer.safetensors", self.optimizer, self.network)
        if self.best is not None:
            checkpoint.save_network(folder / "best", self.best)
        score = self.best_score if math.isfinite(self.best_score) else None
        loop = {"epoch": self.epoch, "step": self.step, "best_score": score, "history": self.history}
        checkpoint.write_json(folder / "loop.json", loop)

    @classmethod
    def load(cls, folder: Path, settings: TrainSettings, device: torch.device) -> TrainState:
        """Read what `save` wrote.

        Raises:
            ValueError: When a file is missing or damaged.
        """
        network = checkpoint.load_network(folder, device)
        state = cls.fresh(network, settings)
        checkpoint.load_optimizer(folder / "optimizer.safetensors", state.optimizer, network)
        loop = checkpoint.read_json(folder / "loop.json", "epoch", "step", "history", "best_score")
        state.epoch, state.step, state.history = loop["epoch"], loop["step"], loop["history"]
        state.best_score = math.inf if loop["best_score"] is None else loop["best_score"]
        if loop["best_score"] is not None:
            state.best = checkpoint.load_network(folder / "best", device)
        return state

    def take_best(self) -> None:
        """Put the weights of the best epoch into the network."""
        if self.best is not None:
            self.network = self.best

    def consider(self, score: float) -> None:
        """Remember the weights as they are when `score` is the lowest so far."""
        if score < self.best_score:
            self.best_score = score
            self.best = clone(self.network)

    def keep(self, alive: Tensor, settings: TrainSettings) -> None:
        """Prune network and optimiser together; the moments of what stays are kept."""
        before = {name: self.optimizer.state.get(p, {}) for name, p in self.network.named_parameters()}
        old_names = {p: name for name, p in self.network.named_parameters()}
        followed = self.network.keep(alive)
        self.optimizer = build_optimizer(self.network, settings)
        for name, parameter in self.network.named_parameters():
            old, rows = followed.get(parameter, (parameter, None))
            held = before.get(old_names.get(old, name), {})
            for key, value in held.items():
                moved = value[rows].clone() if rows is not None and value.dim() else value
                self.optimizer.state[parameter][key] = moved


@torch.no_grad()
def evaluate(
    network: nn.Module, data: Data, split: str, *, batch_size: int = 256, context: TrainContext | None = None
) -> Metrics:
    """Metrics of the hard network on a split, over all workers: task → metric → value.

    Args:
        network: A `GroupingNetwork` or `GroupModel`.
    """
    context = context or LocalContext()
    was_training = network.training
    network.eval()
    sums = MetricSums(cast("Any", network).tasks)
    for batch in data.evaluate(split, batch_size):
        sums.update(network(batch.inputs), batch.targets)
    sums.reduce(context.sum)
    network.train(was_training)
    return sums.compute()


def score_of(metrics: Metrics) -> float:
    """One number for a validation: the mean logarithm of the tasks' losses, lower is better.

    It is the geometric mean of the losses, so that a task measured in large units weighs no more than another.
    """
    losses = [found["loss"] for found in metrics.values()]
    if not all(math.isfinite(loss) for loss in losses):
        return math.inf
    return sum(math.log(max(loss, 1e-12)) for loss in losses) / len(losses)


def advance(
    state: TrainState,
    data: Data,
    settings: TrainSettings,
    context: TrainContext,
    *,
    until: int,
    on_epoch: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Train until epoch number `until` is reached.

    Before each epoch heads that fell under the threshold go, and with the end of the search all but each task's
    likeliest; after each epoch the hard network is validated and `on_epoch` is called with the state to save.

    Raises:
        NonFiniteLossError: When a step had to be refused.
    """
    state.network.to(context.device)
    module: nn.Module | None = None
    while state.epoch < until:
        if _prune(state, settings) or module is None:
            loss = WeighedLoss(state.network, settings.entropy_weight, settings.precision)
            module = context.prepare(loss)
        record = _train_epoch(state, module, data, settings, context)
        _average_statistics(state.network, context)
        metrics = evaluate(state.network, data, "val", batch_size=settings.batch_size, context=context)
        state.epoch += 1
        score = score_of(metrics)
        if state.epoch > settings.search_epochs or settings.search_epochs == settings.epochs:
            state.consider(score)
        record |= {
            "epoch": state.epoch,
            "phase": "search" if state.epoch <= settings.search_epochs else "finetune",
            "val_score": score,
            "val": metrics,
            "probabilities": state.network.gate.probabilities().tolist(),
            "heads": len(state.network.pairs),
        }
        state.history.append(record)
        if on_epoch is not None:
            on_epoch(state)
    return state


def _prune(state: TrainState, settings: TrainSettings) -> bool:
    """Remove the heads that have to go before the next epoch; whether any did."""
    hard = state.epoch >= settings.search_epochs
    survivors = state.network.gate.survivors(2.0 if hard else settings.prune_threshold)
    if state.epoch == 0 or bool((survivors == state.network.gate.alive).all()):
        return False
    state.keep(survivors, settings)
    return True


def _train_epoch(
    state: TrainState, module: nn.Module, data: Data, settings: TrainSettings, context: TrainContext
) -> dict[str, Any]:
    started = time.perf_counter()
    losses_before = [sum(record["train_loss"].values()) for record in state.history]
    factor = LR_SCHEDULES[settings.lr_schedule](state.epoch, settings, losses_before)
    for group in state.optimizer.param_groups:
        group["lr"] = max(group["base_lr"] * factor, min(settings.lr_min, group["base_lr"]))
    steps = data.steps(settings.batch_size)
    searched = settings.search_epochs * steps
    module.train()
    totals = torch.zeros(len(state.network.tasks), device=context.device)
    refused = torch.zeros((), device=context.device)
    samples, temperature = 0, settings.temperature(state.step / searched)
    batches = _Timed(data.train(state.epoch, settings.batch_size))
    for stored in batches:
        generator = augment_generator(settings.seed, state.step, context.rank)
        batch = augment(stored, state.network.tasks, settings.augment, generator)
        temperature = settings.temperature(state.step / searched)
        noise = step_noise(state.network, settings, state.step, context.rank, len(batch.inputs))
        noise = noise.to(context.device, non_blocking=True)
        by_task, bad = train_step(module, state.optimizer, batch, noise, temperature, settings, context)
        totals, refused = totals + by_task, refused + bad
        samples += len(batch.inputs)
        state.step += 1
        if state.step % CHECK_EVERY == 0 and float(refused):
            break
    losses = (context.sum(totals) / steps).tolist()  # the epoch's one look at the device
    if float(refused):
        raise _non_finite(state, losses, int(refused))
    seconds = time.perf_counter() - started
    return {
        "train_loss": dict(zip((t.name for t in state.network.tasks), losses, strict=True)),
        "temperature": temperature,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": seconds,
        "samples_per_second": samples * context.world_size / seconds,
        "data_share": batches.waited / seconds,
    }


class _Timed:
    """Batches, and how long they were waited for, in seconds."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.waited = 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            asked = time.perf_counter()
            batch = next(self.batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch


def _non_finite(state: TrainState, losses: list[float], refused: int) -> NonFiniteLossError:
    names = [task.name for task, loss in zip(state.network.tasks, losses, strict=True) if not math.isfinite(loss)]
    culprits = ", ".join(names) if names else "a gradient, while all losses were finite"
    return NonFiniteLossError(
        f"the loss became NaN or infinite in epoch {state.epoch + 1} ({culprits}); {refused} steps were refused "
        "and the weights are those of the last good step: lower train.learning_rate, or set train.clip_norm=1"
    )


def _average_statistics(network: nn.Module, context: TrainContext) -> None:
    """Give all workers the mean of their running statistics, in one message."""
    if context.world_size == 1:
        return
    buffers = [b for b in network.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = context.sum(torch.cat([b.flatten() for b in buffers])) / context.world_size
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.reshape(buffer.shape))


def fit(
    network: GroupingNetwork, data: Data, settings: TrainSettings, context: TrainContext | None = None
) -> TrainState:
    """Train one network from its first epoch to its last: search, prune, fine-tune, best epoch kept.

    Goes on from the context's latest checkpoint when there is one. The network is trained in place unless a
    checkpoint replaces it: use the one of the returned state.

    Raises:
        NonFiniteLossError: When the loss stops being finite.
    """
    context = context or LocalContext()
    latest = context.latest()
    network.to(context.device)
    state = TrainState.load(latest, settings, context.device) if latest else TrainState.fresh(network, settings)
    advance(
        state, data, settings, context, until=settings.epochs,
        on_epoch=lambda s: context.report(s.history[-1], s.save),
    )  # fmt: skip
    _finish(state)
    return state


def _finish(state: TrainState) -> None:
    state.take_best()
    state.network.keep(state.network.gate.survivors(2.0))
    state.network.eval()
