"""Which tasks read the same of what they share, seen in one network, and groups of tasks that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.network.grouping_network import GroupingNetwork, pooled
from dmtg_core.training.context import LocalContext, TrainContext
from dmtg_core.training.data import Data

SAMPLES = 1024  # that gradients are taken on; with more the figures hardly move


def feature_overlap(
    network: GroupingNetwork,
    data: Data,
    *,
    split: str = "val",
    samples: int = SAMPLES,
    context: TrainContext | None = None,
) -> Tensor:
    """How much of what they read two tasks have in common, `(N, N)`, 0 to 1 with 1 on the diagonal.

    What a task reads is `M_n = E[g gᵀ]`, g the gradient of its output with respect to the shared features: the
    matrix whose large eigenvectors span its active subspace (Constantine et al. 2014, equation 2.1). The overlap
    of two tasks is `⟨M_n, M_m⟩ / (‖M_n‖ ‖M_m‖)`, Frobenius. The sign of g plays no part: tasks that ask opposite
    things of the same features read the same, where a cosine of gradients (`gradient_cosines`) sees a conflict, or
    nothing.

    The shared features are those of the stem; without one the input itself where it is a vector, else what the
    first stage of the branch gives. Of a map or a sequence the channels are compared, its places are samples. The
    network should be wide enough to serve all tasks at once: one that has to choose shows its choice instead.

    Args:
        network: Trained, with one branch.
        data: Where samples come from.
        split: Of which split.
        samples: How many of a worker's, at most.
        context: Whose workers each have a part of the samples.

    Raises:
        ValueError: For a network of several branches, or no samples.
    """
    if len(network.branches) != 1:
        raise ValueError(f"what tasks share is seen in a network of one branch, got {len(network.branches)}")
    was_training = network.training
    network.eval()
    (branch,) = network.branches.values()
    depth = 0 if len(network.stem) or network.spec.input.kind == "features" else 1
    moments: list[Tensor] = []
    seen, generator = 0, torch.Generator().manual_seed(0)
    for batch in data.evaluate(split, min(samples, 256)):
        part = batch.inputs[: samples - seen]
        with torch.no_grad():
            shared = branch[:depth](network.stem(network.normalise(part)))  # type: ignore[index]
        found = _moments(network, branch[depth:], shared, part, generator)  # type: ignore[index]
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


def _moments(
    network: GroupingNetwork, rest: nn.Module, shared: Any, raw: Tensor, generator: torch.Generator
) -> list[Tensor]:
    """`Σ g gᵀ` of every task over a batch, `(C, C)` for C channels of the shared features."""
    several = isinstance(shared, tuple)  # a text encoder passes on (tokens, mask)
    leaf = (shared[0] if several else shared).detach().float().requires_grad_()
    features = rest((leaf, *shared[1:]) if several else leaf)
    found = []
    for n, task in enumerate(network.tasks):
        if task.dense:
            output = network.decoders[0, n](features, raw.shape[1:3])
        else:
            output = network.bank.head(0, task, pooled(features))
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        (gradient,) = torch.autograd.grad((output * signs).sum(), leaf, retain_graph=True)
        # (B, C), (B, C, h, w) and (B, L, C) to (samples and places, C)
        rows = gradient.movedim(1, -1) if gradient.dim() == 4 else gradient
        rows = rows.reshape(-1, rows.shape[-1]).double()
        found.append(rows.T @ rows)
    return found


def cluster(affinity: Tensor, groups: int) -> list[int]:
    """Groups of tasks with a high mean affinity: the two groups that have the highest are joined, again and again.

    This is average linkage (Sokal and Michener 1958). The mean of the two directions counts.

    Args:
        affinity: `(N, N)`; its diagonal plays no part.
        groups: How many groups, at most; 1 to N.

    Returns:
        The group of each task, numbered in the order of their first tasks.

    Raises:
        ValueError: For no square matrix, a value that is not finite, or a number of groups out of range.
    """
    count = affinity.shape[0]
    if affinity.shape != (count, count) or not bool(torch.isfinite(affinity).all()):
        raise ValueError(f"an affinity is a square matrix of finite numbers, got shape {tuple(affinity.shape)}")
    if not 1 <= groups <= count:
        raise ValueError(f"{count} tasks make 1 to {count} groups, got {groups}")
    mean = ((affinity + affinity.T) / 2).double()
    members = [[n] for n in range(count)]
    while len(members) > groups:
        a, b = _closest(mean, members)
        members[a] += members.pop(b)
    number = {n: k for k, group in enumerate(sorted(members, key=min)) for n in group}
    return [number[n] for n in range(count)]


def _closest(mean: Tensor, members: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The two groups with the highest mean affinity between them."""
    share = torch.zeros(len(members), mean.shape[0], dtype=mean.dtype)
    for k, group in enumerate(members):
        share[k, list(group)] = 1 / len(group)
    between = (share @ mean @ share.T).fill_diagonal_(-torch.inf)
    a, b = divmod(int(between.argmax()), len(members))
    return min(a, b), max(a, b)
