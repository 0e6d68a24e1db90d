"""Feature overlap of tasks (active-subspace affinity) in one network, and clustering of tasks by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import wide_spec
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.training.context import LocalContext, TrainContext
from dmtg_core.training.data import Data

CROWDED = 4  # tasks for each branch up to which an encoder as wide as all branches is wide enough
WIDER = 4.0  # inference cost of a wider one, in that of all branches
SAMPLES = (
    256  # samples for the gradients; with 1,024, the groups of 17 of 18 encoders of three cameras were as good
)
STABLE = 0.9  # least adjusted Rand index of two proposals in a row whose groups are stable


def overlap_spec(spec: NetworkSpec) -> NetworkSpec | None:
    """Return the encoder that is trained for the feature overlap alone; None if one as wide as all branches does.

    Many tasks displace each other's features in an encoder as wide as all branches. Mean agreement with the true
    groups (adjusted Rand index) on two seeds of planted tasks in five groups, for 0.5 to 0.8 runs of naive MTL:
    with 100 tasks 0.60 in such an encoder and 0.98 in one four times as wide, with 30 tasks 0.95 and 1.00.

    Args:
        spec: The grouping network. An encoder whose branches are parts of a frozen one is not widened.
    """
    crowded = len(spec.tasks) > CROWDED * spec.groups
    return wide_spec(spec, WIDER) if crowded and spec.encoder.branch == "copy" and spec.encoder.can_widen else None


def feature_overlap(
    network: GroupingNetwork,
    data: Data,
    *,
    split: str = "val",
    samples: int = SAMPLES,
    batch_size: int = 256,
    context: TrainContext | None = None,
) -> Tensor:
    """Compute the feature overlap of every two tasks, `(N, N)`: 0 to 1, with 1 on the diagonal.

    For task n let `M_n = E[g gᵀ]`, with g the gradient of its output with respect to the shared features. The
    eigenvectors of `M_n` with large eigenvalues span the active subspace of the task (Constantine et al. 2014,
    equation 2.1). The overlap of two tasks is `⟨M_n, M_m⟩ / (‖M_n‖ ‖M_m‖)`, Frobenius. It does not depend on the
    sign of g: tasks that depend on the same features in opposite directions have a high overlap, while the cosine
    of their gradients (`gradient_cosines`) is negative or about 0.

    The shared features are the output of the stem. Without a stem they are the input if it is a vector, else the
    output of the first stage of the branch. For a map or a sequence the overlap is over channels, and positions
    count as samples. The network should be wide enough for all tasks: in a narrow network the features of some
    tasks displace those of others.

    Args:
        network: A trained network with one branch.
        data: The data set.
        split: Split of the samples.
        samples: Largest number of samples of a worker.
        batch_size: Samples that are computed at a time.
        context: Context of the workers, which each have a part of the samples.

    Raises:
        ValueError: If the network has several branches, or if there are no samples.
    """
    if len(network.branches) != 1:
        raise ValueError(f"feature overlap needs a network of one branch, got {len(network.branches)}")
    was_training = network.training
    network.eval()
    (branch,) = network.branches.values()
    first, rest = nn.Sequential(), branch
    if not len(network.stem) and network.spec.input.kind != "features":
        stages = cast("nn.Sequential", branch)
        first, rest = stages[:1], stages[1:]
    moments: list[Tensor] = []
    seen, generator = 0, torch.Generator().manual_seed(0)
    for batch in data.evaluate(split, min(samples, batch_size)):
        part = batch.inputs[: samples - seen]
        with torch.no_grad():
            shared = first(network.output_of_stem(part))
        found = _moments(network, rest, shared, generator)
        moments = [a + b for a, b in zip(moments, found, strict=True)] if moments else found
        seen += len(part)
        if seen >= samples:
            break
    network.train(was_training)
    if not seen:
        raise ValueError(f"split {split!r} has no samples to compare tasks on")
    flat = (context or LocalContext()).sum(torch.stack(moments)).flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    return (flat @ flat.T).cpu()


def propose_until_stable(
    propose: Callable[[int], list[int]], least: int, most: int, before: Sequence[list[int]] = ()
) -> list[int]:
    """Propose groups after each half of `least` epochs, until two proposals in a row agree.

    Args:
        propose: Trains an encoder until an epoch, and returns the group of each task.
        least, most: As for `measured_after`.
        before: The first proposals, if they are there already.

    Returns:
        The last proposal.
    """
    proposed = list(before)
    for epoch in measured_after(least, most)[len(before) :]:
        if epoch > least and are_stable(proposed):
            break
        proposed.append(propose(epoch))
    return proposed[-1]


def measured_after(least: int, most: int) -> Sequence[int]:
    """Return the epochs after which groups are proposed, until they are stable: each half of `least`.

    Args:
        least: The epochs before which proposed groups are not used.
        most: The most epochs. If they are not more than `least`, there is one proposal.
    """
    step = (least + 1) // 2
    first = least - step if most > least > step else least
    return range(first, most + 1, step)


def are_stable(proposed: Sequence[Sequence[int]]) -> bool:
    """Whether the last two proposals, each with the group of each task, agree."""
    if len(proposed) < 2:
        return False
    names = [str(n) for n in range(len(proposed[-1]))]
    last, before = (Grouping.from_assignment(names, one) for one in (proposed[-1], proposed[-2]))
    return last.adjusted_rand_index(before) >= STABLE


def _moments(network: GroupingNetwork, rest: nn.Module, shared: Any, generator: torch.Generator) -> list[Tensor]:
    """`Σ g gᵀ` of each task over a batch, `(C, C)` for C channels of the shared features."""
    several = isinstance(shared, tuple)  # the stages of a text encoder return (tokens, mask)
    leaf = (shared[0] if several else shared).detach().float().requires_grad_()
    features = rest((leaf, *shared[1:]) if several else leaf)
    found = []
    for n in range(len(network.tasks)):
        output = network.head(0, n, features, network.size)
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        (gradient,) = torch.autograd.grad((output * signs).sum(), leaf, retain_graph=True)
        # (B, C), (B, C, h, w) and (B, L, C) to (samples and positions, C)
        rows = gradient.movedim(1, -1) if gradient.dim() == 4 else gradient
        rows = rows.reshape(-1, rows.shape[-1]).double()
        found.append(rows.T @ rows)
    return found


def cluster(affinity: Tensor, groups: int) -> list[int]:
    """Cluster tasks by average linkage (Sokal and Michener 1958).

    The two groups with the highest mean affinity are joined until `groups` are left. The affinity of two tasks is
    the mean of both directions.

    Args:
        affinity: `(N, N)`. The diagonal is ignored.
        groups: Number of groups, 1 to N.

    Returns:
        The group of each task, numbered in the order of their first tasks.

    Raises:
        ValueError: If the matrix is not square or not finite, or if the number of groups is out of range.
    """
    count = affinity.shape[0]
    if affinity.shape != (count, count) or not bool(torch.isfinite(affinity).all()):
        raise ValueError(f"an affinity is a square matrix of finite numbers, got shape {tuple(affinity.shape)}")
    if not 1 <= groups <= count:
        raise ValueError(f"{count} tasks can form 1 to {count} groups, got {groups}")
    mean = ((affinity + affinity.T) / 2).double()
    members = [[n] for n in range(count)]
    while len(members) > groups:
        a, b = _closest(mean, members)
        members[a] += members.pop(b)
    number = {n: k for k, group in enumerate(sorted(members, key=min)) for n in group}
    return [number[n] for n in range(count)]


def _closest(mean: Tensor, members: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the two groups with the highest mean affinity between them."""
    share = torch.zeros(len(members), mean.shape[0], dtype=mean.dtype)
    for k, group in enumerate(members):
        share[k, list(group)] = 1 / len(group)
    between = (share @ mean @ share.T).fill_diagonal_(-torch.inf)
    a, b = divmod(int(between.argmax()), len(members))
    return min(a, b), max(a, b)
