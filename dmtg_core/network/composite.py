"""`Composite`: the models of several groups as one network; `plain`: a model whose weights are all its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from dmtg_core.network.adapters import AdapterBranch, merged_state
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel


class Composite(nn.Module):
    """The models of several groups, with one input.

    Models with the same frozen stem compute it once. If their branches are low-rank updates of one rank, one pass
    computes all of them.

    Args:
        models: At least one model.
    """

    def __init__(self, models: Iterable[GroupModel]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.tasks = tuple(task for model in self._held for task in model.tasks)
        first, *others = (model.network for model in self._held)
        self.one_stem = bool(first.frozen) and all(
            other.stem is first.stem and other.spec.input == first.spec.input for other in others
        )
        self.one_pass = self.one_stem and first.shared is not None and self._one_scale()

    @property
    def _held(self) -> list[GroupModel]:
        return cast("list[GroupModel]", list(self.models))

    def _one_scale(self) -> bool:
        """Whether all branches are updates of the same stages with one rank and scale."""
        networks = [model.network for model in self._held]
        branches = [network.branches[0] for network in networks]
        kinds = {(b.scale, b.rank) for b in branches if isinstance(b, AdapterBranch)}
        return len(kinds) == 1 and len({id(network.shared) for network in networks}) == 1

    def forward(self, raw: Tensor) -> dict[str, Tensor]:
        """Compute task name → output from stored input `(B, …)`, as `GroupModel.forward`."""
        networks = [model.network for model in self._held]
        if self.one_stem:
            computed = networks[0].in_parts(lambda part: self._features(part, networks), raw)
        else:
            computed = [network.features(raw)[0] for network in networks]
        return {
            task.name: network.head(0, n, features, network.size)
            for network, features in zip(networks, computed, strict=True)
            for n, task in enumerate(network.tasks)
        }

    def _features(self, raw: Tensor, networks: list[GroupingNetwork]) -> list[Tensor]:
        """The features of each group, from one stem."""
        branches, stages = [network.branches[0] for network in networks], networks[0].shared
        shared = networks[0].output_of_stem(raw)
        if self.one_pass and stages is not None:
            return stages(shared, branches)
        return [branch(shared) for branch in branches]

    @torch.no_grad()
    def predict(self, raw: Tensor) -> dict[str, Tensor]:
        """Compute decoded predictions from stored input. See `Task.decode`."""
        outputs = self(raw)
        return {task.name: task.decode(outputs[task.name]) for task in self.tasks}


def plain(model: GroupModel) -> GroupModel:
    """Return a model with the same outputs up to rounding, in which nothing is frozen and updates are merged.

    Its branch is a copy of the stages of the encoder. All of its weights are its own.
    """
    trained = model.network
    encoder = replace(trained.spec.encoder.without_weights(), branch="copy", adapter=None)
    made = GroupModel(replace(model.spec, encoder=encoder))
    branch, shared = trained.branches[0], trained.shared
    made.network.stem.load_state_dict(trained.stem.state_dict())
    state = branch.state_dict()
    if isinstance(branch, AdapterBranch) and shared is not None:
        state = merged_state(shared, branch)
    made.network.branches[0].load_state_dict(state)
    for n in range(len(model.tasks)):
        made.network.copy_head((0, n), trained, (0, n))
    return made.train(model.training)


def library_state(network: GroupingNetwork) -> dict[str, Tensor]:
    """Return the weights of an encoder of another library, in the names of the library's model.

    Args:
        network: The network of a `plain` model.

    Returns:
        Name → tensor; empty for an encoder of our own.
    """
    state: dict[str, Tensor] = {}
    for stages in (network.stem, network.branches[0]):
        for module in stages.modules():
            name = getattr(module, "library_name", None)
            if name is not None:
                own = {key: tensor for key, tensor in module.state_dict().items() if "." not in key}
                state |= {f"{name}.{key}".lstrip("."): tensor for key, tensor in own.items()}
    return state
