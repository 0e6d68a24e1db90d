"""Gradient affinities of published selectors: the effect of a step on one task on another, in naive MTL.

They compare gradients of the tasks' losses with respect to the shared parameters (stem and branch) of a network of
one branch. Losses are means over labels, and the network is in evaluation mode. An affinity is `(N, N)`: `[i, j]`
is the effect of task i on task j, higher is better. The diagonal is the value of a task alone in the same unit, as
`best_partition` expects it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from torch.func import functional_call

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.tasks import Task
from dmtg_core.training.data import Batch
from dmtg_core.training.losses import label_counts, sample_loss

COUNTS = "counts"  # in a state: those of batches and samples, beside the sums
DIRECTIONS = 32  # dimensions of Grad-TAG's random subspace of the parameters
ROUNDS = 10  # quasi-Newton steps of its fits
STEP = 1e-3  # step of its central differences, as a share of the parameters' norm


class GradientAffinities:
    """CS, TAG and ETAP, averaged over batches of a naive-MTL run.

    Let g_i be the gradient of task i's loss and L_j the loss of task j, on one batch:

    - `cs`: cosine of g_i and g_j (the baseline of Fifty et al. 2021, section 5);
    - `tag`: `1 - L_j(θ - η g_i) / L_j(θ)` with unchanged heads (Fifty et al. 2021, equation 1). It is directed:
      from the task of the step to the task of the loss;
    - `etap`: `⟨g_i, g_j⟩ / L_j`, the first-order form of `tag`. It is the linear part of the predictor of Ayman
      et al. (2026). `group_gains` has the other parts, which need trained groups.

    The value of a task alone is 0 in all of them, because no other task has an effect on it.

    Args:
        tasks: The tasks, in the order of the rows.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)
        self.sums: dict[str, Tensor] = {}
        self.updates = self.samples = 0

    def update(self, network: GroupingNetwork, batch: Batch, learning_rate: float) -> None:
        """Add the affinities of one batch.

        Args:
            network: The network in training, with one branch.
            batch: A batch of the training data. The affinities of a task without labels in it are 0.
            learning_rate: η, the current learning rate of the run.

        Raises:
            ValueError: If the network has several branches.
        """
        shared = shared_parameters(network)
        was_training = network.training
        network.eval()
        losses = _losses(network, shared, batch)
        rows = [torch.autograd.grad(loss, list(shared.values()), retain_graph=True) for loss in losses]
        gradients = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()  # (N, P)
        before = losses.detach().double().clamp_min(torch.finfo(torch.float32).tiny)
        products = gradients @ gradients.T
        norms = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        with torch.no_grad():
            after = torch.stack([_losses(network, _stepped(shared, row, learning_rate), batch) for row in rows])
        network.train(was_training)
        found = {
            "cs": products / (norms.unsqueeze(0) * norms.unsqueeze(1)),
            "tag": 1 - after.double() / before,
            "etap": products / before,
        }
        for name, value in found.items():
            alone = value.cpu().fill_diagonal_(0.0)
            self.sums[name] = self.sums[name] + alone if name in self.sums else alone
        self.updates += 1
        self.samples += len(batch.inputs)

    def state(self) -> dict[str, Tensor]:
        """Return the sums and counts, for a checkpoint."""
        return self.sums | {COUNTS: torch.tensor([self.updates, self.samples])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the sums and counts of `state`."""
        self.sums = {name: value for name, value in state.items() if name != COUNTS}
        self.updates, self.samples = state[COUNTS].tolist()

    def means(self) -> dict[str, Tensor]:
        """Return the mean affinities by name."""
        return {name: value / self.updates for name, value in self.sums.items()}


def projected_affinity(
    network: GroupingNetwork, train: Batch, val: Batch, *, directions: int = DIRECTIONS, seed: int = 0
) -> Tensor:
    """Compute Grad-TAG's estimate of the losses of tasks trained together (Li, Sharma and Zhang 2024).

    The network is linearised in its shared parameters, `f(θ + P w) = f(θ) + ∂f/∂θ · P w`, with a random P of few
    columns. The products are central differences, which work with any layer. For every two tasks, w is fitted to
    their losses on one batch, and their losses are computed on another batch. `[i, j]` is the negative loss of
    task j, trained with i, as a share of the loss before the fit. The diagonal is that of j trained alone. The
    paper averages over random sets of tasks. Here all pairs are computed.

    Args:
        network: A trained naive-MTL network with one branch.
        train: Batch for the fit.
        val: Batch for the evaluation.
        directions: Number of columns of P.
        seed: Seed of P.

    Raises:
        ValueError: If the network has several branches.
    """
    shared = shared_parameters(network)
    was_training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(seed)
    bases = [
        {name: torch.randn(p.shape, generator=generator).to(p) for name, p in shared.items()}
        for _ in range(directions)
    ]
    with torch.no_grad():
        fitted = _linear(network, shared, train, bases)
        evaluated = _linear(network, shared, val, bases)
    network.train(was_training)
    tasks = network.tasks
    start = torch.zeros(directions, device=network.gate.logits.device)
    before = torch.stack([_loss_at(task, evaluated, start) for task in tasks]).clamp_min(1e-12)
    found = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for n, task in enumerate(tasks):
        found[n, n] = -float(_loss_at(task, evaluated, _fit([task], fitted, start)) / before[n])
    for i, j in combinations(range(len(tasks)), 2):
        w = _fit([tasks[i], tasks[j]], fitted, start)
        found[i, j] = -float(_loss_at(tasks[j], evaluated, w) / before[j])
        found[j, i] = -float(_loss_at(tasks[i], evaluated, w) / before[i])
    return found


def shared_parameters(network: GroupingNetwork) -> dict[str, Tensor]:
    """Return the parameters that all tasks of a network of one branch share, by name.

    Raises:
        ValueError: If the network has several branches.
    """
    if len(network.branches) != 1:
        raise ValueError(f"affinities need a network of one branch, got {len(network.branches)}")
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if name.startswith(("stem.", "branches.")) and parameter.requires_grad
    }


def _losses(network: GroupingNetwork, shared: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Compute the mean loss of each task `(N,)` with `shared` instead of the network's own parameters."""
    outputs = functional_call(network, dict(shared), (batch.inputs,))
    return _means(network.tasks, outputs, batch.targets)


def _means(tasks: Sequence[Task], outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    sums = torch.stack([sample_loss(task, outputs[task.name], targets[task.name]).sum() for task in tasks])
    return sums / label_counts(tasks, targets).clamp_min(1)


def _stepped(shared: Mapping[str, Tensor], gradient: Sequence[Tensor], rate: float) -> dict[str, Tensor]:
    return {name: p - rate * g for (name, p), g in zip(shared.items(), gradient, strict=True)}


Linear = dict[str, tuple[Tensor, Tensor, Tensor]]  # task → output (B, …), its derivatives (D, B, …), target


def _linear(
    network: GroupingNetwork, shared: Mapping[str, Tensor], batch: Batch, bases: Sequence[Mapping[str, Tensor]]
) -> Linear:
    def outputs(by: float, basis: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = {name: p + by * basis[name] for name, p in shared.items()}
        found: dict[str, Tensor] = functional_call(network, moved, (batch.inputs,))
        return found

    at, derivatives = outputs(0.0, bases[0]), []
    for basis in bases:
        by = STEP * float(_norm(shared) / _norm(basis))
        above, below = outputs(by, basis), outputs(-by, basis)
        derivatives.append({name: (above[name] - below[name]) / (2 * by) for name in at})
    names = [task.name for task in network.tasks]
    return {name: (at[name], torch.stack([d[name] for d in derivatives]), batch.targets[name]) for name in names}


def _norm(parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([p.norm() for p in parameters.values()]).norm()


def _loss_at(task: Task, linear: Linear, w: Tensor) -> Tensor:
    output, derivatives, target = linear[task.name]
    moved = output + torch.tensordot(w, derivatives, 1)
    return _means([task], {task.name: moved}, {task.name: target})[0]


def _fit(tasks: Sequence[Task], linear: Linear, start: Tensor) -> Tensor:
    """Fit w to the sum of the tasks' losses, as shares of those at the start, with a small ridge penalty."""
    scale = [float(_loss_at(task, linear, start).clamp_min(1e-12)) for task in tasks]
    w = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(_loss_at(task, linear, w) / s for task, s in zip(tasks, scale, strict=True))
        loss = loss + 1e-3 * (w * w).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()
