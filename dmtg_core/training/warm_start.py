"""Warm start: initialise a network from trained models, one model for all branches or a model for each branch.

Gao et al. 2024 start some runs from a naive MTL network, whose branch is copied to all branches, or from
single-task networks, one for each branch. An encoder is a list of stages. Weights are copied stage by stage, so
the size of the stem may differ.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from dmtg_core.names import listed
from dmtg_core.network.encoders import ENCODERS, EncoderSpec
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.tasks import Task


class WarmStart:
    """Trained models for the initialisation of a network.

    A single model initialises the stem, all branches, and its heads on all branches. Of several models, model k
    initialises branch k and its heads there, and the stem is common to all models. Further branches keep their
    random weights. So do the heads of tasks that a branch's model does not have: a head that was trained on the
    features of one model cannot use those of another. The gate does not change.

    Copies of one branch are exact, as published. θ has no gradient in the first step, but the gate's noise weights
    the gradients of the copies differently, and they diverge. Noise on the weights, or new heads on all but one
    branch, did not lead to better groups on the planted problem of the tests.

    A head is copied if the task's name, kind, channels, units and classes are the same.

    Args:
        models: One model, or at most K models.
        names: Names of the models in messages.

    Raises:
        ValueError: If there is no model.
    """

    def __init__(self, models: Sequence[GroupModel], names: Sequence[str] = ()) -> None:
        if not models:
            raise ValueError("a warm start needs at least one model, got none")
        self.models = tuple(models)
        self.names = tuple(names) or tuple(f"model {i}" for i in range(len(models)))

    @property
    def single(self) -> bool:
        """Whether one model initialises all branches."""
        return len(self.models) == 1

    def is_grouping(self, tasks: Sequence[Task]) -> bool:
        """Whether there are several models, which have each of the tasks once."""
        names = [task.name for model in self.models for task in model.network.tasks]
        return not self.single and sorted(names) == sorted(task.name for task in tasks)

    @torch.no_grad()
    def apply(self, network: GroupingNetwork) -> None:
        """Copy weights and running statistics into a fresh network.

        Raises:
            ValueError: As `check`.
        """
        self.check(network.spec)
        for k in network.branches:
            model = self._of(k)
            if model is None:
                continue
            if model.network.frozen_digest != network.frozen_digest:
                raise ValueError(f"{self.names[self.models.index(model)]} was trained on other frozen weights")
            for mine, trained in zip(_trained(network, k), _trained(model.network), strict=True):
                mine.load_state_dict(trained.state_dict())
        for k, n in network.pairs:
            model = self._of(k)
            m = None if model is None else _head_for(network.tasks[n], model)
            if model is not None and m is not None:
                network.copy_head((k, n), model.network, (0, m))

    def _of(self, k: int) -> GroupModel | None:
        """Model of branch `k`; None if the branch keeps its random weights."""
        number = 0 if self.single else k
        return self.models[number] if number < len(self.models) else None

    def check(self, spec: NetworkSpec) -> None:
        """Check that a network of this spec can start from the models.

        Raises:
            ValueError: As `check_encoder`, and for an input of another kind or shape, a model with none of the
                tasks, or different decoders.
        """
        self.check_encoder(spec.encoder, spec.groups)
        for name, model in zip(self.names, self.models, strict=True):
            _check_input(name, model.spec, spec)
            _check_tasks(name, model.spec, spec)

    def check_encoder(self, encoder: EncoderSpec, groups: int) -> None:
        """Run the part of `check` that needs neither input nor tasks.

        Raises:
            ValueError: For another encoder, more models than groups, or models with different stems.
        """
        if len(self.models) > groups:
            raise ValueError(
                f"{len(self.models)} models do not fit {groups} branches, a model each: {listed(self.names)}; "
                f"set network.groups={len(self.models)} or more"
            )
        wanted = _described(encoder)
        for name, model in zip(self.names, self.models, strict=True):
            found = _described(model.spec.encoder)
            if found != wanted:
                raise ValueError(f"{name} has the encoder {found}, the network {wanted}; they must be the same")
        self._check_stems(encoder.stem)

    def _check_stems(self, stem: int) -> None:
        if self.models[0].network.frozen:
            for name, model in zip(self.names, self.models, strict=True):
                if model.network.frozen_digest != self.models[0].network.frozen_digest:
                    raise ValueError(f"{name} was trained on other frozen weights than {self.names[0]}")
            return  # `apply` compares them with those of the network
        first = _stages(self.models[0].network)[:stem]
        for name, model in zip(self.names, self.models, strict=True):
            for i, (a, b) in enumerate(zip(first, _stages(model.network)[:stem], strict=True)):
                if not _equal(a, b):
                    raise ValueError(
                        f"the branches share a stem of {stem} stages, but stage {i} of {name} has other weights "
                        f"than that of {self.names[0]}; set network.stem=0, or start from one model"
                    )

    def notes(self, spec: NetworkSpec) -> list[str]:
        """Return lines for each model: the parts that start from it, new heads, and differences of the input."""
        lines = []
        for k, (name, model) in enumerate(zip(self.names, self.models, strict=True)):
            taken = [task.name for task in spec.tasks if _head_for(task, model) is not None]
            fresh = [task.name for task in spec.tasks if task.name not in taken]
            where = "every branch" if self.single else f"branch {k}"
            line = f"{where} starts from {name} with its heads of {listed(taken) or 'no task'}"
            lines.append(line + (f"; new heads for {listed(fresh)}" if fresh else ""))
            found, wanted = model.spec.input, spec.input
            if (found.quantiles, found.codes) != (wanted.quantiles, wanted.codes):
                lines.append(f"{name} was trained on input normalised by other quantiles")
            elif (found.mean, found.std) != (wanted.mean, wanted.std):
                lines.append(
                    f"{name} was trained on input normalised by mean {_short(found.mean)} and std "
                    f"{_short(found.std)}; here they are {_short(wanted.mean)} and {_short(wanted.std)}"
                )
        return lines

    def digest(self) -> str:
        """Return a hash of all specs and weights in hex digits."""
        total = hashlib.sha256()
        for model in self.models:
            total.update(json.dumps(model.spec.to_dict(), sort_keys=True).encode())
            for name, tensor in model.state_dict().items():
                total.update(name.encode())
                total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()[:16]


def _stages(network: GroupingNetwork, branch: int = 0) -> list[nn.Module]:
    """Return all stages of a branch's encoder, stem included."""
    return [*network.stem, *cast("nn.Sequential", network.branches[branch])]


