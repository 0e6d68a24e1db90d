"""The training step: gated loss, gate noise, optimiser, and an update that can be refused on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from dmtg_core.network.batched.branches import BatchedBranches
from dmtg_core.network.batched.choice import built, log_once, measured, small
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.training.aggregation import Weigh, aggregate_gradients, load_aggregator
from dmtg_core.training.context import SyncBatchNorm, TrainContext
from dmtg_core.training.data import Batch
from dmtg_core.training.losses import PairLosses, label_counts
from dmtg_core.training.objective.running import by_kind, flat, refill
from dmtg_core.training.objective.scalarizers import TaskWeighting
from dmtg_core.training.settings import TrainSettings, is_compiled

# names of the parts of a step in a profile
FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION = "forward", "backward", "optimizer", "communication"
GAIN = 0.95  # largest share of the time at which a measurement chooses one pass of all branches
COMPILE_LIMIT = 64  # compiled variants of one function: stem, branches and decoders share code


@dataclass(frozen=True)
class StepFigures:
    """Figures of a step on this worker, on the device. The figures of all workers are their sum.

    Args:
        by_task: Gated loss of each task, `(N,)`.
        by_pair: Loss of each live pair (branch, task) before gate and weights, `(P,)`.
        gate_gradient: Norm of θ's gradient over all workers, divided by the number of workers, `()`.
        refused: 1 if the step was refused because loss or gradient were not finite, else 0, also divided by the
            number of workers.
    """

    by_task: Tensor
    by_pair: Tensor
    gate_gradient: Tensor
    refused: Tensor

    def __add__(self, other: StepFigures) -> StepFigures:
        return StepFigures(*torch._foreach_add(list(vars(self).values()), list(vars(other).values())))

    def __mul__(self, factor: float) -> StepFigures:
        return self if factor == 1 else StepFigures(*torch._foreach_mul(list(vars(self).values()), factor))


class WeighedLoss(nn.Module):
    """The loss of a step: `Σ_n w_n Σ_k g[n, k] · L_n(head_{k,n}(branch_k(stem(x))))` (Gao et al. 2024, section 3).

    With `NetworkSpec.task_weighting` "uncertainty" a task's part L becomes `exp(-s_n) · L + s_n / 2` with a
    learned s_n, the logarithm of a variance (Kendall et al. 2018, equation 10, with one form for all losses). With
    a scalarizer it is multiplied by the task's weight in this step, see `objective.scalarizers`.

    Data-parallel training wraps this module. Build a new object after pruning.

    Args:
        network: The network to train.
        entropy_weight, precision, aggregator: See `TrainSettings`.
        weighting: Weighting of the tasks by a scalarizer.

    Raises:
        ValueError: If the library of the aggregator is missing, or if an aggregator is used with learned task
            weights.
    """

    task_of: Tensor
    branch_of: Tensor
    task_weights: Tensor

    def __init__(
        self,
        network: GroupingNetwork,
        entropy_weight: float = 0.0,
        precision: str = "fp32",
        aggregator: str = "sum",
        weighting: TaskWeighting | None = None,
    ) -> None:
        super().__init__()
        if aggregator != "sum" and network.spec.task_weighting != "fixed":
            name = network.spec.task_weighting
            raise ValueError(f"task_weighting {name!r} and an aggregator both weight the tasks: choose one")
        hard = len(network.pairs) == len(network.tasks)
        self.weigh = load_aggregator(aggregator) if aggregator != "sum" and hard else None
        self.network = network
        self.entropy_weight, self.precision, self.weighting = entropy_weight, precision, weighting
        pairs = network.pairs
        self.pair_losses = PairLosses(network.tasks, pairs)
        self.register_buffer("branch_of", torch.tensor([k for k, _ in pairs]), persistent=False)
        self.register_buffer("task_of", torch.tensor([n for _, n in pairs]), persistent=False)
        self.register_buffer(
            "task_weights", torch.tensor([float(t.weight) for t in network.tasks]), persistent=False
        )

    @cached_property
    def statistics(self) -> list[list[Tensor]]:
        """The running statistics, which a forward pass changes, by dtype and dimension."""
        return by_kind(b for part in self.network.running for b in part.buffers())

    def forward(
        self,
        batch: Batch,
        temperature: float,
        noise: Tensor,
        counts: Tensor,
        share: float = 1.0,
        weigh: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss of a batch or of a part of a batch.

        Args:
            batch: Input and targets.
            temperature, noise: See `GroupGate.forward`.
            counts: Number of labels of each task, the divisor of the loss, `(N,)`.
            share: Factor of the terms without data (entropy, uncertainty).
            weigh: Gated losses of the tasks on this worker `(N,)` → weights of the tasks `(N,)`.

        Returns:
            The loss to differentiate, and detached the gated loss of each task `(N,)` and the loss of each pair
            `(P,)`.
        """
        with autocast(self.precision, batch.inputs.device):
            outputs = self.network.forward_pairs(batch.inputs)
        losses = self.pair_losses(outputs, batch.targets) / counts[self.task_of].unsqueeze(1)  # (P, B)
        gate = self.network.gate(temperature, noise)[..., self.task_of, self.branch_of]  # (P,) or (B, P)
        weighed = (losses * (gate.T if gate.dim() == 2 else gate.unsqueeze(1))).sum(1)  # (P,)
        by_task = torch.zeros_like(self.task_weights).index_add(0, self.task_of, weighed)  # (N,)
        objective = by_task
        if (log_variance := self.network.log_variance) is not None:
            objective = torch.exp(-log_variance) * by_task + share * log_variance / 2
        if weigh is not None:
            objective = by_task * weigh(by_task.detach())
        loss = objective @ self.task_weights
        if self.entropy_weight:
            loss = loss + share * self.entropy_weight * self.network.gate.entropy().mean()
        return loss, by_task.detach(), losses.detach().sum(1)

    def separate(self, batch: Batch, counts: Tensor) -> list[Tensor]:
        """Compute a scalar loss for each pair of a hard network, without task weights."""
        with autocast(self.precision, batch.inputs.device):
            outputs = self.network.forward_pairs(batch.inputs)
        rows = self.pair_losses.separate(outputs, batch.targets)
        return [row.sum() / counts[n] for row, (_, n) in zip(rows, self.network.pairs, strict=True)]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of the encoders. See `TrainSettings.precision`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def step_noise(network: GroupingNetwork, settings: TrainSettings, step: int, rank: int, samples: int) -> Tensor:
    """Draw the gate noise of a step. It depends on seed and step, and is equal on all workers and devices.

    Noise for each sample also depends on the worker.
    """
    per_sample = network.gate.sampling == "gumbel_per_sample"
    seed = (settings.seed * 1_000_003 + step) * 4099 + (rank + 1 if per_sample else 0)
    generator = torch.Generator().manual_seed(seed % 2**63)
    return network.gate.noise(generator, samples if per_sample else 0)


