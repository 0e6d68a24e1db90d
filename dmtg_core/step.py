"""One training step: the gated loss, its noise, the optimiser, and an update that can be refused on the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmtg_core.context import TrainContext
from dmtg_core.data import Batch
from dmtg_core.losses import PairLosses, label_counts
from dmtg_core.network import GroupingNetwork
from dmtg_core.settings import OPTIMIZERS, TrainSettings


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
