"""Stacked parameters and running statistics of K modules of equal shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Kind(NamedTuple):
    """How K tensors of equal shape are joined, and how the joined tensor, or its gradient, is split into views."""

    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor, int], Sequence[Tensor]]


KINDS: Mapping[str, Kind] = {
    "concat": Kind(torch.cat, lambda x, k: x.chunk(k)),  # (C, …) → (K·C, …)
    "last": Kind(lambda xs: torch.cat(xs, -1), lambda x, k: x.chunk(k, -1)),  # (…, F) → (…, K·F)
    "stack": Kind(torch.stack, lambda x, _k: x.unbind()),  # (…) → (K, …)
    "row": Kind(lambda xs: torch.stack(xs).unsqueeze(1), lambda x, _k: x.squeeze(1).unbind()),  # (F) → (K, 1, F)
}


class Slot(NamedTuple):
    """Where a module reads a joined tensor: attribute `name` of `holder`.

    Args:
        path: Name of the parameter or buffer in each of the K modules.
        kind: A key of `KINDS`.
    """

    holder: nn.Module
    name: str
    path: str
    kind: str


class Stacks:
    """The parameters of K modules, joined for each pass, and their running statistics.

    The joined tensors are copies that each pass fills again with one operator. The modules, their states, an
    optimiser and data-parallel training know nothing of them. The gradient of a parameter is a view of the
    gradient of the joined tensor.

    Args:
        modules: The K modules.
        parameters, statistics: The places that read the joined tensors.
        counters: Names of counters that a pass increments.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[Slot],
        statistics: Sequence[Slot],
        counters: Sequence[str],
    ) -> None:
        self.branches, self.slots = len(modules), list(parameters)
        named = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in modules]
        owned = [[held[slot.path] for held in named] for slot in parameters]
        self.parameters = [p for ps in owned for p in ps]
        with torch.no_grad():
            self.joined = [KINDS[s.kind].join(ps) for s, ps in zip(parameters, owned, strict=True)]
        # views without the version counter: two passes before a backward pass write the same values
        self.views = self._views(parameters, [joined.data for joined in self.joined])
        self.statistics = [held[slot.path] for slot in statistics for held in named]
        sums = [torch.cat([held[slot.path] for held in named]) for slot in statistics]
        for slot, joined in zip(statistics, sums, strict=True):
            setattr(slot.holder, slot.name, joined)
        self.statistics_views = self._views(statistics, sums)
        self.counters = [held[path] for path in counters for held in named]

    def _views(self, slots: Sequence[Slot], joined: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(slots, joined, strict=True)
        return [view for slot, tensor in pairs for view in KINDS[slot.kind].split(tensor, self.branches)]

    def load(self) -> None:
        """Join parameters and statistics, and set them where they are read."""
        for slot, tensor in zip(self.slots, _Join.apply(self, *self.parameters), strict=True):
            slot.holder.__dict__[slot.name] = tensor
        if self.statistics:
            torch._foreach_copy_(self.statistics_views, self.statistics)

    def store(self) -> None:
        """Return the statistics of a pass to the modules."""
        if self.statistics:
            torch._foreach_copy_(self.statistics, self.statistics_views)
        if self.counters:
            torch._foreach_add_(self.counters, 1)


class _Join(torch.autograd.Function):
    """The joined parameters, as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, stacks: Stacks, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.stacks = stacks
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        torch._foreach_copy_(stacks.views, parameters)
        return tuple(joined.data for joined in stacks.joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors is not None  # torch raises an error if a parameter was changed after the pass
        stacks: Stacks = ctx.stacks
        out: list[Tensor | None] = []
        for slot, gradient in zip(stacks.slots, gradients, strict=True):
            if gradient is None:
                out += [None] * stacks.branches
            else:
                out += KINDS[slot.kind].split(gradient, stacks.branches)
        return (None, *out)