@contextmanager
def part(name: str, device: torch.device) -> Iterator[None]:
    """Record a part of a step in a profile, and wait for the device at its end. Without a profile do nothing."""
    if not cast("Any", torch.autograd)._profiler_enabled():  # noqa: SLF001 - no public way to ask
        yield
        return
    with record_function(name):
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    noise: Tensor,
    temperature: float,
    settings: TrainSettings,
    context: TrainContext,
    *,
    step: int = 0,
) -> StepFigures:
    """Run one update. The host does not wait for the device, except with an aggregator or a scalarizer.

    Args:
        module: A `WeighedLoss`, prepared by `context.prepare`.
        step: Number of the step in the run. It seeds aggregators and scalarizers that draw random numbers.
    """
    loss_module, device = cast("WeighedLoss", getattr(module, "module", module)), batch.inputs.device
    weighting = loss_module.weighting
    statistics, weights = loss_module.statistics, [p for group in optimizer.param_groups for p in group["params"]]
    before = [flat(buffers) for buffers in statistics]
    with part(COMMUNICATION, device):
        labels = context.sum(label_counts(loss_module.network.tasks, batch.targets))
    counts, seed = labels.clamp_min(1), settings.seed * 1_000_003 + step

    def over_workers(losses: Tensor) -> Tensor:
        return context.sum(losses) / context.world_size

    optimizer.zero_grad()
    if loss_module.weigh is not None:
        loss, by_task, by_pair = _aggregated(loss_module, loss_module.weigh, batch, counts, seed, context)
    else:
        # data-parallel training averages gradients over workers, but the update needs their sum
        weigh = (
            None if weighting is None else lambda losses: weighting.weigh(over_workers(losses), labels > 0, seed)
        )
        shares = counts / context.world_size
        loss, by_task, by_pair = _gradients(module, batch, noise, temperature, shares, settings.accumulate, weigh)
    with part(OPTIMIZER, device):
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        theta = loss_module.network.gate.logits.grad
        gate_gradient = norm.new_zeros(()) if theta is None else theta.norm()
        if settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(weights, settings.clip_norm, norm)
    with part(COMMUNICATION, device):
        refused = context.sum((~torch.isfinite(loss + norm)).float()).clamp_max(1)
    with part(OPTIMIZER, device):
        cast("Any", optimizer).found_inf = refused
        optimizer.step()
        for buffers, old in zip(statistics, before, strict=True):
            refill(buffers, torch.where(refused.bool(), old, flat(buffers)))
    if weighting is not None:
        again = partial(_losses_again, partial(loss_module, batch, temperature, noise, shares), statistics)
        weighting.update(lambda: over_workers(again()), labels > 0, optimizer.param_groups[0]["lr"])
    return StepFigures(by_task, by_pair, gate_gradient, refused) * (1 / context.world_size)


