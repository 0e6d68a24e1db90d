"""The optimiser of a network."""

from __future__ import annotations

from itertools import chain
from typing import Any, cast

import torch

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.training.settings import OPTIMIZERS, TrainSettings


def build_optimizer(network: GroupingNetwork, settings: TrainSettings) -> torch.optim.Optimizer:
    """Build the optimiser of a network.

    θ has its own learning rate. θ and learned variances have no weight decay. Only fused optimisers can refuse a
    step on the device without synchronisation with the host.
    """
    special = {"gate.logits", "log_variance"}
    frozen = {id(p) for part in network.frozen for p in part.parameters()}
    weights = [p for name, p in network.named_parameters() if name not in special and id(p) not in frozen]
    gate_lr = settings.learning_rate if settings.gate_learning_rate is None else settings.gate_learning_rate
    groups = [
        {"params": weights, "lr": settings.learning_rate, "base_lr": settings.learning_rate},
        {"params": [network.gate.logits], "lr": gate_lr, "base_lr": gate_lr, "weight_decay": 0.0},
    ]
    if network.log_variance is not None:
        groups.append({**groups[0], "params": [network.log_variance], "weight_decay": 0.0})
    optimizer = new_optimizer(groups, settings)
    if settings.optimizer == "sgd":
        for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
            # after a refused first step the buffer would be uninitialised memory
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    cast("Any", optimizer).grad_scale = None
    return optimizer


def new_optimizer(groups: Any, settings: TrainSettings, *, fused: bool = True) -> torch.optim.Optimizer:
    """Return an optimiser of the settings for parameters or groups of parameters."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": fused}
    if settings.optimizer == "sgd":
        options["momentum"] = 0.9
    return OPTIMIZERS[settings.optimizer](groups, **options)
