"""Settings of a training, with schedules of the learning rate and of the temperature.

Precision and CUDA graphs can be left to the device. `resolve` is the only place of this choice. It depends on the
device, the network and the settings, and on no timing, so that a run repeats it. Settings keep "auto": the digest
of a configuration does not depend on the machine. The record of each epoch has what was chosen.
`dmtg_core.training.step.batch_branches` chooses whether branches are computed in one pass.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dmtg_core.addresses import checked_name
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.training.aggregation import AGGREGATORS
from dmtg_core.training.augment import AUGMENTATIONS


def _eager(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimizer class that does not import the compiler, which takes as long as the import of torch.

    torch excludes these methods from compilation, and imports the compiler at their first call. Optimizers are not
    compiled here. `step` is without gradients, as torch's is if `differentiable` is not set.
    """
    names = ("add_param_group", "load_state_dict", "zero_grad")
    held = {name: inspect.unwrap(getattr(optimizer, name)) for name in names}
    return type(
        optimizer.__name__, (optimizer,), {**held, "step": torch.no_grad()(inspect.unwrap(optimizer.step))}
    )


OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "adam": _eager(torch.optim.Adam),
    "adamw": _eager(torch.optim.AdamW),
    "sgd": _eager(torch.optim.SGD),
}
PLATEAU_DROP = 0.1  # relative decrease of the training loss that counts as progress, as in the published code


def _plateau(losses: Sequence[float], patience: int) -> float:
    """Halve the factor after more than `patience` epochs without progress of the loss."""
    factor, best, waited = 1.0, math.inf, 0
    for loss in losses:
        waited += 1
        if loss < best * (1 - PLATEAU_DROP):
            best, waited = loss, 0
        if waited > patience:
            factor, waited = factor / 2, 0
    return factor


def _cosine(epoch: int, hold: int, epochs: int) -> float:
    """Hold the factor at 1, then decrease it. After a hold, the first epoch of the decay is below 1 too."""
    if epoch < hold:
        return 1.0
    passed = (epoch - hold + 1) / (epochs - hold + 1) if hold else epoch / epochs
    return 0.5 * (1 + math.cos(math.pi * passed))


# (epoch, settings, training losses of the epochs before) → factor of the learning rate. All arguments are in a
# checkpoint, so that a resumed run has the same learning rates. The paper uses "halving" on CelebA and "plateau"
# on Taskonomy.
LR_SCHEDULES: Mapping[str, Callable[[int, TrainSettings, Sequence[float]], float]] = {
    "constant": lambda _epoch, _settings, _losses: 1.0,
    "cosine": lambda epoch, settings, _losses: _cosine(epoch, settings.lr_hold, settings.epochs),
    "halving": lambda epoch, settings, _losses: 0.5 ** (epoch // settings.lr_every),
    "plateau": lambda _epoch, settings, losses: _plateau(losses, settings.lr_patience),
}
PRECISIONS = ("auto", "fp32", "bf16")
BATCHING = ("auto", "on", "off")

# Parameters of stem and one branch from which bfloat16 is chosen. Small products do not pay for the conversions of
# autocast.
LARGE = 1_000_000
BF16_OF_CPU = ("avx512_bf16", "amx_bf16")  # names of `torch.cpu.get_capabilities`

# name → (start, end, progress in [0, 1]) → temperature
FAMILIES: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda start, _end, _t: start,
    "linear": lambda start, end, t: start + (end - start) * t,
    "cosine": lambda start, end, t: end + (start - end) * 0.5 * (1 + math.cos(math.pi * t)),
    "exponential": lambda start, end, t: start * (end / start) ** t,
}