@torch.no_grad()
def _losses_again(compute: Callable[[], tuple[Tensor, ...]], statistics: Sequence[list[Tensor]]) -> Tensor:
    """Compute the gated losses of a batch, `(N,)`, without a change of the running statistics."""
    before = [flat(buffers) for buffers in statistics]
    _, by_task, _ = compute()
    for buffers, old in zip(statistics, before, strict=True):
        refill(buffers, old)
    return by_task


def _gradients(
    module: nn.Module,
    batch: Batch,
    noise: Tensor,
    temperature: float,
    counts: Tensor,
    parts: int,
    weigh: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a batch in `parts` parts. Return its loss and figures."""
    loss_module, device = cast("WeighedLoss", getattr(module, "module", module)), batch.inputs.device
    split = list(_split(batch, noise, parts))
    total: tuple[Tensor, ...] = ()
    for number, (piece, piece_noise) in enumerate(split):
        # without the wrapper, gradients accumulate locally; the last part sums them over the workers
        called = module if number == len(split) - 1 else loss_module
        with part(FORWARD, device):
            loss, *figures = called(piece, temperature, piece_noise, counts, 1 / len(split), weigh)
        with part(BACKWARD, device):
            loss.backward()
        found = (loss.detach(), *figures)
        total = tuple(a + b for a, b in zip(total, found, strict=True)) if total else found
    loss, by_task, by_pair = total
    return loss, by_task, by_pair


def _aggregated(
    module: WeighedLoss, weigh: Weigh, batch: Batch, counts: Tensor, seed: int, context: TrainContext
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `_gradients`, with an aggregator that combines the gradients of a group's tasks."""
    device = batch.inputs.device
    with part(FORWARD, device):
        losses = module.separate(batch, counts)
    weights = module.task_weights[module.task_of]
    with part(BACKWARD, device):
        weighed = [loss * weight for loss, weight in zip(losses, weights, strict=True)]
        aggregate_gradients(module.network, weighed, weigh, seed=seed, reduce=context.sum)
    with part(COMMUNICATION, device):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if context.world_size > 1:
            joined = context.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, total in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))
    by_pair = torch.stack(losses).detach() * context.world_size
    by_task = torch.zeros_like(module.task_weights).index_copy(0, module.task_of, by_pair)
    return by_pair @ weights, by_task, by_pair


