"""Training for an estimator: the split for validation, the settings, and the search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmtg_core.grouping import Grouping
from dmtg_core.input_spec import InputSpec
from dmtg_core.network.encoders import EncoderSpec
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.network.threads import threads_of_step
from dmtg_core.search.search import search
from dmtg_core.tasks import Task
from dmtg_core.training.context import LocalContext
from dmtg_core.training.data import ArrayData, Arrays
from dmtg_core.training.loop import fit
from dmtg_core.training.settings import TrainSettings

SEARCHES = ("guided", "dmtg", "none")
GATE_RATE = 0.02  # learning rate of the gate
DRAWS = 100  # of a split in which every target has labels in both parts
BATCH = 1024  # rows of a prediction that are computed at a time


def split_rows(known: Sequence[np.ndarray], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation rows, drawn at random so that every target has a label in both.

    Args:
        known: For each target, bool `(n,)`: whether a row has a label.
        fraction: Share of the validation rows; at least one row is for validation, and one for training.
        seed: Seed of the draw.

    Raises:
        ValueError: If the labels are too few.
    """
    rng, rows = np.random.default_rng(seed), len(known[0])
    count = min(max(round(fraction * rows), 1), rows - 1)
    there = np.stack(known)
    for _ in range(DRAWS):
        order = rng.permutation(rows)
        train, val = np.sort(order[count:]), np.sort(order[:count])
        if there[:, train].any(1).all() and there[:, val].any(1).all():
            return train, val
    raise ValueError(
        f"a target has too few labels to be in both parts, of {rows - count} rows for training and {count} for "
        "validation: pass more labels, or a larger validation_fraction"
    )


def arrays_of(
    inputs: np.ndarray, labels: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray], rows: np.ndarray
) -> Arrays:
    """Some rows as samples."""
    return Arrays(
        inputs[rows],
        {name: values[rows] for name, values in labels.items()},
        {name: there[rows] for name, there in known.items() if not there.all()},
    )


def train(
    method: str,
    spec: NetworkSpec,
    splits: Mapping[str, Arrays],
    settings: TrainSettings,
    on_record: Callable[[Mapping[str, Any]], None] | None,
) -> tuple[Grouping, list[GroupModel]]:
    """Find groups and train them.

    Args:
        method: One of `SEARCHES`.
        spec: The network.
        splits: Samples of "train" and "val".
        settings: Settings of each training.
        on_record: Called with the metrics of each epoch.

    Returns:
        The grouping, and one model for each of its groups, in its order and on the CPU.
    """
    context = LocalContext(on_record=on_record)
    data = ArrayData(splits, spec.tasks, seed=settings.seed, device=context.device)
    if method == "guided" and spec.groups > 1:
        network = search(spec, data, settings, baseline=False, splits=(), context=context).network
    else:
        network = fit(GroupingNetwork(spec), data, settings, context).network
    models = network.cpu().eval().specialise().values()
    grouping = network.grouping()
    return grouping, [model.eval().requires_grad_(requires_grad=False) for model in models]


def network_spec(
    method: str, given: InputSpec, tasks: Sequence[Task], encoder: EncoderSpec, groups: int, seed: int
) -> NetworkSpec:
    """The network: one branch without a search, otherwise at most one for each task."""
    count = 1 if method == "none" else min(groups, len(tasks))
    return NetworkSpec(
        given, tuple(tasks), encoder, count, sampling="gumbel" if count > 1 else "fixed", seed=seed
    )  # fmt: skip


@torch.no_grad()
def outputs(models: Sequence[GroupModel], stored: np.ndarray) -> dict[str, Tensor]:
    """The outputs of all tasks, in network units.

    Args:
        models: The models of the groups.
        stored: float32 `(n, F)`.
    """
    found: dict[str, Tensor] = {}
    for model in models:
        with threads_of_step(model.network, min(len(stored), BATCH)):
            parts = [model(torch.from_numpy(rows)) for rows in np.split(stored, range(BATCH, len(stored), BATCH))]
        found |= {task.name: torch.cat([part[task.name] for part in parts]) for task in model.tasks}
    return found