@dataclass(frozen=True)
class TemperatureSchedule:
    """Temperature τ of the gate over a run, as a function of progress alone.

    Args:
        family: A key of `FAMILIES`.
        start: τ at the beginning. The paper uses a constant 2.5 on CelebA and 4 on Taskonomy.
        end: τ at the end. "constant" does not use it.
        warmup: Share of the run, in [0, 1), in which τ is `start`.

    Raises:
        ValueError: For an unknown family, a temperature that is not positive, or a warm-up outside [0, 1).
    """

    family: str = "constant"
    start: float = 2.5
    end: float = 0.5
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(
                f"unknown temperature schedule {self.family!r}, expected one of {', '.join(FAMILIES)}"
            )
        if not (0 < self.start < math.inf and 0 < self.end < math.inf):
            raise ValueError(f"temperatures must be positive, got start={self.start}, end={self.end}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the run in [0, 1), got {self.warmup}")

    def __call__(self, progress: float) -> float:
        """Compute τ at `progress`, the completed share of the run. It is clamped to [0, 1]."""
        t = (min(max(progress, 0.0), 1.0) - self.warmup) / (1 - self.warmup)
        return FAMILIES[self.family](self.start, self.end, max(t, 0.0))


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training.

    Args:
        epochs: Number of epochs, search and fine-tuning together.
        search_share: Share of the epochs in which the gate is trained. Then each task keeps its likeliest head,
            and the hard groups are fine-tuned in the remaining epochs. With 1 the gate is trained to the end, as
            in the published code.
        batch_size: Samples of a global batch, over all workers.
        optimizer: A key of `OPTIMIZERS`.
        learning_rate: Learning rate of stem, branches and heads. It does not depend on the number of workers.
        gate_learning_rate: Learning rate of θ. None means `learning_rate`.
        weight_decay: Weight decay of all parameters except θ.
        lr_schedule: A key of `LR_SCHEDULES`.
        lr_hold: Epochs with the initial learning rate before the decay ("cosine").
        average: Epochs over which `dmtg_core.search.extendable` averages the weights; 0 for no average.
        lr_every: Epochs between two halvings ("halving").
        lr_patience: Epochs without progress before a halving ("plateau").
        lr_min: Lower limit of the learning rate.
        clip_norm: Largest norm of the gradient; 0 for no limit.
        temperature: τ over the search.
        entropy_weight: Factor of the gate's mean entropy in the loss. A positive factor makes the gate converge.
        prune_threshold: A head with a smaller probability is pruned before the next epoch. With 0, heads are
            pruned only at the end of the search.
        aggregator: "sum", or a name of `load_aggregator`, which combines the gradients of a group's tasks as soon
            as each task has a single head. The host reads its weights.
        accumulate: Number of parts of a batch that are computed one after the other to save memory. The gradient
            is that of the whole batch. Batch normalisation uses the parts.
        recompute: Compute activations again in the backward pass instead of storing them: less memory, more time.
        compile: Compile the network with `torch.compile`. None compiles on a GPU. The first steps wait for it.
        cuda_graphs: Replay the compiled parts as CUDA graphs. The host does not launch single kernels, which is
            the bottleneck of steps with small batches. It needs more memory. It excludes `accumulate` and
            `recompute`. Without a GPU it has no effect. None chooses by `resolve`.
        sync_batchnorm: Normalise over the batches of all workers, so that results do not depend on their number.
            Each layer waits for all workers. It excludes `accumulate`.
        precision: "fp32", or "bf16" for autocast of the encoders with gate and losses in float32. "auto" chooses
            by `resolve`.
        batch_branches: "on" computes all branches in one pass, "off" one after the other. "auto" chooses by
            `dmtg_core.training.step.batch_branches`.
        augment: Keys of `AUGMENTATIONS`, applied to training batches and never in an evaluation.
        patience: Epochs without a better validation score after which a training ends. 0 trains all epochs.
        checkpoint_every: Steps between two checkpoints within an epoch; 0 for checkpoints only at the end.
        seed: Seed of data order, gate noise and all other random numbers.

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
    lr_hold: int = 0
    average: float = 1.0
    lr_every: int = 15
    lr_patience: int = 3
    lr_min: float = 0.0
    clip_norm: float = 0.0
    temperature: TemperatureSchedule = field(default_factory=TemperatureSchedule)
    entropy_weight: float = 0.0
    prune_threshold: float = 0.02
    aggregator: str = "sum"
    accumulate: int = 1
    recompute: bool = False
    compile: bool | None = None
    cuda_graphs: bool | None = None
    sync_batchnorm: bool = False
    precision: str = "auto"
    batch_branches: str = "auto"
    augment: tuple[str, ...] = ()
    patience: int = 0
    checkpoint_every: int = 0
    seed: int = 22

    def __post_init__(self) -> None:
        object.__setattr__(self, "augment", tuple(self.augment))
        for name, value, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("lr_schedule", self.lr_schedule, LR_SCHEDULES),
            ("precision", self.precision, PRECISIONS),
            ("batch_branches", self.batch_branches, BATCHING),
            *(("augment", name, AUGMENTATIONS) for name in self.augment),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")
        checked_name("aggregator", self.aggregator, ("sum", *AGGREGATORS))
        self._check_numbers()
        self._check_together()
        if not 0 < self.search_share <= 1:
            raise ValueError(f"search_share must be in (0, 1], got {self.search_share}")
        if not 0 <= self.prune_threshold < 1:
            raise ValueError(f"prune_threshold must be in [0, 1), got {self.prune_threshold}")

    def _check_numbers(self) -> None:
        """Raise ValueError for a number that is not finite or too small."""
        gate = () if self.gate_learning_rate is None else ("gate_learning_rate",)  # 0 keeps the gate as it is
        rules: Mapping[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
            "at least 1": (lambda x: x >= 1, ("epochs", "batch_size", "lr_every", "accumulate")),
            "positive": (lambda x: x > 0, ("learning_rate",)),
            "not negative": (
                lambda x: x >= 0,
                ("lr_hold", "lr_patience", "patience", "checkpoint_every", "seed", "weight_decay", "clip_norm",
                 "lr_min", "average", *gate),
            ),
            "finite": (math.isfinite, ("entropy_weight",)),
        }  # fmt: skip
        for rule, (holds, names) in rules.items():
            for name in names:
                value = getattr(self, name)
                if not (math.isfinite(value) and holds(value)):
                    raise ValueError(f"{name} must be {rule}, got {value}")

    def _check_together(self) -> None:
        """Raise ValueError for options that exclude each other."""
        if self.aggregator != "sum" and self.accumulate > 1:
            raise ValueError("an aggregator needs the gradients of a whole batch: set accumulate to 1")
        if self.sync_batchnorm and self.accumulate > 1:
            raise ValueError("sync_batchnorm normalises over whole batches: set accumulate to 1")
        if self.batch_branches == "on" and (self.aggregator != "sum" or self.recompute):
            raise ValueError("batch_branches excludes an aggregator and recompute: set batch_branches to auto")
        if self.cuda_graphs and (self.accumulate > 1 or self.recompute or self.compile is False):
            raise ValueError(
                "cuda_graphs needs compile, and excludes accumulate and recompute: leave those three at "
                "their defaults, or set cuda_graphs to false"
            )

    @property
    def search_epochs(self) -> int:
        """Number of epochs in which the gate is trained, at least one."""
        return max(round(self.epochs * self.search_share), 1)


