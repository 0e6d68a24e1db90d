"""Training: one step, one evaluation, and a run over epochs that can be put down and taken up again.

All that happens is a function of the seed, the epoch and the step: data order, gate noise, temperature and
learning rate have no hidden state, so a resumed run repeats what an undisturbed one does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmtg_core import checkpoint
from dmtg_core.context import LocalContext, TrainContext
from dmtg_core.data import Batch, Data
from dmtg_core.losses import PairLosses, label_counts
from dmtg_core.metrics import Metrics, MetricSums
from dmtg_core.network import GroupingNetwork, clone
from dmtg_core.schedules import TemperatureSchedule

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
# (epoch, epochs, every) → factor of the learning rate. "halving" is the paper's on CelebA.
LR_SCHEDULES: Mapping[str, Callable[[int, int, int], float]] = {
    "constant": lambda _epoch, _epochs, _every: 1.0,
    "cosine": lambda epoch, epochs, _every: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
    "halving": lambda epoch, _epochs, every: 0.5 ** (epoch // every),
}
PRECISIONS = ("fp32", "bf16")
CHECK_EVERY = 100  # steps between two looks at whether one was refused


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient became NaN or infinite. The step was refused; the weights are those before it."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Args:
        epochs: Passes over the training data, search and fine-tuning together.
        search_share: Share of the epochs in which the gate learns; then every task keeps its likeliest head and
            the rest fine-tunes the hard groups. 1 keeps learning to the end, as the published code does.
        batch_size: Samples of a global batch, over all workers.
        optimizer: A key of `OPTIMIZERS`.
        learning_rate: Of stem, branches and heads, whatever the number of workers.
        gate_learning_rate: Of θ; None takes `learning_rate`.
        weight_decay: Of everything but θ.
        lr_schedule, lr_every: A key of `LR_SCHEDULES` and its interval in epochs.
        clip_norm: Largest norm of the gradient; 0 for no limit.
        temperature: τ over the search.
        entropy_weight: Factor of the gate's mean entropy in the loss; positive pushes to a decision.
        prune_threshold: A head whose probability falls under it goes at the next epoch; 0 prunes at the end of
            the search only.
        precision: "fp32", or "bf16" for autocast of the encoders with gate and losses in float32.
        seed: Of data order, gate noise and anything else that is drawn.

    Raises:
        ValueError: For an unknown option or a number out of range.
    """

    epochs: int = 20
    search_share: float = 0.5
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    gate_learning_rate: float | None = None
    weight_decay: float = 0.0
    lr_schedule: str = "cosine"
    lr_every: int = 15
    clip_norm: float = 0.0
    temperature: TemperatureSchedule = field(default_factory=TemperatureSchedule)
    entropy_weight: float = 0.0
    prune_threshold: float = 0.02
    precision: str = "fp32"
    seed: int = 22

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("lr_schedule", self.lr_schedule, LR_SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")
        for name in ("epochs", "batch_size", "lr_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.clip_norm < 0:
            raise ValueError(f"clip_norm must not be negative, got {self.clip_norm}")
        if not 0 < self.search_share <= 1:
            raise ValueError(f"search_share must be in (0, 1], got {self.search_share}")
        if not 0 <= self.prune_threshold < 1:
            raise ValueError(f"prune_threshold must be in [0, 1), got {self.prune_threshold}")

    @property
    def search_epochs(self) -> int:
        """Epochs in which the gate learns, at least one."""
        return max(round(self.epochs * self.search_share), 1)


class WeighedLoss(nn.Module):
    """The loss of a step: `Σ_n Σ_k g[n, k] · L_n(head_{k,n}(branch_k(stem(x))))` (Gao et al. 2024, section 3).

    This is the module that data-parallel training wraps. Make it anew after pruning.
    """

    task_of: Tensor
    branch_of: Tensor
    task_weights: Tensor

    def __init__(self, network: GroupingNetwork, entropy_weight: float = 0.0, precision: str = "fp32") -> None:
        super().__init__()
        self.network = network
        self.entropy_weight = entropy_weight
        self.precision = precision
        pairs = network.pairs
        self.pair_losses = PairLosses(network.tasks, pairs)
        self.register_buffer("branch_of", torch.tensor([k for k, _ in pairs]), persistent=False)
        self.register_buffer("task_of", torch.tensor([n for _, n in pairs]), persistent=False)
        self.register_buffer(
            "task_weights", torch.tensor([float(t.weight) for t in network.tasks]), persistent=False
        )

    def forward(self, batch: Batch, temperature: float, noise: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of a batch.

        Args:
            batch: Input and targets.
            temperature, noise: See `GroupGate.forward`.
            counts: Labels of each task to divide by, `(N,)`.

        Returns:
            The loss to differentiate, and each task's gated loss, detached, `(N,)`.
        """
        with _autocast(self.precision, batch.inputs.device):
            outputs = self.network.forward_pairs(batch.inputs)
        losses = self.pair_losses(outputs, batch.targets) / counts[self.task_of].unsqueeze(1)  # (P, B)
        gate = self.network.gate(temperature, noise)[..., self.task_of, self.branch_of]  # (P,) or (B, P)
        weighed = (losses * (gate.T if gate.dim() == 2 else gate.unsqueeze(1))).sum(1)  # (P,)
        by_task = torch.zeros_like(self.task_weights).index_add(0, self.task_of, weighed)  # (N,)
        loss = by_task @ self.task_weights
        if self.entropy_weight:
            loss = loss + self.entropy_weight * self.network.gate.entropy().mean()
        return loss, by_task.detach()


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


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


def build_optimizer(network: GroupingNetwork, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimiser of a network: θ has its own learning rate and no weight decay.

    Fused optimisers are the ones that can refuse a step on the device, without the host looking at a number.
    """
    weights = [p for name, p in network.named_parameters() if name != "gate.logits"]
    gate_lr = settings.learning_rate if settings.gate_learning_rate is None else settings.gate_learning_rate
    groups = [
        {"params": weights, "lr": settings.learning_rate, "base_lr": settings.learning_rate},
        {"params": [network.gate.logits], "lr": gate_lr, "base_lr": gate_lr, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "sgd":
        options["momentum"] = 0.9
    optimizer = OPTIMIZERS[settings.optimizer](groups, **options)
    if settings.optimizer == "sgd":
        for parameter in [*weights, network.gate.logits]:
            # left to a first step that is refused, it would start from memory that nobody wrote
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    cast("Any", optimizer).grad_scale = None
    return optimizer


def step_noise(network: GroupingNetwork, settings: TrainSettings, step: int, rank: int, samples: int) -> Tensor:
    """Gate noise as a function of seed and step: equal on all workers, and on any device.

    Noise for every sample depends on the worker as well.
    """
    per_sample = network.gate.sampling == "gumbel_per_sample"
    seed = (settings.seed * 1_000_003 + step) * 4099 + (rank + 1 if per_sample else 0)
    generator = torch.Generator().manual_seed(seed % 2**63)
    return network.gate.noise(generator, samples if per_sample else 0)


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    noise: Tensor,
    temperature: float,
    settings: TrainSettings,
    context: TrainContext,
) -> tuple[Tensor, Tensor]:
    """One update, without the host ever waiting for the device.

    Args:
        module: A `WeighedLoss`, as `context.prepare` gave it back.

    Returns:
        This worker's share of each task's loss `(N,)`, and 1 where the step was refused because loss or
        gradient were not finite, else 0.
    """
    loss_module = cast("WeighedLoss", getattr(module, "module", module))
    statistics = list(loss_module.network.buffers())  # a forward pass moves those of its normalisation layers
    before = [buffer.clone() for buffer in statistics]
    counts = context.sum(label_counts(loss_module.network.tasks, batch.targets)).clamp_min(1)
    # data-parallel training averages gradients over workers, and what is wanted is their sum
    loss, by_task = module(batch, temperature, noise, counts / context.world_size)
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in loss_module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if settings.clip_norm:
        torch.nn.utils.clip_grads_with_norm_(list(loss_module.parameters()), settings.clip_norm, norm)
    refused = context.sum((~torch.isfinite(loss.detach() + norm)).float()).clamp_max(1)
    cast("Any", optimizer).found_inf = refused
    optimizer.step()
    for buffer, old in zip(statistics, before, strict=True):
        buffer.copy_(torch.where(refused.bool(), old, buffer))
    return by_task / context.world_size, refused


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
    factor = LR_SCHEDULES[settings.lr_schedule](state.epoch, settings.epochs, settings.lr_every)
    for group in state.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    steps = data.steps(settings.batch_size)
    searched = settings.search_epochs * steps
    module.train()
    totals = torch.zeros(len(state.network.tasks), device=context.device)
    refused = torch.zeros((), device=context.device)
    samples, temperature = 0, settings.temperature(state.step / searched)
    for batch in data.train(state.epoch, settings.batch_size):
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
        "learning_rate": settings.learning_rate * factor,
        "seconds": seconds,
        "samples_per_second": samples * context.world_size / seconds,
    }


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
