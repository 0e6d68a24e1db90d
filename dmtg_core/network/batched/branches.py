"""`BatchedBranches`: K branches of equal shape in one pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmtg_core.network.batched.layers import NotBatchableError
from dmtg_core.network.batched.stacks import Stacks
from dmtg_core.network.batched.template import Template

TOLERANCE = 1e-6  # relative difference of a trial in float64


class BatchedBranches:
    """K branches of equal shape that are computed in one pass, with grouped convolutions and batched products.

    The branches stay as they are: parameters, gradients, running statistics and counters are theirs. A copy of a
    network has no batched branches, because a copy has other parameters.

    Args:
        branches: Branch number → branch.
        sample: Input of the branches for a trial: a few samples, at least two.

    Raises:
        NotBatchableError: If the branches cannot be computed in one pass. The message has the reason.
    """

    def __init__(self, branches: Mapping[int, nn.Module], sample: Any) -> None:
        self.numbers, modules = list(branches), list(branches.values())
        _check_equal(modules)
        self.template = Template(modules[0], len(modules))
        self.expand = self._trial(modules, sample)
        self.stacks = self._stacks(modules)

    @property
    def module(self) -> nn.Module:
        """The module that computes all branches, for the compiler."""
        return self.template.module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of a network have None in its place

    def __call__(self, shared: Any) -> dict[int, Tensor]:
        """Compute the features of all branches in training mode."""
        self.stacks.load()
        features = self._compute(shared)
        self.stacks.store()
        return features

    def _compute(self, shared: Any) -> dict[int, Tensor]:
        branches = len(self.numbers)
        rows = len(shared[0] if isinstance(shared, tuple) else shared)
        out = self.module(_expanded(shared, branches) if self.expand else shared)
        parts = out.chunk(branches, int(out.shape[0] == rows))
        if out.dim() == 4:  # each part is read by several heads, and a part of a map would be copied by each
            parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        return dict(zip(self.numbers, parts, strict=True))

    def _stacks(self, modules: Sequence[nn.Module]) -> Stacks:
        template = self.template
        return Stacks(modules, template.parameters, template.statistics, template.counters)

    @torch.no_grad()
    def _trial(self, modules: Sequence[nn.Module], sample: Any) -> bool:
        """Learn the layouts. Return whether the input has to be expanded for it."""
        copies, sample = [_changed(module) for module in modules], _double(sample)
        expected = [module(sample) for module in copies]
        self.module.double()
        self.stacks = self._stacks(copies)
        reason = "the outputs of its code differ"
        for self.expand in (False, True):
            try:
                with self.template.learning(len(expected[0])):
                    self.stacks.load()
                    found = list(self._compute(sample).values())
            except (NotBatchableError, RuntimeError, ValueError) as error:
                reason = str(error)
                continue
            if all(_equal(a, b) for a, b in zip(found, expected, strict=True)):
                self.module.float()
                return self.expand
        raise NotBatchableError(f"{type(modules[0]).__name__}: {reason}")


def _check_equal(modules: Sequence[nn.Module]) -> None:
    if len(modules) < 2:
        raise NotBatchableError("there is one branch")
    shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in modules]
    if any(found != shapes[0] or repr(m) != repr(modules[0]) for found, m in zip(shapes, modules, strict=True)):
        raise NotBatchableError("the branches differ in shape")


def _changed(module: nn.Module) -> nn.Module:
    """A copy in float64 with changed parameters, so that equal initial values hide no mistake."""
    changed, generator = copy.deepcopy(module).double().train(), torch.Generator().manual_seed(0)
    for parameter in changed.parameters():
        parameter.add_(
            0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.double).to(parameter.device)
        )
    return changed


def _double(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_double, x))
    return x.double() if x.is_floating_point() else x


def _expanded(x: Any, branches: int) -> Any:
    """The input once for each branch: maps beside each other, `(B, K·C, H, W)`, all else as rows, `(K·B, …)`."""
    if isinstance(x, tuple):
        return tuple(_expanded(part, branches) for part in x)
    return torch.cat([x] * branches, int(x.dim() == 4))


def _equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return float((found - expected).norm()) <= TOLERANCE * float(expected.norm())
