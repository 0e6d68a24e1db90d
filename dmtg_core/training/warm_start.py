"""Networks that start from trained ones: one model for all branches, or a model for each branch.

Gao et al. 2024 start some runs so: from a naive MTL network, every branch a copy of its branch, or from
single-task networks, one a branch. An encoder is a list of stages, so weights find their place by the number of
their stage: where a model was cut into stem and branch does not matter.
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
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel, NetworkSpec
from dmtg_core.tasks import Task


class WarmStart:
    """Trained models, and what of a network starts from which.

    A single model gives the stem, every branch, and on every branch its heads. Of several, model k gives branch k
    and its heads there; the stem is the one that all of them share. Further branches stay as they were drawn, and
    so do the heads of tasks that a branch's model does not have: a head that was trained on the features of one
    model reads noise in those of another. The gate is never changed.

    Copies of one branch are exact, as published: at the first step θ has no gradient, but the gate's noise weighs
    what each copy learns, and they part. Noise on the weights, or new heads on all but one branch, did not lead to
    better groups on the planted problem of the tests.

    A head is taken over where the task's name, kind, channels, units and classes are those it was trained for.

    Args:
        models: One, or at most K.
        names: What messages call them.

    Raises:
        ValueError: For no model.
    """

    def __init__(self, models: Sequence[GroupModel], names: Sequence[str] = ()) -> None:
        if not models:
            raise ValueError("a warm start needs at least one model, got none")
        self.models = tuple(models)
        self.names = tuple(names) or tuple(f"model {i}" for i in range(len(models)))

    @property
    def single(self) -> bool:
        """Whether one model gives every branch."""
        return len(self.models) == 1

    @torch.no_grad()
    def apply(self, network: GroupingNetwork) -> None:
        """Put the weights, and the running statistics that belong to them, into a fresh network.

        Raises:
            ValueError: As `check`.
        """
        self.check(network.spec)
        for k in network.branches:
            model = self._of(k)
            if model is None:
                continue
            for mine, trained in zip(_stages(network, k), _stages(model.network), strict=True):
                mine.load_state_dict(trained.state_dict())
        for k, n in network.pairs:
            model = self._of(k)
            m = None if model is None else _head_for(network.tasks[n], model)
            if model is not None and m is not None:
                network.copy_head((k, n), model.network, (0, m))

    def _of(self, k: int) -> GroupModel | None:
        """What branch `k` starts from; None where it starts fresh."""
        number = 0 if self.single else k
        return self.models[number] if number < len(self.models) else None

    def check(self, spec: NetworkSpec) -> None:
        """Whether a network of this spec can start from the models.

        Raises:
            ValueError: As `check_encoder`; for an input of another kind or shape, a model that has none of the
                tasks, or decoders that differ.
        """
        self.check_encoder(spec.encoder, spec.groups)
        for name, model in zip(self.names, self.models, strict=True):
            _check_input(name, model.spec, spec)
            _check_tasks(name, model.spec, spec)

    def check_encoder(self, encoder: EncoderSpec, groups: int) -> None:
        """The part of `check` for which neither input nor tasks have to be known.

        Raises:
            ValueError: For another encoder, more models than groups, or models whose stems differ.
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
        first = _stages(self.models[0].network)[:stem]
        for name, model in zip(self.names, self.models, strict=True):
            for i, (a, b) in enumerate(zip(first, _stages(model.network)[:stem], strict=True)):
                if not _equal(a, b):
                    raise ValueError(
                        f"the branches share a stem of {stem} stages, but stage {i} of {name} has other weights "
                        f"than that of {self.names[0]}; set network.stem=0, or start from one model"
                    )

    def notes(self, spec: NetworkSpec) -> list[str]:
        """A line for each model: what starts from it, what of it starts fresh, and how its input differs."""
        lines = []
        for k, (name, model) in enumerate(zip(self.names, self.models, strict=True)):
            taken = [task.name for task in spec.tasks if _head_for(task, model) is not None]
            drawn = [task.name for task in spec.tasks if task.name not in taken]
            where = "every branch" if self.single else f"branch {k}"
            line = f"{where} starts from {name} with its heads of {listed(taken) or 'no task'}"
            lines.append(line + (f"; new heads for {listed(drawn)}" if drawn else ""))
            found, wanted = model.spec.input, spec.input
            if (found.mean, found.std) != (wanted.mean, wanted.std):
                lines.append(
                    f"{name} was trained on input normalised by mean {_short(found.mean)} and std "
                    f"{_short(found.std)}; here they are {_short(wanted.mean)} and {_short(wanted.std)}"
                )
        return lines

    def digest(self) -> str:
        """Hex digits that change with every weight."""
        total = hashlib.sha256()
        for model in self.models:
            total.update(json.dumps(model.spec.to_dict(), sort_keys=True).encode())
            for name, tensor in model.state_dict().items():
                total.update(name.encode())
                total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()[:16]


def _stages(network: GroupingNetwork, branch: int = 0) -> list[nn.Module]:
    """The whole encoder of a branch, wherever it is cut."""
    return [*network.stem, *cast("nn.Sequential", network.branches[branch])]


def _equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


def _head_for(task: Task, model: GroupModel) -> int | None:
    """The number of the model's task whose head can be that of `task`."""
    same = ("name", "kind", "channels", "offset", "scale", "labels")
    fits = (all(getattr(own, key) == getattr(task, key) for key in same) for own in model.tasks)
    return next((m for m, fit in enumerate(fits) if fit), None)


def _described(encoder: EncoderSpec) -> str:
    """Name and options, defaults included, without those that only say where pretrained weights come from."""
    build = ENCODERS[encoder.name][0] if encoder.name in ENCODERS else lambda: None
    known = inspect.signature(build).parameters.items()
    defaults = {key: option.default for key, option in known if option.kind == option.KEYWORD_ONLY}
    options = EncoderSpec(encoder.name, 0, defaults | dict(encoder.options or {})).without_weights().options
    # through JSON, as a model's folder has it: tuples become lists
    shown = ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted((options or {}).items()))
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
    """Numbers to read: all of them, or the first three of many."""
    return ", ".join(f"{value:g}" for value in values[:3]) + (", …" if len(values) > 3 else "")
