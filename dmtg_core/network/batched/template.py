"""The template: a module with the code of one branch that computes K branches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dmtg_core.network.batched.layers import (
    BatchNormRows,
    LayerNorm,
    Linear,
    NotBatchableError,
    RowLayer,
    SelfAttention,
)
from dmtg_core.network.batched.stacks import Slot


class Template:
    """A copy of a branch that computes K branches of its shape, and the places of their parameters.

    Layers with parameters are replaced or changed. Everything else is the code of the branch. It may not mix
    samples or channels, which `BatchedBranches` checks by a trial.

    Args:
        branch: One of the branches. It does not change.
        branches: K.

    Raises:
        NotBatchableError: For a random layer, and for a layer that has no form for K branches.
    """

    def __init__(self, branch: nn.Module, branches: int) -> None:
        self.branches = branches
        self.parameters: list[Slot] = []
        self.statistics: list[Slot] = []
        self.counters: list[str] = []
        self.groups: dict[nn.Module, int] = {}
        self.module: nn.Module = nn.Sequential(copy.deepcopy(branch).train())
        self._change(self.module, "")

    def _change(self, parent: nn.Module, prefix: str) -> None:
        """Change all layers below `parent`."""
        for name, layer in list(parent.named_children()):
            path = f"{prefix}{name}."
            if isinstance(layer, _DropoutNd) and layer.p > 0:
                raise NotBatchableError(f"{type(layer).__name__} ({_shown(path)}) draws random numbers")
            change = next((change for kind, change in CHANGES.items() if isinstance(layer, kind)), None)
            if change is None:
                self._keep(layer, path)
                self._change(layer, path)
                continue
            try:
                setattr(parent, name, change(self, layer, path))
            except NotBatchableError as error:
                raise NotBatchableError(f"{type(layer).__name__} ({_shown(path)}): {error}") from error

    def _keep(self, layer: nn.Module, path: str) -> None:
        """Keep a module with its code. Its own parameters are joined in their last dimension."""
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        if any(True for _ in layer.buffers(recurse=False)) or (own and _of_torch(layer)):
            raise NotBatchableError(f"{type(layer).__name__} ({_shown(path)}) has no form for several branches")
        self._take(layer, path, "last")

    def _take(self, layer: nn.Module, path: str, kind: str) -> None:
        """Let a layer read joined tensors in place of its own parameters."""
        for name, _ in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
            self.parameters.append(Slot(layer, name, path[2:] + name, kind))

    def convolution(self, layer: nn.Conv2d, path: str) -> nn.Module:
        """A convolution, whose groups are set by `learning`."""
        self.groups[layer] = layer.groups
        self._take(layer, path, "concat")
        return layer

    def norm(self, layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm, path: str) -> nn.Module:
        """A norm of K times the channels."""
        self._take(layer, path, "concat")
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups, layer.num_channels = (
                layer.num_groups * self.branches,
                layer.num_channels * self.branches,
            )
            return layer
        if layer.momentum is None or not layer.track_running_stats:
            raise NotBatchableError("statistics without a momentum")
        layer.num_features *= self.branches
        self.counters.append(path[2:] + "num_batches_tracked")
        layer.num_batches_tracked = None
        self.statistics += [
            Slot(layer, name, path[2:] + name, "concat") for name in ("running_mean", "running_var")
        ]
        return layer

    def rows_norm(self, layer: nn.BatchNorm1d, path: str) -> nn.Module:
        """A norm of vectors."""
        changed = BatchNormRows(layer, self.branches)
        self.norm(layer, path)
        return changed

    def row_layer(self, layer: nn.Linear | nn.LayerNorm, path: str) -> nn.Module:
        """A linear layer or a layer norm."""
        changed: Any
        if isinstance(layer, nn.Linear):
            changed = Linear.of(layer, self.branches)
        else:
            changed = LayerNorm.of(layer, self.branches)
        for name, _ in layer.named_parameters():
            self.parameters.append(Slot(changed, name, path[2:] + name, changed.KINDS[name]))
        return changed

    def attention(self, layer: nn.MultiheadAttention, path: str) -> nn.Module:
        """The attention of tokens to themselves."""
        if layer.dropout > 0:
            raise NotBatchableError("its dropout draws random numbers")
        changed = SelfAttention(layer, self.branches)
        for name, _ in layer.named_parameters():
            target, kind = changed.KINDS[name]
            inner, attribute = target.split(".")
            self.parameters.append(Slot(getattr(changed, inner), attribute, path[2:] + name, kind))
        return changed

    @contextmanager
    def learning(self, rows: int) -> Iterator[None]:
        """Set the layout of every layer by a pass of `rows` samples inside."""

        def see(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x: Tensor = inputs[0]
            if isinstance(layer, RowLayer):
                layer.see(x, rows)
            elif isinstance(layer, nn.Conv2d):
                self._see_convolution(layer, x.shape[1])

        layers = [m for m in self.module.modules() if isinstance(m, RowLayer | nn.Conv2d)]
        hooks = [layer.register_forward_pre_hook(see) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see_convolution(self, layer: nn.Conv2d, channels: int) -> None:
        """A convolution of a shared input has K times the outputs, and any other K times the groups."""
        if channels == layer.in_channels and self.groups[layer] > 1:
            raise NotBatchableError("a convolution with groups of a shared input")
        layer.groups = 1 if channels == layer.in_channels else self.branches * self.groups[layer]


CHANGES: Mapping[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: Template.convolution,
    nn.BatchNorm2d: Template.norm,
    nn.GroupNorm: Template.norm,
    nn.BatchNorm1d: Template.rows_norm,
    nn.Linear: Template.row_layer,
    nn.LayerNorm: Template.row_layer,
    nn.MultiheadAttention: Template.attention,
}


def _of_torch(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("torch.nn.")


def _shown(path: str) -> str:
    """Name of a layer in its branch, from the path of the template."""
    return path[2:].rstrip(".") or "the branch"
