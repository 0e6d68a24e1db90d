"""Baselines of a search, with the same encoder, heads, epochs, optimiser and order of data.

All baselines are hard networks whose groups are fixed before training. Their cost is in runs of naive MTL: one
branch for all tasks, trained for all epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import inference_cost, naive_flops, training_flops, wide_spec
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.budget import Budget
from dmtg_core.search.distillation import distil, distillation_state
from dmtg_core.search.extendable import complete, extend, patience_of
from dmtg_core.search.feature_overlap import cluster, feature_overlap, overlap_spec, propose_until_stable
from dmtg_core.search.gradient_affinity import DIRECTIONS, GradientAffinities, projected_affinity
from dmtg_core.search.options import DISTILLED
from dmtg_core.training.checkpoint import load_tensors, save_tensors
from dmtg_core.training.context import LocalContext, Save, TrainContext
from dmtg_core.training.data import Data
from dmtg_core.training.loop import (
    advance,
    evaluate_splits,
    generalisation_gap,
    reporting,
    rows_evaluated,
)
from dmtg_core.training.metrics import Metrics
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState

ROUNDING = 1e-9  # of a quotient that is a whole number of epochs
AFFINITIES, OVERLAPS = "affinities.safetensors", "overlaps.safetensors"  # in the checkpoints of their training
BATCHES = 2  # batches of each epoch for the comparison of gradients


@dataclass(frozen=True)
class Trained:
    """A trained network with fixed groups.

    Args:
        network: The network with the weights of the best validation epoch, in evaluation mode.
        score: Validation score (mean logarithm of the losses) of that epoch.
        metrics: Split → task → metric → value.
        cost: Training cost in runs of naive MTL.
        gap: `generalisation_gap` of the last epoch with labels alone.
    """

    network: GroupingNetwork
    score: float
    metrics: dict[str, Metrics]
    cost: float
    gap: float


def together(spec: NetworkSpec) -> Grouping:
    """Return the grouping with all tasks in one group."""
    return Grouping.of([[task.name for task in spec.tasks]])


def hard_network(spec: NetworkSpec, grouping: Grouping) -> GroupingNetwork:
    """Build a network with a branch for each group of a grouping. The number of groups of the spec is ignored."""
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
    on_epoch: Callable[[TrainState], None] = lambda _state: None,
    also: Save = lambda _folder: None,
    unit: int = 0,
) -> Trained:
    """Train a network with fixed groups for its epochs. It resumes from the context's latest checkpoint.

    Args:
        network: A network of `hard_network`.
        settings: Training settings. `search_share` is ignored.
        splits: Splits of the evaluation after training. The best epoch is selected on "val".
        on_epoch: Called after each epoch, before its checkpoint is written.
        also: See `reporting`.
        unit: Unit of the cost, `naive_flops` of a spec. The default is that of the network's own spec.

    Raises:
        NonFiniteLossError: If the loss is not finite.
        ValueError: If the checkpoint is damaged.
    """
    context = context or LocalContext()
    whole = replace(settings, search_share=1.0)  # all epochs are candidates for the best
    reports = reporting(context, also)

    def epoch_ended(state: TrainState) -> None:
        on_epoch(state)
        reports.on_epoch(state)

    state = TrainState.begin(network, whole, context)
    cost = training_flops(network) / (unit or naive_flops(network.spec))  # of all epochs
    advance(state, data, whole, context, until=whole.epochs, hooks=replace(reports, on_epoch=epoch_ended))
    state.take_best()
    metrics = evaluate_splits(state.network, data, splits, settings, context)
    cost *= state.epoch / whole.epochs
    return Trained(state.network.eval(), state.best_score, metrics, cost, generalisation_gap(state.history[-1]))


def train_within(
    network: GroupingNetwork,
    data: Data,
    settings: TrainSettings,
    runs: float,
    *,
    splits: Sequence[str] = ("val", "test"),
    context: TrainContext | None = None,
    unit: int = 0,
) -> Trained:
    """Train a network with fixed groups while validation improves and the budget lasts, as the search does.

    It resumes from the context's latest checkpoint.

    Args:
        network: A network of `hard_network`.
        settings: Training settings. `epochs` is the length of a run of naive MTL.
        runs: Budget in runs of naive MTL. At least one epoch is trained.
        splits, context, unit: As for `train_hard`.

    Raises:
        NonFiniteLossError: If the loss is not finite.
        ValueError: If the checkpoint is damaged.
    """
    context = context or LocalContext()
    whole = replace(settings, search_share=1.0)
    state = TrainState.begin(network, whole, context)
    epoch = training_flops(network) / (unit or naive_flops(network.spec)) / settings.epochs
    most = max(int(runs / epoch + ROUNDING), 1)
    complete(state, data, whole, context, most=most, hooks=reporting(context))
    metrics = evaluate_splits(state.network, data, splits, settings, context)
    gap = generalisation_gap(state.history[-1])
    return Trained(state.network.eval(), state.best_score, metrics, epoch * len(state.history), gap)


def train_distilled(
    specs: Sequence[NetworkSpec],
    data: Data,
    settings: TrainSettings,
    runs: float,
    *,
    splits: Sequence[str] = ("val", "test"),
    contexts: Callable[[str], TrainContext] = lambda _stage: LocalContext(),
    unit: int = 0,
) -> Trained:
    """Train networks of one group each, then distil all of them into the one with the best validation score.

    A budget that is too small for an epoch of each network and one of the distillation has fewer networks, or no
    distillation.

    Args:
        specs: Specs of the networks. They differ in their seeds.
        settings: As for `train_within`.
        runs: Budget in runs of naive MTL. All networks and the distillation have an equal share of the epochs.
        contexts: The context of a stage by its name: "0", "1" and so on of the networks, and "distilled". A stage
            resumes from the latest checkpoint of its context.
        splits, unit: As for `train_hard`.

    Raises:
        NonFiniteLossError: If the loss is not finite.
        ValueError: If a checkpoint is damaged.
    """
    run = settings.epochs * (unit or naive_flops(specs[0]))
    networks = [hard_network(spec, together(spec)) for spec in specs]
    step = training_flops(networks[0])
    networks = networks[: max(int(runs * run / step + ROUNDING), 1)]
    taught = step + sum(inference_cost(network).flops for network in networks)
    share = runs * step / (len(networks) * step + taught)
    trained = [
        train_within(one, data, settings, share, splits=("val",), context=contexts(str(n)), unit=unit)
        for n, one in enumerate(networks)
    ]
    spent = sum(one.cost for one in trained)
    best = min(trained, key=lambda one: one.score)
    epochs = int((runs - spent) * run / taught + ROUNDING)
    network, score, context = best.network, best.score, contexts(DISTILLED)
    if len(trained) > 1 and epochs:
        longer = replace(settings, epochs=epochs, search_share=1.0, patience=patience_of(settings))
        state = TrainState.resumed(longer, context) or distillation_state(network, score, longer)
        teachers, hooks = [one.network for one in trained], reporting(context)
        distil(state, teachers, data, longer, context, gap=best.gap, hooks=hooks)
        network, score, spent = state.network, state.best_score, spent + taught * state.epoch / run
    metrics = evaluate_splits(network, data, splits, settings, context)
    return Trained(network.eval(), score, metrics, spent, best.gap)


def overlap_groups(
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    share: float,
    runs: float,
    *,
    context: TrainContext | None = None,
) -> tuple[Tensor, Grouping, float]:
    """Propose groups by the feature overlap of the tasks in one encoder, as the guided search does.

    The training of the encoder resumes from the context's latest checkpoint.

    Args:
        spec: The grouping network. The encoder is as wide as all branches, if it can be widened, or that of
            `overlap_spec`.
        settings: Training settings.
        share: Least epochs of the encoder as a share of the epochs, unless it is that of `overlap_spec`. It is
            trained on until the groups are stable.
        runs: The budget in runs of naive MTL.

    Returns:
        `feature_overlap` `(N, N)`, the groups, and the cost in runs of naive MTL.
    """
    one = wide_spec(spec) if spec.encoder.can_widen else replace(spec, groups=1, sampling="fixed")
    epochs = max(round(share * settings.epochs), 1)
    wider, budget = overlap_spec(spec), Budget(spec, settings, runs)
    most = budget.longest(epochs, budget.epoch_of(one))
    if wider is not None and (few := budget.overlap_epochs(budget.epoch_of(wider))):
        one, epochs, most = wider, few, few
    whole, context = replace(settings, search_share=1.0), context or LocalContext()
    network = hard_network(one, together(one)).to(context.device)
    latest = context.latest()
    stored = load_tensors(latest / OVERLAPS) if latest is not None else {}
    measured = [stored[str(n)] for n in range(len(stored))]
    state = TrainState.begin(network, whole, context)
    names, rows = [task.name for task in spec.tasks], rows_evaluated(spec, settings)

    def save_measured(folder: Path) -> None:
        save_tensors(folder / OVERLAPS, {str(n): overlap for n, overlap in enumerate(measured)})

    def propose(epoch: int) -> list[int]:
        extend(state, data, whole, context, until=epoch, hooks=reporting(context, save_measured))
        measured.append(feature_overlap(state.validated, data, batch_size=rows, context=context))
        return proposed(measured[-1])

    def proposed(overlap: Tensor) -> list[int]:
        return cluster(overlap, min(spec.groups, len(names)))

    before = [proposed(overlap) for overlap in measured]
    groups = Grouping.from_assignment(names, propose_until_stable(propose, epochs, most, before))
    return measured[-1], groups, budget.epoch(network) * state.epoch


def train_naive_with_affinities(
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    *,
    splits: Sequence[str] = ("val", "test"),
    context: TrainContext | None = None,
) -> tuple[Trained, dict[str, Tensor], dict[str, float]]:
    """Train naive MTL and measure the affinities of published selectors in this run.

    The run resumes from the context's latest checkpoint.

    CS, TAG and ETAP use `BATCHES` batches at the end of each epoch, Grad-TAG two larger batches at the end of the
    run. The measurements do not change the run.

    Returns:
        The network; affinities `(N, N)` with the names "cs", "tag", "etap", "gradtag"; the additional cost of each
        in units of the run, counted in forward passes (one for a forward pass, two for a backward pass).
    """
    context = context or LocalContext()
    gradients = GradientAffinities(spec.tasks)
    latest = context.latest()
    if latest is not None:
        gradients.load_state(load_tensors(latest / AFFINITIES))

    def measure(state: TrainState) -> None:
        rate = state.optimizer.param_groups[0]["lr"]
        for batch in islice(data.train(state.epoch, settings.batch_size), BATCHES):
            gradients.update(state.network, batch, rate)

    naive = train_hard(
        hard_network(spec, together(spec)), data, settings, splits=splits, context=context, on_epoch=measure,
        also=lambda folder: save_tensors(folder / AFFINITIES, gradients.state()),
    )  # fmt: skip
    samples = gradients.samples
    rows = 4 * settings.batch_size
    train, val = next(iter(data.train(0, rows))), next(iter(data.evaluate("val", rows)))
    found = gradients.means() | {"gradtag": projected_affinity(naive.network, train, val)}
    count = len(spec.tasks)
    passes = (
        3 * data.steps(settings.batch_size) * settings.batch_size * settings.epochs
    )  # passes of the run itself
    costs = {
        "cs": samples * (1 + 2 * count) / passes,
        "tag": samples * (1 + 3 * count) / passes,
        "etap": samples * (1 + 2 * count) / passes,
        "gradtag": 2 * DIRECTIONS * (len(train.inputs) + len(val.inputs)) / passes,
    }
    return naive, found, costs