def _trained(network: GroupingNetwork, branch: int = 0) -> list[nn.Module]:
    """Return the parts of a branch's encoder that are trained: all stages, or those that are not frozen."""
    return [network.branches[branch]] if network.frozen else _stages(network, branch)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


def _head_for(task: Task, model: GroupModel) -> int | None:
    """Return the number of the model's task whose head fits `task`, or None."""
    same = ("name", "kind", "channels", "offset", "scale", "labels")
    fits = (all(getattr(own, key) == getattr(task, key) for key in same) for own in model.tasks)
    return next((m for m, fit in enumerate(fits) if fit), None)


def _described(encoder: EncoderSpec) -> str:
    """Describe name and options of an encoder, with defaults and without the source of pretrained weights."""
    build = ENCODERS[encoder.name][0] if encoder.name in ENCODERS else lambda: None
    known = inspect.signature(build).parameters.items()
    defaults = {key: option.default for key, option in known if option.kind == option.KEYWORD_ONLY}
    options = EncoderSpec(encoder.name, 0, defaults | dict(encoder.options or {})).without_weights().options
    # through JSON, as in the folder of a model: tuples become lists
    values = encoder.to_dict()
    values = {**(options or {}), **{key: values[key] for key in ("branch", "adapter") if key in values}}
    shown = ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(values.items()))
    return f"{encoder.name}({shown})"


def _check_input(name: str, trained: NetworkSpec, spec: NetworkSpec) -> None:
    found, wanted = (
        f"{i.kind} of shape {i.shape}" + (f" and {i.vocabulary} ids" if i.vocabulary else "")
        for i in (trained.input, spec.input)
    )
    if found != wanted:
        raise ValueError(f"{name} reads {found}, the network {wanted}; they must be the same")


def _check_tasks(name: str, trained: NetworkSpec, spec: NetworkSpec) -> None:
    known = [task.name for task in trained.tasks]
    common = [task for task in spec.tasks if task.name in known]
    if not common:
        raise ValueError(
            f"{name} has none of the tasks: it was trained for {listed(known)}, the network is for "
            f"{listed(task.name for task in spec.tasks)}"
        )
    found, wanted = (f"{s.decoder!r} of width {s.decoder_width}" for s in (trained, spec))
    dense = [task.name for task in common if task.dense]
    if dense and found != wanted:
        raise ValueError(
            f"{name} has a decoder {found} for {listed(dense)}, the network {wanted}; "
            "set network.decoder and network.decoder_width to those of the model"
        )


def _short(values: Sequence[float]) -> str:
    """Format numbers: all of them, or the first three of many."""
    return ", ".join(f"{value:g}" for value in values[:3]) + (", …" if len(values) > 3 else "")
