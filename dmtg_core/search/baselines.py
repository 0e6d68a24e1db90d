"""What a search is compared with, on equal footing: the same encoder, heads, epochs, optimiser and order of data.

All of them are hard networks whose groups are fixed before training. Their cost is in units of one naive-MTL run:
one branch for all tasks, trained for all epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from torch import Tensor

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import inference_cost, naive_flops, training_flops
from dmtg_core.network.grouping_network import GroupingNetwork, NetworkSpec
from dmtg_core.search.distillation import distil, distillation_state
from dmtg_core.search.gradient_affinity import DIRECTIONS, GradientAffinities, projected_affinity
from dmtg_core.training.context import LocalContext, TrainContext
from dmtg_core.training.data import Data
from dmtg_core.training.loop import NO_HOOKS, Hooks, advance, evaluate, generalisation_gap
from dmtg_core.training.metrics import Metrics
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState

BATCHES = 2  # batches of every epoch that gradients are compared on


@dataclass(frozen=True)
class Trained:
    """A network that was trained with its groups fixed.

    Args:
        network: With the weights of its best epoch by validation, in evaluation mode.
        score: Mean logarithm of its validation losses at that epoch.
        metrics: Split → task → metric → value.
        cost: In units of one naive-MTL run.
        gap: `generalisation_gap` of its last epoch on labels alone.
    """

    network: GroupingNetwork
    score: float
    metrics: dict[str, Metrics]
    cost: float
    gap: float


def together(spec: NetworkSpec) -> Grouping:
    """All tasks in one group."""
    return Grouping.of([[task.name for task in spec.tasks]])


def hard_network(spec: NetworkSpec, grouping: Grouping) -> GroupingNetwork:
    """A fresh network with a branch for each group of a grouping, whatever number of groups the spec has."""
    network = GroupingNetwork(replace(spec, groups=len(grouping.groups), sampling="fixed"))
    network.keep_grouping(grouping)
    return network


def train_hard(
    network: GroupingNetwork,
    data: Data,
    settings: TrainSettings,
    *,
    splits: Sequence[str] = ("val", "test"),
    context: TrainContext | None = None,
    on_epoch: Callable[[TrainState], None] | None = None,
    unit: int = 0,
) -> Trained:
    """Train a network without a gate to its end.

    Args:
        network: As `hard_network` makes one.
        settings: `search_share` plays no part.
        splits: What it is evaluated on at the end; the best epoch is chosen on "val".
        on_epoch: Called after every epoch.
        unit: `naive_flops` of the spec; by default that of the network's own.

    Raises:
        NonFiniteLossError: When the loss stops being finite.
    """
    context = context or LocalContext()
    whole = replace(settings, search_share=1.0)  # every epoch may be the best one
    state = TrainState.fresh(network.to(context.device), whole)
    cost = training_flops(network) / (unit or naive_flops(network.spec))
    advance(state, data, whole, context, until=whole.epochs, hooks=Hooks(on_epoch) if on_epoch else NO_HOOKS)
    state.take_best()
    metrics = {split: evaluate(state.network, data, split, context=context) for split in splits}
    return Trained(state.network.eval(), state.best_score, metrics, cost, generalisation_gap(state.history[-1]))


def train_distilled(
    specs: Sequence[NetworkSpec],
    data: Data,
    settings: TrainSettings,
    longer: TrainSettings,
    *,
    splits: Sequence[str] = ("val", "test"),
    unit: int = 0,
) -> Trained:
    """Networks of one group each; the best of them on validation learns on from all, as a search's best does.

    Args:
        specs: The networks, which differ in their seeds.
        settings: Of each of them.
        longer: Of what follows, see `SearchOptions.distilled`.
        splits, unit: As for `train_hard`.

    Raises:
        NonFiniteLossError: When the loss stops being finite.
    """
    trained = [
        train_hard(hard_network(spec, together(spec)), data, settings, splits=("val",), unit=unit)
        for spec in specs
    ]
    teachers, best = [one.network for one in trained], min(trained, key=lambda one: one.score)
    context = LocalContext()
    state = distillation_state(best.network, best.score, longer)
    distil(state, teachers, data, longer, context, gap=best.gap)
    step = training_flops(state.network) + sum(inference_cost(teacher).flops for teacher in teachers)
    cost = step * longer.epochs / (settings.epochs * (unit or naive_flops(specs[0])))
    metrics = {split: evaluate(state.network, data, split, context=context) for split in splits}
    cost += sum(one.cost for one in trained)
    return Trained(state.network.eval(), state.best_score, metrics, cost, best.gap)


def train_naive_with_affinities(
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    *,
    splits: Sequence[str] = ("val", "test"),
    context: TrainContext | None = None,
) -> tuple[Trained, dict[str, Tensor], dict[str, float]]:
    """Naive MTL, the affinities that published selectors collect on its way, and what each of them costs.

    CS, TAG and ETAP look at `BATCHES` batches at the end of every epoch, Grad-TAG at two larger ones at the end of
    the run. The looks change nothing in the run.

    Returns:
        The network; affinities `(N, N)` by the names "cs", "tag", "etap", "gradtag"; the cost of each beside the
        run, in units of it, counted as forward passes (one for going forward, two for going backward).
    """
    gradients = GradientAffinities(spec.tasks)
    samples = 0

    def measure(state: TrainState) -> None:
        nonlocal samples
        rate = state.optimizer.param_groups[0]["lr"]
        for batch in islice(data.train(state.epoch, settings.batch_size), BATCHES):
            gradients.update(state.network, batch, rate)
            samples += len(batch.inputs)

    naive = train_hard(
        hard_network(spec, together(spec)), data, settings, splits=splits, context=context, on_epoch=measure
    )
    rows = 4 * settings.batch_size
    train, val = next(iter(data.train(0, rows))), next(iter(data.evaluate("val", rows)))
    found = gradients.means() | {"gradtag": projected_affinity(naive.network, train, val)}
    count = len(spec.tasks)
    passes = 3 * data.steps(settings.batch_size) * settings.batch_size * settings.epochs  # of the run itself
    costs = {
        "cs": samples * (1 + 2 * count) / passes,
        "tag": samples * (1 + 3 * count) / passes,
        "etap": samples * (1 + 2 * count) / passes,
        "gradtag": 2 * DIRECTIONS * (len(train.inputs) + len(val.inputs)) / passes,
    }
    return naive, found, costs
