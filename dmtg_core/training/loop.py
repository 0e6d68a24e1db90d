"""The training loop: evaluation, and a run over epochs that can be interrupted and resumed.

Data order, gate noise, temperature and learning rate depend only on the seed, the epoch and the step. There is no
hidden state. A resumed run is therefore bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.network.threads import threads_of_step
from dmtg_core.tasks import Task
from dmtg_core.training.augment import augment, augment_generator, seeded_dropout
from dmtg_core.training.context import LocalContext, Save, TrainContext
from dmtg_core.training.data import ArrayData, Batch, Data
from dmtg_core.training.diagnostics import gate_figures, gradient_cosines, warnings
from dmtg_core.training.metrics import Metrics, MetricSums, error_of, error_scale
from dmtg_core.training.objective.averaging import average_statistics, averaging
from dmtg_core.training.settings import LR_SCHEDULES, TrainSettings, has_stopped, is_compiled, resolve
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import StepFigures, WeighedLoss, prepare_network, step_noise, train_step

EVALUATED = 256  # rows of features that are evaluated at a time
CHECK_EVERY = 100  # steps between two checks for a refused step
SMOOTH = 0.01  # added to losses and errors in the validation score, so that a task without errors does not decide


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient is NaN or infinite. The step was refused: the weights are those before it."""


def rows_evaluated(spec: NetworkSpec, settings: TrainSettings, *, compiled: bool = False) -> int:
    """Return how many samples are evaluated at a time: those of a training batch, for rows of features more.

    The metrics are computed for one task after the other, which takes longer than the network does on few rows.
    For images and texts a larger batch needs more memory and is not faster. A compiled network would be compiled
    again for another size.
    """
    more = spec.input.kind == "features" and not compiled
    return max(settings.batch_size, EVALUATED) if more else settings.batch_size


@torch.no_grad()
def evaluate(
    network: nn.Module, data: Data, split: str, *, batch_size: int = EVALUATED, context: TrainContext | None = None
) -> Metrics:
    """Compute the metrics of the hard network on a split, over all workers: task → metric → value.

    Args:
        network: A `GroupingNetwork` or `GroupModel`.
        batch_size: Samples of a worker that are computed at a time. The metrics do not depend on it.
    """
    context = context or LocalContext()
    was_training = network.training
    network.eval()
    sums = MetricSums(cast("Any", network).tasks)
    for batch in data.evaluate(split, batch_size):
        sums.update(network(batch.inputs), batch.targets)
    sums.reduce(context)
    network.train(was_training)
    return sums.compute()


def evaluate_splits(
    network: GroupingNetwork, data: Data, splits: Sequence[str], settings: TrainSettings, context: TrainContext
) -> dict[str, Metrics]:
    """Compute the metrics of a network that is not compiled on several splits, `rows_evaluated` at a time."""
    rows = rows_evaluated(network.spec, settings)
    return {split: evaluate(network, data, split, batch_size=rows, context=context) for split in splits}


def score_of(tasks: Sequence[Task], metrics: Metrics) -> float:
    """Compute the validation score: the mean over tasks of the logarithms of loss and error, each plus `SMOOTH`.

    Lower is better.

    The error is that of the headline metric, by which networks are compared in the end. Its best epoch often
    differs from that of the loss. The loss makes the score smooth, because a metric such as the accuracy changes
    in steps. For classes and flags it is the cross-entropy without options, whatever the loss of the training:
    weights of classes or a focal loss do not change the scale of the score. A metric that is not defined, such as
    the AUROC of one class, is left out. Logarithms give each task the same weight, whatever its unit. Below
    `SMOOTH` differences do not count: the loss of a task without errors can still fall by orders of magnitude, and
    would outweigh all other tasks.

    Args:
        tasks: The tasks.
        metrics: Metrics of all tasks.
    """
    terms = []
    for task in tasks:
        found = metrics[task.name]
        error = error_of(task.metric, found.get(task.metric, math.nan)) / error_scale(task)
        loss = found.get("log_loss", found["loss"])
        known = [_log(loss + SMOOTH)] + ([_log(max(error, 0.0) + SMOOTH)] if math.isfinite(error) else [])
        terms.append(sum(known) / len(known))
    return sum(terms) / len(terms)


def generalisation_gap(record: Mapping[str, Any]) -> float:
    """Compute the mean logarithm of the ratio of validation to training loss in an epoch.

    Args:
        record: Record of the epoch, of `TrainState.history`.
    """
    before = {name: _log(loss) for name, loss in record["train_loss"].items()}
    return sum(_log(record["val"][name]["loss"]) - train for name, train in before.items()) / len(before)