def default_schedule(rows: int) -> dict[str, int]:
    """Return `epochs`, `batch_size` and `patience` for a number of training rows.

    They give the gate enough steps to converge, in a few minutes. Fewer rows have more epochs, because a training
    of few steps ends before it has learned; `patience` ends it earlier.
    """
    epochs = 60 if rows < 1_000 else 40 if rows < 5_000 else 20
    batch_size = 32 if rows < 1_000 else 64 if rows < 10_000 else 128
    return {"epochs": epochs, "batch_size": batch_size, "patience": epochs // 3}


def table_schedule(rows: int) -> dict[str, Any]:
    """Return `default_schedule` and `learning_rate` for the encoder `tabm` on a number of training rows.

    From 3,000 rows, batches of 256 with a higher learning rate take less time and reach a smaller error. From
    20,000 rows, networks still improve after 20 epochs.
    """
    if rows < 3_000:
        return {**default_schedule(rows), "learning_rate": 3e-3}
    epochs = 20 if 5_000 <= rows < 20_000 else 40
    return {"epochs": epochs, "batch_size": 256, "patience": epochs // 2, "learning_rate": 6e-3}


def has_stopped(history: Sequence[Mapping[str, Any]], settings: TrainSettings) -> bool:
    """Whether a training ends early: `patience` epochs have passed since the best.

    It depends on the history alone, which all workers have, so that a resumed run ends where others do.
    """
    if not settings.patience:
        return False
    scores = [record["val_score"] for record in history]
    return bool(scores) and len(scores) - 1 - scores.index(min(scores)) >= settings.patience


def resolve(
    settings: TrainSettings, network: GroupingNetwork, device: torch.device, workers: int = 1
) -> TrainSettings:
    """Return the settings with "auto" replaced by the choice for a device.

    Precision is "bf16" if the device computes in bfloat16 and the network is large, else "fp32". CUDA graphs are
    replayed on a GPU where their capture is safe: with a compiled network, one worker, whole batches, stored
    activations, and a single backward pass (no aggregator).
    """
    precision, graphs = settings.precision, settings.cuda_graphs
    if precision == "auto":
        precision = "bf16" if large(network) and computes_bf16(device) else "fp32"
    if graphs is None:
        graphs = device.type == "cuda" and workers == 1 and capture_is_safe(settings)
        graphs = graphs and network.spec.task_weighting != "famo"  # computes each batch twice
    return replace(settings, precision=precision, cuda_graphs=graphs)


def is_compiled(settings: TrainSettings, device: torch.device) -> bool:
    """Whether networks are compiled: as set, by default on a GPU."""
    return device.type == "cuda" if settings.compile is None else settings.compile


def capture_is_safe(settings: TrainSettings) -> bool:
    """Whether a compiled part runs once forward and once backward in each step."""
    return not (
        settings.compile is False or settings.accumulate > 1 or settings.recompute or settings.aggregator != "sum"
    )


def large(network: GroupingNetwork) -> bool:
    """Whether stem and one branch have `LARGE` parameters. Pruning does not change it."""
    branch = network.branches.values()[0]
    return sum(p.numel() for part in (network.stem, branch) for p in part.parameters()) >= LARGE


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16. Emulation does not count."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(_capabilities().get(name, False) for name in BF16_OF_CPU)


def _capabilities() -> Mapping[str, Any]:
    """Capabilities of the CPU. Versions of torch before 2.12 do not list them."""
    find = getattr(torch.cpu, "get_capabilities", dict)
    found: Mapping[str, Any] = find()
    return found