def _split(batch: Batch, noise: Tensor, parts: int) -> Iterator[tuple[Batch, Tensor]]:
    """Split a batch into at most `parts` pieces, each with its noise."""
    rows = len(batch.inputs)
    size = math.ceil(rows / parts)
    for start in range(0, rows, size):
        piece = slice(start, start + size)
        targets = {name: target[piece] for name, target in batch.targets.items()}
        yield Batch(batch.inputs[piece], targets), noise[piece] if noise.dim() == 3 else noise


def prepare_network(network: GroupingNetwork, settings: TrainSettings, context: TrainContext) -> None:
    """Apply the settings of computation to a network. Weights and results do not change.

    Raises:
        ValueError: As `batch_branches`.
    """
    network.recompute = settings.recompute
    if settings.sync_batchnorm and context.world_size > 1:
        SyncBatchNorm.convert(network, context.device)
    batch_branches(network, settings, context)
    if is_compiled(settings, context.device):
        _compile(network, "reduce-overhead" if settings.cuda_graphs else "default")


def batch_branches(network: GroupingNetwork, settings: TrainSettings, context: TrainContext) -> None:
    """Set `network.batched`, so that training computes the branches in one pass, or set it to None.

    "auto" depends on the device. On a CPU it is a rule, so that a run repeats it, and on a GPU a measurement. An
    aggregator has a backward pass for each branch, recomputation needs the memory of one branch at a time, and
    compiled branches share one compiled form: with these, "auto" is "off". The choice is logged once.

    Raises:
        ValueError: If `batch_branches` is "on" and the branches cannot be computed in one pass.
    """
    network.one_pass = settings.batch_branches != "off"
    if network.shared is not None and not network.shared.one_pass and len(network.branches) > 1:
        log_once("branches are computed one after the other: a layer gets a tensor that all samples share")
    if not network.one_pass or len(network.branches) < 2 or network.shared is not None:
        network.batched = None
    elif network.batched is None:
        network.batched, reason = _chosen(network, settings, context)
        passes = "one after the other" if network.batched is None else "in one pass"
        if reason:
            log_once(f"branches are computed {passes}: {reason}")


def _chosen(
    network: GroupingNetwork, settings: TrainSettings, context: TrainContext
) -> tuple[BatchedBranches | None, str]:
    """Return the batched branches or None, and the reason. A rule without a trial gives no reason."""
    if settings.batch_branches == "on":
        return built(network), "batch_branches is on"
    rows, cpu = settings.batch_size // context.world_size, context.device.type == "cpu"
    excluded = settings.aggregator != "sum" or settings.recompute or is_compiled(settings, context.device)
    if excluded or (cpu and not small(network, rows)):
        return None, ""
    try:
        batched = built(network)
    except ValueError as error:
        return None, str(error)
    if cpu:
        return batched, "this saves operators, and the layers are small"
    mine = torch.tensor(measured(network, batched, rows, settings.precision), device=context.device)
    ratio = float(context.sum(mine)) / context.world_size  # the same on all workers
    return batched if ratio <= GAIN else None, f"one pass takes {ratio:.2f} of the time"


def _compile(network: GroupingNetwork, mode: str) -> None:
    """Compile stem, branches and decoders separately.

    Branches then share one compiled form, and pruning causes no compilation.
    """
    import torch.compiler.config

    network.cuda_graphs = mode == "reduce-overhead"
    network.by_length = False  # each length would be compiled
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, COMPILE_LIMIT)
    branches = network.branches.values() if network.shared is None else [network.shared.layers]
    single = (network.stem, *branches, *network.decoders.values())
    parts = [part for part in single if any(True for _ in part.parameters())]
    if network.batched is not None:
        parts.append(network.batched.module)
    for part in parts:
        if part._compiled_call_impl is None:  # noqa: SLF001 - no public way to ask
            part.compile(mode=mode)
