"""Gradients of tasks that share a branch, combined by a rule that looks at all of them, and not by their sum.

Tasks may pull the parameters that they share in opposite directions. An aggregator takes the gradients of a
group's N tasks as the rows of a Jacobian `J`, `(N, D)`, and gives them weights `w` from its Gramian `J Jᵀ`; the
group then learns from `wᵀ J`. The rules are those of torchjd (Quinton & Rey 2024, "Jacobian Descent For
Multi-Objective Optimization"), an optional library. Left out are rules that do not weigh whole gradients, like
GradDrop, and rules that cannot do without a memory of earlier steps, like GradVac.

Without conflict most weights add up to about 1 (PCGrad's to N, Nash-MTL's to nothing in particular): a group moves
by something like the mean of its tasks' gradients, and the best learning rate is not that of a sum.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.network.encoders import seeded
from dmtg_core.network.grouping_network import GroupingNetwork

# (Gramian of a group's gradients (N, N) on any device, seed) → weights (N,), float64 on the CPU
Weigh = Callable[[Tensor, int], Tensor]

BLOCK = 2**24  # numbers of the Jacobian that are summed over the workers at a time


def _unit(gramian: Tensor) -> Tensor:
    """The Gramian with trace 1: torchjd takes gradients for zero whose squares add up to less than 1e-4."""
    return gramian / gramian.trace()


def _root(gramian: Tensor) -> Tensor:
    """A square matrix with this Gramian, for a rule that asks for the Jacobian."""
    values, vectors = torch.linalg.eigh(gramian)
    return vectors * values.clamp_min(0).sqrt()


def _nash_mtl(library: Any, gramian: Tensor) -> Tensor:
    # made anew at each step: it would begin its search at the weights of the step before
    aggregator = library.NashMTL(n_tasks=len(gramian))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not DPP", UserWarning)  # only speed is at stake, and it is set there
        weights: Tensor = aggregator.weighting(_root(gramian))
    return weights


# name → (torchjd.aggregation, Gramian (N, N) float64) → weights (N,). All but Nash-MTL's are the same for any
# multiple of the Gramian; it takes care that the norm of the combined gradient is at most 1. The two that hurt no
# task do so up to the 1e-4 that torchjd adds to the diagonal of a Gramian of trace 1: a task whose gradient is a
# hundredth of the longest is not seen, so task weights should bring losses to about one size.
AGGREGATORS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    # the mean of the gradients
    "mean": lambda library, gramian: library.MeanWeighting()(gramian),
    # each gradient projected so that it hurts no task, then their mean (Quinton & Rey 2024)
    "upgrad": lambda library, gramian: library.UPGradWeighting()(_unit(gramian)),
    # their mean projected so that it hurts no task (Lopez-Paz & Ranzato 2017, "GEM")
    "dualproj": lambda library, gramian: library.DualProjWeighting()(_unit(gramian)),
    # each gradient without what opposes the others, one after the other in random order (Yu et al. 2020)
    "pcgrad": lambda library, gramian: library.PCGradWeighting()(_unit(gramian)),
    # the best for the worst task near the mean (Liu et al. 2021); c = 0.5 as in LibMTL
    "cagrad": lambda library, gramian: library.CAGradWeighting(c=0.5)(_unit(gramian)),
    # the shortest convex combination (Désidéri 2012, Sener & Koltun 2018)
    "mgda": lambda library, gramian: library.MGDAWeighting()(_unit(gramian)),
    # as long along each of the gradients (Liu et al. 2021, "IMTL")
    "imtl_g": lambda library, gramian: library.IMTLGWeighting()(_unit(gramian)),
    # principal components brought to one length (Senushkin et al. 2023)
    "aligned_mtl": lambda library, gramian: library.AlignedMTLWeighting()(_unit(gramian)),
    # the Nash bargaining solution (Navon et al. 2022); a second for each step of 40 tasks
    "nash_mtl": _nash_mtl,
}


def load_aggregator(name: str) -> Weigh:
    """An aggregator that has been seen at work, to be asked for before training starts.

    What it gives is a function of the Gramian and the seed alone: random orders are drawn from the seed without
    touching the caller's random state, and nothing is kept from call to call. A task whose gradient is exactly 0,
    because nothing in the batch is labelled for it, has weight 0 and the others are weighed as if it were not
    there; a Gramian that is not finite gives weights that are not either.

    Raises:
        ValueError: For an unknown name, or when a library is missing, with the command that installs it.
    """
    if name not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {name!r}, expected one of {', '.join(AGGREGATORS)}")
    try:
        weigh = partial(_weigh, partial(AGGREGATORS[name], importlib.import_module("torchjd.aggregation")))
        weigh(torch.tensor([[1.0, -0.5], [-0.5, 2.0]]), 0)
    except ImportError as error:
        extra = "torchjd[nash-mtl]" if name == "nash_mtl" else "dmtg[aggregators]"
        raise ValueError(
            f"aggregator {name!r} needs a library that is not installed: pip install '{extra}' ({error})"
        ) from error
    return weigh


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
    """The parameters over which the tasks of each live branch are weighed.

    They are those that a group has to itself: its branch, with the stem when no other branch is alive. For a
    branch with nothing to learn they are the stem's, which are then all that its tasks share.
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
    """The backward pass of a step whose groups are hard, with an aggregator.

    Adds to `.grad`, as `backward` does, this worker's share of: for each head, the gradient of its own loss; for
    each branch, `wᵀ J` with the weights of its tasks; for the stem, the sum of all branches' weighted gradients.
    The only task of a branch has weight 1. θ gets nothing: with one head for each task its gradient is 0.

    A group of N tasks costs N backward passes through its heads and `shared_parameters`, one after the other, and
    holds `J`, N times as large as those, for one group at a time; two passes more do the rest. The sum over the
    workers moves all of `J`. The weights are read by the host.

    Args:
        network: With exactly one head for each task.
        losses: A scalar for each of `network.pairs`, this worker's share of the task's loss; together or, which
            saves each pass from going through all dense decoders, apart.
        weigh: From `load_aggregator`.
        seed: Of this step, the same on all workers.
        reduce: The sum over all workers of a tensor `(N, any)`; by default there is one worker.

    Returns:
        The weight of each pair, `(P,)`, the same on all workers; NaN where a gradient is not finite.

    Raises:
        ValueError: When a task has more than one head, or the losses are not those of the pairs.
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
    """`J Jᵀ` of the sum of all workers' Jacobians, float64 `(N, N)`; it is not the sum of their Gramians."""
    blocks = jacobian.split(max(BLOCK // len(jacobian), 1), dim=1)
    wholes = (reduce(block.contiguous()).double() for block in blocks)
    return torch.stack([whole @ whole.T for whole in wholes]).sum(0)
