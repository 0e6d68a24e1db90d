"""Diagnostics of an epoch: figures of the gate, conflicts of gradients, and warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dmtg_core.names import listed
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Batch
from dmtg_core.training.losses import sample_loss
from dmtg_core.training.settings import TrainSettings

NO_GRADIENT = 1e-6  # norm of θ's gradient, in units of the loss, below which the gate is not trained
COLLAPSED, EARLY = 0.05, 0.2  # share of the largest entropy; share of the search that counts as early
CONVERGED = 0.5  # smallest probability of a task's branch at the end of the search
SAMPLES = 32  # samples for the comparison of gradients
CONFLICT = -0.2  # mean cosine of two tasks' gradients below which they conflict


def gate_figures(network: GroupingNetwork, by_pair: Sequence[float], gradient_norm: float) -> dict[str, Any]:
    """Compute the figures of the gate for an epoch.

    Args:
        by_pair: Mean loss of each live pair over the epoch, before the gate, `(P,)`.
        gradient_norm: Mean norm of θ's gradient over the steps.

    Returns:
        `entropy`: mean over tasks, as a share of log K (0 converged, 1 uniform; 0 for K = 1). `confidence`: mean
        probability of the likeliest branch. `gradient_norm`. `loss_spread`: for each task (max - min) / mean of
        its losses over its live branches.
    """
    largest = math.log(network.spec.groups) if network.spec.groups > 1 else 1.0
    losses: dict[int, list[float]] = {}
    for (_, task), loss in zip(network.pairs, by_pair, strict=True):
        losses.setdefault(task, []).append(loss)
    with torch.no_grad():
        entropy = float(network.gate.entropy().mean()) / largest
        confidence = float(network.gate.probabilities().amax(1).mean())
    return {
        "entropy": entropy,
        "confidence": confidence,
        "gradient_norm": gradient_norm,
        "loss_spread": {network.tasks[n].name: _spread(losses[n]) for n in sorted(losses)},
    }


def _spread(losses: Sequence[float]) -> float:
    mean = sum(losses) / len(losses)
    return (max(losses) - min(losses)) / mean if mean else 0.0


def gradient_cosines(network: GroupingNetwork, batch: Batch, context: TrainContext) -> list[list[float | None]]:
    """Compute the cosine of the gradients of every two tasks of a group, `(N, N)`; None between groups.

    The gradients are those of a batch's losses with respect to the features of the group's branch, in evaluation
    mode. They are a cheap approximation of the gradients of the branch's weights, as in MGDA-UB (Sener and Koltun
    2018, section 3.3). At most `SAMPLES` samples of a worker's batch are used.
    """
    was_training = network.training
    network.eval()
    assignment = network.gate.assignment()
    batch = Batch(batch.inputs[:SAMPLES], {name: target[:SAMPLES] for name, target in batch.targets.items()})
    with torch.no_grad():
        features = network.features(batch.inputs, assignment)
    gram = torch.zeros(len(network.tasks), len(network.tasks), device=batch.inputs.device)
    for k, held in features.items():
        members = [n for n, branch in enumerate(assignment) if branch == k]
        rows = torch.stack([_feature_gradient(network, batch, held, k, n) for n in members])
        index = torch.tensor(members, device=gram.device)
        gram[index.unsqueeze(1), index] = rows @ rows.T
    network.train(was_training)
    # each sample is on one worker: the products over all samples are the sum over the workers
    gram = context.sum(gram)
    norms = gram.diagonal().sqrt()
    cosines = (gram / (norms.unsqueeze(0) * norms.unsqueeze(1)).clamp_min(1e-30)).tolist()
    together = [[a == b for b in assignment] for a in assignment]
    return [
        [c if same else None for c, same in zip(*rows, strict=True)]
        for rows in zip(cosines, together, strict=True)
    ]


def _feature_gradient(network: GroupingNetwork, batch: Batch, features: Tensor, k: int, n: int) -> Tensor:
    """Flat gradient of task n's loss with respect to the features of branch k."""
    task, leaf = network.tasks[n], features.detach().float().requires_grad_()
    output = network.head(k, n, leaf, network.size)
    loss = sample_loss(task, output, batch.targets[task.name]).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.flatten()


def warnings(
    history: Sequence[Mapping[str, Any]], tasks: Sequence[str], settings: TrainSettings, *, proposed: bool = False
) -> list[str]:
    """Return warnings about the last epoch of a history, each with a remedy.

    Args:
        history: Records of the epochs so far, with `gate`, `phase` and `probabilities`.
        tasks: Names of the tasks in the order of the probabilities.
        settings: Training settings.
        proposed: Whether the gate started at proposed groups, so that it is expected to converge early.
    """
    record = history[-1]
    branches = len(record["probabilities"][0])
    if branches == 1:
        return []
    found = []
    # the groups of a distilled network are fixed from the start: there is no gate to warn of
    fixed = all(sum(p > 0 for p in row) == 1 for row in history[0]["probabilities"])
    if record["phase"] == "search" and not fixed:
        found += _of_the_search(history, tasks, settings, proposed)
    return found


def _of_the_search(
    history: Sequence[Mapping[str, Any]], tasks: Sequence[str], settings: TrainSettings, proposed: bool
) -> list[str]:
    record = history[-1]
    gate, epoch = record["gate"], record["epoch"]
    alive = sum(sum(p > 0 for p in row) > 1 for row in record["probabilities"])
    found = []
    if alive and gate["gradient_norm"] < NO_GRADIENT * sum(record["train_loss"].values()):
        found.append(
            "the gate has no gradient: every branch has the same loss for a task; let the branches differ at the "
            "start, and check gate.sampling"
        )
    early = epoch <= max(EARLY * settings.search_epochs, 1) and epoch < settings.search_epochs
    before = len(history) > 1 and history[-2]["gate"]["entropy"] < COLLAPSED
    if early and not proposed and not before and gate["entropy"] < COLLAPSED:
        found.append(
            f"the gate has converged after {epoch} of {settings.search_epochs} epochs of search, before the "
            "branches can differ: lower gate.learning_rate or raise gate.temperature.start"
        )
    unsure = [name for name, row in zip(tasks, record["probabilities"], strict=True) if max(row) < CONVERGED]
    if epoch == settings.search_epochs and unsure:
        found.append(
            f"the search ended before the gate converged for {listed(unsure)} (probability under "
            f"{CONVERGED:.0%}): raise "
            "gate.learning_rate, train.epochs or search.share"
        )
    return found


def conflicts(history: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[tuple[str, str, float]]:
    """Return the pairs of tasks of a group whose gradients conflict, with their mean cosine.

    The mean is over the epochs with hard groups. Two tasks that depend on the same features in opposite ways
    conflict too, and may gain from a common encoder.

    Args:
        history: Records of the epochs of a network, with `phase` and `cosines`.
        tasks: Names of the tasks in the order of the cosines.
    """
    found, hard = [], [record["cosines"] for record in history if record["phase"] == "finetune"]
    for a, b in combinations(range(len(tasks)), 2):
        values = [value for one in hard if (value := one[a][b]) is not None]
        if values and (mean := sum(values) / len(values)) < CONFLICT:
            found.append((tasks[a], tasks[b], mean))
    return found
