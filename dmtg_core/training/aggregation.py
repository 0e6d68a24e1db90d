"""Gradient aggregators: rules that combine the gradients of tasks that share a branch.

The gradients of tasks may conflict in shared parameters. The gradients of a group's N tasks are the rows of a
Jacobian `J`, `(N, D)`. An aggregator computes weights `w` from its Gramian `J Jᵀ`, and the gradient of the group
is `wᵀ J` instead of the sum. The rules are those of torchjd (Quinton & Rey 2024, "Jacobian Descent For
Multi-Objective Optimization"), an optional library. Rules that do not weight whole gradients, for example
GradDrop, and rules that need a state from earlier steps, for example GradVac, are not included.

Without conflict the weights of most rules sum to about 1 (those of PCGrad to N, those of Nash-MTL to no fixed
value). The gradient of a group is then about the mean of its tasks' gradients, and the best learning rate is not
that of a sum.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.addresses import checked_name, is_address, load
from dmtg_core.network.encoders import seeded
from dmtg_core.network.grouping_network import GroupingNetwork

# (Gramian of a group's gradients (N, N) on any device, seed) → weights (N,), float64 on the CPU
Weigh = Callable[[Tensor, int], Tensor]

BLOCK = 2**24  # numbers of the Jacobian that are summed over the workers at once


def _unit(gramian: Tensor) -> Tensor:
    """The Gramian with trace 1. torchjd treats gradients as 0 if the sum of their squares is below 1e-4."""
    return gramian / gramian.trace()


def _root(gramian: Tensor) -> Tensor:
    """A square matrix with this Gramian, for rules that need a Jacobian."""
    values, vectors = torch.linalg.eigh(gramian)
    return vectors * values.clamp_min(0).sqrt()


def _nash_mtl(library: Any, gramian: Tensor) -> Tensor:
    # a new object for each step: it would start its search from the weights of the previous step
    aggregator = library.NashMTL(n_tasks=len(gramian))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not DPP", UserWarning)  # only about speed
        weights: Tensor = aggregator.weighting(_root(gramian))
    return weights


# name → (torchjd.aggregation, Gramian (N, N) float64) → weights (N,). All rules but Nash-MTL are invariant to the
# scale of the Gramian; Nash-MTL limits the norm of the combined gradient to 1. The two rules without conflict
# ("upgrad", "dualproj") are exact up to the 1e-4 that torchjd adds to the diagonal of a Gramian of trace 1: they
# ignore a task whose gradient is a hundredth of the longest. Task weights should scale losses to about one size.
AGGREGATORS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    # the mean of the gradients
    "mean": lambda library, gramian: library.MeanWeighting()(gramian),
    # the mean of the gradients, each projected so that it conflicts with no task (Quinton & Rey 2024)
    "upgrad": lambda library, gramian: library.UPGradWeighting()(_unit(gramian)),
    # the mean, projected so that it conflicts with no task (Lopez-Paz & Ranzato 2017, "GEM")
    "dualproj": lambda library, gramian: library.DualProjWeighting()(_unit(gramian)),
    # each gradient without its conflicting parts, one task after the other in random order (Yu et al. 2020)
    "pcgrad": lambda library, gramian: library.PCGradWeighting()(_unit(gramian)),
    # the best direction for the worst task near the mean (Liu et al. 2021); c = 0.5 as in LibMTL
    "cagrad": lambda library, gramian: library.CAGradWeighting(c=0.5)(_unit(gramian)),
    # the shortest convex combination (Désidéri 2012, Sener & Koltun 2018)
    "mgda": lambda library, gramian: library.MGDAWeighting()(_unit(gramian)),
    # equal projections on all gradients (Liu et al. 2021, "IMTL")
    "imtl_g": lambda library, gramian: library.IMTLGWeighting()(_unit(gramian)),
    # principal components scaled to one length (Senushkin et al. 2023)
    "aligned_mtl": lambda library, gramian: library.AlignedMTLWeighting()(_unit(gramian)),
    # the Nash bargaining solution (Navon et al. 2022); one second for each step with 40 tasks
    "nash_mtl": _nash_mtl,
}


def load_aggregator(name: str) -> Weigh:
    """Load an aggregator and call it once, so that errors occur before training starts.

    The weights depend only on the Gramian and the seed. Random orders are drawn from the seed. The caller's random
    state does not change, and no state is kept between calls. A task whose gradient is exactly 0, because the
    batch has no labels for it, has weight 0, and the other weights are computed without it. The weights are NaN if
    the Gramian is not finite.

    Args:
        name: A key of `AGGREGATORS`, or the address of a function from a Gramian, float64 `(N, N)`, to weights
            `(N,)`.

    Raises:
        ValueError: For an unknown name, or if a library is missing. The message has the command that installs it.
    """
    checked_name("aggregator", name, AGGREGATORS)
    if is_address(name):
        return _own_aggregator(name)
    try:
        weigh = partial(_weigh, partial(AGGREGATORS[name], importlib.import_module("torchjd.aggregation")))
        weigh(torch.tensor([[1.0, -0.5], [-0.5, 2.0]]), 0)
    except ImportError as error:
        extra = "torchjd[nash-mtl]" if name == "nash_mtl" else "dmtg[aggregators]"
        raise ValueError(
            f"aggregator {name!r} needs a library that is not installed: pip install '{extra}' ({error})"
        ) from error
    return weigh


def _own_aggregator(address: str) -> Weigh:
    rule = load("aggregator", address)
    found: object = rule(torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=torch.float64))
    if not isinstance(found, Tensor) or found.shape != (2,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"aggregator {address} must return the weights (N,) of a Gramian (N, N), got {got} for N = 2"
        )
    return partial(_weigh, rule)


def _weigh(rule: Callable[[Tensor], Tensor], gramian: Tensor, seed: int) -> Tensor:
    gramian = gramian.double().cpu()
    if not gramian.isfinite().all():
        return gramian.new_full((len(gramian),), torch.nan)
    present = gramian.diagonal() > 0
    weights = present.double()
    if present.sum() > 1:
        with seeded(seed):
            weights[present] = rule(gramian[present][:, present])
    return weights


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def shared_parameters(network: GroupingNetwork) -> dict[int, list[nn.Parameter]]:
    """Return the parameters whose gradients determine the weights of the tasks, for each live branch.

    These are the parameters of the branch, and those of the stem if there is no other live branch. For a branch
    without trainable parameters they are those of the stem.
    """
    stem = _trainable(network.stem)
    shared = {}
    for k, branch in network.branches.items():
        own = _trainable(branch)
        shared[k] = stem + own if len(network.branches) == 1 or not own else own
    return shared


def aggregate_gradients(
    network: GroupingNetwork,
    losses: Sequence[Tensor] | Tensor,
    weigh: Weigh,
    *,
    seed: int,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """Run the backward pass of a hard network with an aggregator.

    It adds this worker's share of the gradients to `.grad`, as `backward` does: for each head the gradient of its
    own loss, for each branch `wᵀ J` with the weights of its tasks, for the stem the sum of the weighted gradients
    of all branches. The only task of a branch has weight 1. θ has no gradient: with one head for each task it is
    0.

    A group of N tasks needs N backward passes through its heads and `shared_parameters`, one after the other. `J`
    is N times as large as these parameters and is in memory for one group at a time. Two further passes compute
    the rest. The sum over the workers transfers all of `J`. The host reads the weights.

    Args:
        network: A network with exactly one head for each task.
        losses: A scalar for each of `network.pairs`, this worker's share of the task's loss. They are one tensor,
            or separate tensors. With separate tensors a pass does not go through all dense decoders.
        weigh: An aggregator of `load_aggregator`.
        seed: Seed of this step, equal on all workers.
        reduce: Sum of a tensor `(N, any)` over all workers. By default there is one worker.

    Returns:
        Weight of each pair, `(P,)`, equal on all workers; NaN if a gradient is not finite.

    Raises:
        ValueError: If a task has more than one head, or if the losses are not those of the pairs.
    """
    pairs, losses = network.pairs, tuple(losses)
    if not len(pairs) == len(network.tasks) == len(losses):
        raise ValueError(
            "an aggregator needs one head and one loss for each task, "
            f"got {len(network.tasks)} tasks, {len(pairs)} heads and {len(losses)} losses"
        )
    heads, trunk = (
        [*_trainable(first), *_trainable(second)]
        for first, second in ((network.bank, network.decoders), (network.stem, network.branches))
    )
    torch.autograd.backward(losses, inputs=heads, retain_graph=True)
    weights = torch.ones(len(losses), device=losses[0].device)
    for k, parameters in shared_parameters(network).items():
        members = [p for p, (branch, _) in enumerate(pairs) if branch == k]
        if len(members) > 1 and parameters:
            gramian = _gramian(_jacobian([losses[p] for p in members], parameters), reduce)
            weights[members] = weigh(gramian, seed * network.spec.groups + k).to(weights)
    if trunk:
        torch.autograd.backward(losses, tuple(weights), inputs=trunk)
    return weights


def _jacobian(losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradient of each loss with respect to all parameters, `(N, D)`."""
    jacobian = parameters[0].new_empty(len(losses), sum(p.numel() for p in parameters))
    for row, loss in zip(jacobian, losses, strict=True):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        torch.cat([g.flatten() for g in gradients], out=row)
    return jacobian


def _gramian(jacobian: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`J Jᵀ` of the sum of the Jacobians of all workers, float64 `(N, N)`. It is not the sum of their Gramians."""
    blocks = jacobian.split(max(BLOCK // len(jacobian), 1), dim=1)
    wholes = (reduce(block.contiguous()).double() for block in blocks)
    return torch.stack([whole @ whole.T for whole in wholes]).sum(0)
