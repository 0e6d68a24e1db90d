"""Affinity phase: proposed groups from the feature overlap of the tasks in one network.

One branch is trained for all tasks until the groups that follow from the feature overlap have converged. This
takes a fraction of a run.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import wide_spec
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.feature_overlap import cluster, feature_overlap
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Data
from dmtg_core.training.loop import NO_HOOKS, Hooks, advance
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState

CONVERGED = 0.9  # adjusted Rand index of the groups of two epochs from which they have converged
AFFINITY_COST = 4  # inference cost of the network of this phase, in units of that of all K branches


def affinity_plan(spec: NetworkSpec, settings: TrainSettings, most: int) -> tuple[NetworkSpec, TrainSettings]:
    """Return the network of the affinity phase and its training settings.

    It is one branch, wide enough for all tasks if the encoder can be widened. In a branch that is too narrow, the
    features of some tasks displace those of others, which changes the overlap.

    Args:
        spec: The grouping network.
        settings: Training settings of the grouping network.
        most: Largest number of epochs of the phase.
    """
    short = replace(settings, epochs=most, search_share=1.0, lr_schedule="constant", patience=0)
    if spec.encoder.can_widen:
        return wide_spec(spec, AFFINITY_COST), short
    return replace(spec, groups=1, sampling="fixed"), short


def compare_tasks(
    state: TrainState,
    data: Data,
    settings: TrainSettings,
    context: TrainContext,
    *,
    groups: int,
    least: int,
    hooks: Hooks = NO_HOOKS,
) -> Tensor:
    """Train the network of the affinity phase until the proposed groups have converged.

    They have converged if the adjusted Rand index of the groups of two epochs is at least `CONVERGED`.

    Args:
        state: State of the network of `affinity_plan`, at any epoch. The proposed groups of each epoch are added
            to its record as `proposed`.
        data, context, hooks: As for `advance`.
        settings: Settings of `affinity_plan`.
        groups: Number of groups to propose.
        least: Smallest number of epochs.

    Returns:
        `feature_overlap` `(N, N)` after the last epoch.
    """
    names = [task.name for task in state.network.tasks]

    def overlap() -> Tensor:
        return feature_overlap(state.network, data, context=context)

    def propose(trained: TrainState) -> None:
        trained.history[-1]["proposed"] = cluster(overlap(), groups)
        hooks.on_epoch(trained)

    def converged(trained: TrainState) -> bool:
        if trained.epoch < max(least, 2):
            return False
        before, now = (Grouping.from_assignment(names, r["proposed"]) for r in trained.history[-2:])
        return now.adjusted_rand_index(before) >= CONVERGED

    advance(
        state,
        data,
        settings,
        context,
        until=settings.epochs,
        hooks=replace(hooks, on_epoch=propose, should_stop=converged),
    )
    return overlap()