def _log(loss: float) -> float:
    return math.log(max(loss, 1e-12)) if math.isfinite(loss) else math.inf


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the training loop.

    Args:
        on_epoch: Called after each epoch with the state to save.
        on_step: Called within an epoch, every `TrainSettings.checkpoint_every` steps and when the context has a
            checkpoint due, with the state to save. If it is None, there is no checkpoint within an epoch.
        should_stop: Stop criterion, called before each epoch.
        prepare: Applied to each training batch before augmentation.
        proposed: See `warnings`.
    """

    on_epoch: Callable[[TrainState], None] = lambda _state: None
    on_step: Callable[[TrainState], None] | None = None
    should_stop: Callable[[TrainState], bool] = lambda _state: False
    prepare: Callable[[Batch], Batch] = lambda batch: batch
    proposed: bool = False


NO_HOOKS = Hooks()


def reporting(context: TrainContext, also: Save = lambda _folder: None) -> Hooks:
    """Return the hooks that report metrics and checkpoints of a single training to its context.

    Args:
        context: The context.
        also: Writes further files into each checkpoint.
    """

    def save(state: TrainState, folder: Path) -> None:
        state.save(folder)
        also(folder)

    return Hooks(
        on_epoch=lambda state: context.report(state.history[-1], partial(save, state)),
        on_step=lambda state: context.report(None, partial(save, state)),
    )


def advance(
    state: TrainState,
    data: Data,
    settings: TrainSettings,
    context: TrainContext,
    *,
    until: int,
    hooks: Hooks = NO_HOOKS,
) -> TrainState:
    """Train from the current epoch of a state until epoch `until`.

    Before each epoch the heads with a probability below the threshold are pruned. At the end of the search all
    heads but the likeliest of each task are pruned. After each epoch the hard network is validated, with averaged
    weights if the state has an average. What `resolve` chose is in the record of the epoch. With
    `TrainSettings.patience` training can end before `until`, and it does not go on then.

    Raises:
        NonFiniteLossError: If a step was refused.
        ValueError: As `prepare_network` and `WeighedLoss`.
    """
    for network in state.networks:
        network.to(context.device)
    settings = resolve(settings, state.network, context.device, context.world_size)
    with threads_of_step(state.network, settings.batch_size // context.world_size):
        return _advance(state, data, settings, context, until, hooks)


def _advance(
    state: TrainState, data: Data, settings: TrainSettings, context: TrainContext, until: int, hooks: Hooks
) -> TrainState:
    module: nn.Module | None = None
    while state.epoch < until and not has_stopped(state.history, settings) and not hooks.should_stop(state):
        if _prune(state, settings) or module is None:
            prepare_network(state.network, settings, context)
            options = (settings.entropy_weight, settings.precision, settings.aggregator, state.weighting)
            loss = WeighedLoss(state.network, *options)
            module = context.prepare(loss)
        with seeded_dropout(state.network, settings.seed, context.rank, context.device) as seed_step:
            record = _train_epoch(state, module, data, settings, context, hooks, seed_step)
        state.partial = {}
        average_statistics(state.networks, context)
        rows = rows_evaluated(state.network.spec, settings, compiled=is_compiled(settings, context.device))
        metrics = evaluate(state.validated, data, "val", batch_size=rows, context=context)
        state.epoch += 1
        record |= {
            "epoch": state.epoch,
            "phase": "search" if state.epoch <= settings.search_epochs else "finetune",
            "val_score": score_of(state.network.tasks, metrics),
            "val": metrics,
            "probabilities": state.network.gate.probabilities().tolist(),
            "heads": len(state.network.pairs),
            "groups": len(set(state.network.gate.assignment())),
            "precision": settings.precision,
            "cuda_graphs": settings.cuda_graphs,
            "batch_branches": state.network.batched is not None,
        }
        state.consider(record["val_score"])
        state.history.append(record)
        names = [task.name for task in state.network.tasks]
        record["warnings"] = warnings(state.history, names, settings, proposed=hooks.proposed)
        hooks.on_epoch(state)
    return state


def _prune(state: TrainState, settings: TrainSettings) -> bool:
    """Prune heads before the next epoch. Return whether any head was pruned."""
    hard = state.epoch >= settings.search_epochs
    survivors = state.network.gate.survivors(2.0 if hard else settings.prune_threshold)
    # a resumed epoch keeps the heads that it started with
    if state.epoch == 0 or state.partial or bool((survivors == state.network.gate.alive).all()):
        return False
    state.keep(survivors, settings)
    return True


def _train_epoch(
    state: TrainState,
    module: nn.Module,
    data: Data,
    settings: TrainSettings,
    context: TrainContext,
    hooks: Hooks,
    seed_step: Callable[[int], object],
) -> dict[str, Any]:
    factor = LR_SCHEDULES[settings.lr_schedule](state.epoch, settings, [_total(r) for r in state.history])
    for group in state.optimizer.param_groups:
        group["lr"] = max(group["base_lr"] * factor, min(settings.lr_min, group["base_lr"]))
    steps = data.steps(settings.batch_size)
    first, last = state.epoch * steps, (state.epoch + 1) * steps
    searched = settings.search_epochs * steps
    sums = _Sums.of(state, context)
    temperature = settings.temperature(state.step / searched)
    average = averaging(state.average, state.network, settings.average * steps)
    module.train()
    batch: Batch | None = None
    for stored in sums.timed(data.train(state.epoch, settings.batch_size, state.step - first)):
        generator = augment_generator(settings.seed, state.step, context.rank)
        batch = augment(hooks.prepare(stored), state.network.tasks, settings.augment, generator)
        temperature = settings.temperature(state.step / searched)
        noise = step_noise(state.network, settings, state.step, context.rank, len(batch.inputs))
        noise = noise.to(context.device, non_blocking=True)
        seed_step(state.step)
        figures = train_step(
            module, state.optimizer, batch, noise, temperature, settings, context, step=state.step
        )
        sums.add(figures, len(batch.inputs))
        state.step += 1
        average(state.step)
        saves = hooks.on_step is not None and state.step < last
        due = saves and context.checkpoint_due()
        due = due or (bool(settings.checkpoint_every) and state.step % settings.checkpoint_every == 0)
        if (due or state.step % CHECK_EVERY == 0) and float(sums.figures.refused):
            break
        if due and hooks.on_step is not None and state.step < last:
            average_statistics(state.networks, context)  # otherwise the checkpoint has those of one worker
            state.partial = sums.share(context)
            hooks.on_step(state)
    assert batch is not None, "a resumed epoch has a step left"
    if state.weighting is not None:
        state.weighting.end_epoch()
    total = sums.total(context)  # the only synchronisation with the device in an epoch
    losses = (total.by_task / steps).tolist()
    if float(total.refused):
        raise _non_finite(state, losses, round(float(total.refused)))
    seconds = sums.seconds()
    by_pair = (total.by_pair / steps).tolist()
    return {
        "train_loss": dict(zip((t.name for t in state.network.tasks), losses, strict=True)),
        "gate": gate_figures(state.network, by_pair, float(total.gate_gradient) / steps),
        "cosines": gradient_cosines(state.network, batch, context),
        "temperature": temperature,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": seconds,
        "samples_per_second": sums.samples * context.world_size / seconds,
        "data_share": sums.waited / seconds,
    }


def _total(record: Mapping[str, Any]) -> float:
    """Total training loss of an epoch."""
    return float(sum(record["train_loss"].values()))


@dataclass
class _Sums:
    """Sums of an epoch on this worker, including those from before an interruption."""

    figures: StepFigures
    samples: float = 0.0
    waited: float = 0.0
    before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, state: TrainState, context: TrainContext) -> _Sums:
        """Start from zero, or from the sums of the checkpoint."""
        tasks, pairs = len(state.network.tasks), len(state.network.pairs)
        held = state.partial or {"by_task": [0.0] * tasks, "by_pair": [0.0] * pairs, "gate_gradient": 0.0}
        values = {
            key: torch.tensor(held[key], device=context.device) for key in ("by_task", "by_pair", "gate_gradient")
        }
        if context.rank:  # the figures are summed over all workers later
            values = {key: torch.zeros_like(value) for key, value in values.items()}
        figures = StepFigures(**values, refused=torch.zeros((), device=context.device))
        if not state.partial:
            return cls(figures)
        return cls(figures, held["samples"] / context.world_size, held["waited"], held["seconds"])

    def add(self, figures: StepFigures, samples: int) -> None:
        """Add a step."""
        self.figures += figures
        self.samples += samples

    def total(self, context: TrainContext) -> StepFigures:
        """Sum the figures over all workers, in one message. Rank 0 continues with the sum, others with zero."""
        held = self.figures
        parts = (held.by_task, held.by_pair, held.gate_gradient.reshape(1), held.refused.reshape(1))
        flat = context.sum(torch.cat(parts)).split([len(part) for part in parts])
        total = StepFigures(flat[0], flat[1], flat[2].squeeze(0), flat[3].squeeze(0))
        self.figures = (
            total if context.rank == 0 else StepFigures(*(torch.zeros_like(part) for part in vars(total).values()))
        )
        return total

    def seconds(self) -> float:
        """Return the duration of the epoch so far."""
        return self.before + time.perf_counter() - self.started

    def share(self, context: TrainContext) -> dict[str, Any]:
        """Return the sums of an unfinished epoch for a checkpoint."""
        total = self.total(context)
        values = {key: getattr(total, key).tolist() for key in ("by_task", "by_pair", "gate_gradient")}
        samples = self.samples * context.world_size
        return values | {"samples": samples, "waited": self.waited, "seconds": self.seconds()}

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Iterate over batches and sum the time spent waiting for them."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
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


def fit(
    network: GroupingNetwork, data: Data, settings: TrainSettings, context: TrainContext | None = None
) -> TrainState:
    """Train a network for its epochs: search, prune, fine-tune. The weights of the best epoch are kept.

    Training resumes from the context's latest checkpoint if there is one. The network is trained in place unless a
    checkpoint replaces it: use the network of the returned state.

    Raises:
        NonFiniteLossError: If the loss is not finite.
        ValueError: As `ArrayData.check`.
    """
    if isinstance(data, ArrayData):
        data.check(network.spec.input, network.tasks)
    context = context or LocalContext()
    state = TrainState.begin(network, settings, context)
    advance(state, data, settings, context, until=settings.epochs, hooks=reporting(context))
    state.take_best()
    state.network.eval()
    return state
