"""Groups to begin with: tasks that read the same of their input belong together.

One branch is trained for all tasks until the groups that follow from what its heads read (`feature_overlap`) are
at rest, which takes a fraction of a run.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import wide_spec
from dmtg_core.network.encoders import WIDTHS
from dmtg_core.network.grouping_network import NetworkSpec
from dmtg_core.search.feature_overlap import cluster, feature_overlap
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Data
from dmtg_core.training.loop import NO_HOOKS, Hooks, advance
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState

CONVERGED = 0.9  # adjusted Rand index of the groups of two epochs
AFFINITY_COST = 4  # of the branch that tasks are compared in, in units of what all K branches cost


def affinity_plan(spec: NetworkSpec, settings: TrainSettings, most: int) -> tuple[NetworkSpec, TrainSettings]:
    """The network that tasks are compared in, and how it is trained.

    It is one branch that is wide enough for all tasks, if its encoder can be widened: one that is too narrow has
    to choose whom it serves, and shows its choice instead of what the tasks read.

    Args:
        spec: The grouping network.
        settings: How that is trained.
        most: Epochs that tasks are compared for, at most.
    """
    short = replace(settings, epochs=most, search_share=1.0, lr_schedule="constant")
    if spec.encoder.name in WIDTHS:
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
    """Train the network that tasks are compared in until the groups that follow from it have come to rest.

    They have where an epoch moves hardly any task: an adjusted Rand index of `CONVERGED` between two proposals.

    Args:
        state: As `affinity_plan` has it, of any epoch. Its records get what each epoch `proposed`.
        data, context, hooks: As for `advance`.
        settings: As `affinity_plan` gives them.
        groups: How many to propose.
        least: Epochs that it trains at any rate.

    Returns:
        `feature_overlap` `(N, N)` at the end.
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
