"""The gate: a learnable distribution over branches for each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

SAMPLINGS = ("gumbel", "gumbel_per_sample", "softmax", "straight_through", "fixed")
EPSILON = torch.finfo(torch.float32).tiny


def _uniform(tasks: int, groups: int, _scale: float, _generator: torch.Generator) -> Tensor:
    return torch.zeros(tasks, groups)


def _uniform_noise(tasks: int, groups: int, scale: float, generator: torch.Generator) -> Tensor:
    return scale * (torch.rand(tasks, groups, generator=generator) - 0.5)


def _diagonal(tasks: int, groups: int, scale: float, _generator: torch.Generator) -> Tensor:
    return scale * torch.eye(groups).repeat(math.ceil(tasks / groups), 1)[:tasks]


def _gaussian(tasks: int, groups: int, scale: float, generator: torch.Generator) -> Tensor:
    return scale * torch.randn(tasks, groups, generator=generator)


# (tasks, groups, scale, generator) → logits (N, K). "diagonal" favours branch n mod K for task n.
INITIAL_LOGITS: Mapping[str, Callable[[int, int, float, torch.Generator], Tensor]] = {
    "uniform": _uniform,
    "uniform_noise": _uniform_noise,
    "diagonal": _diagonal,
    "gaussian": _gaussian,
}


class GroupGate(nn.Module):
    """The relaxed Categorical distribution over branches of each task (Gao et al. 2024, section 3).

    The logits θ are `(N, K)`. A pruned pair (task, branch) is dead: its probability is 0, and it has no gradient.
    Each task keeps at least one branch.

    Args:
        tasks: N.
        groups: K.
        sampling: "gumbel" draws one relaxed sample for each step (the paper), "gumbel_per_sample" one for each
            sample of the batch. "straight_through" is "gumbel" with a hard forward pass. "softmax" uses the
            probabilities at the temperature without noise. "fixed" uses the probabilities without a temperature
            and is not trained.
        initial: A key of `INITIAL_LOGITS`.
        scale: Scale of the structure or noise of the initial logits.
        generator: Generator of the initial noise.

    Raises:
        ValueError: For an unknown option or a size below 1.
    """

    alive: Tensor

    def __init__(
        self,
        tasks: int,
        groups: int,
        *,
        sampling: str = "gumbel",
        initial: str = "uniform",
        scale: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if tasks < 1 or groups < 1:
            raise ValueError(f"a gate needs at least 1 task and 1 group, got {tasks} and {groups}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"unknown sampling {sampling!r}, expected one of {', '.join(SAMPLINGS)}")
        if initial not in INITIAL_LOGITS:
            raise ValueError(f"unknown initial logits {initial!r}, expected one of {', '.join(INITIAL_LOGITS)}")
        generator = generator or torch.Generator().manual_seed(0)
        self.sampling = sampling
        logits = INITIAL_LOGITS[initial](tasks, groups, scale, generator)
        self.logits = nn.Parameter(logits, requires_grad=sampling != "fixed")
        self.register_buffer("alive", torch.ones(tasks, groups, dtype=torch.bool))

    @torch.no_grad()
    def start_from(self, assignment: Sequence[int], probability: float) -> None:
        """Set θ so that each task has its proposed branch with `probability`. The other branches share the rest.

        Args:
            assignment: The proposed branch of each task.
            probability: At least 1/K, below 1.

        Raises:
            ValueError: For another number of tasks, an unknown branch, or a probability out of range.
        """
        tasks, groups = self.logits.shape
        if len(assignment) != tasks or not all(0 <= k < groups for k in assignment):
            raise ValueError(
                f"expected a branch from 0 to {groups - 1} for each of {tasks} tasks, got {assignment}"
            )
        if not 1 / groups <= probability < 1:
            raise ValueError(f"probability must be in [{1 / groups:g}, 1) for {groups} groups, got {probability}")
        proposed = torch.nn.functional.one_hot(torch.tensor(assignment), groups).to(self.logits)
        self.logits.copy_(proposed * math.log(probability * (groups - 1) / (1 - probability)))

    def masked_logits(self) -> Tensor:
        """θ with -inf for dead pairs, float32 `(N, K)`."""
        return self.logits.float().masked_fill(~self.alive, -torch.inf)

    def probabilities(self) -> Tensor:
        """π = softmax(θ) over the live branches, `(N, K)`."""
        return self.masked_logits().softmax(1)

    def noise(self, generator: torch.Generator, samples: int = 0) -> Tensor:
        """Draw standard Gumbel noise, `(N, K)` or `(samples, N, K)`, on the generator's device."""
        shape = self.logits.shape if samples == 0 else (samples, *self.logits.shape)
        uniform = torch.rand(shape, generator=generator, device=generator.device)
        exponential = -torch.log(uniform.clamp_min(EPSILON))
        return -torch.log(exponential.clamp_min(EPSILON))

    def forward(self, temperature: float | Tensor, noise: Tensor) -> Tensor:
        """Return the weights of the branches for one step: `softmax((θ + Gumbel) / τ)` for each row.

        Args:
            temperature: τ > 0.
            noise: Noise of `noise`. The samplings "softmax" and "fixed" ignore it.

        Returns:
            `(N, K)`, or `(B, N, K)` for per-sample noise; rows sum to 1.
        """
        logits = self.masked_logits()
        if self.sampling == "fixed":
            return logits.softmax(-1).detach()
        if self.sampling == "softmax":
            return (logits / temperature).softmax(-1)
        soft = ((logits + noise) / temperature).softmax(-1)
        if self.sampling != "straight_through":
            return soft
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard + soft - soft.detach()

    def entropy(self) -> Tensor:
        """Entropy of each task's π in nats, `(N,)`. A saturated row has entropy 0 and gradient 0, never NaN."""
        # dead pairs are masked before the logarithm: 0 · log 0 is 0 forward but NaN backward
        log_p = self.masked_logits().log_softmax(1).masked_fill(~self.alive, 0.0)
        return -(self.probabilities() * log_p).sum(1)

    def assignment(self) -> list[int]:
        """Branch of each task: the argmax of π, on a tie the lowest index."""
        choice: list[int] = self.masked_logits().argmax(1).tolist()
        return choice

    @torch.no_grad()
    def survivors(self, threshold: float) -> Tensor:
        """Mask of the pairs that stay if those with π below `threshold` are pruned, bool `(N, K)`.

        The likeliest branch of a task always stays.
        """
        probabilities = self.probabilities()
        # the argmax of θ as in `assignment`: logits that differ by less than a rounding step are equal in π
        likeliest = self.masked_logits().argmax(1, keepdim=True)
        best = torch.zeros_like(self.alive).scatter_(1, likeliest, value=True)
        return self.alive & ((probabilities >= threshold) | best)
