"""An estimate of a search before its start: what its budget does, and its time and memory from a few timed steps.

Costs are in runs of naive MTL. They are upper limits: a search ends earlier if validation data says that more does
not pay.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import wide_spec
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.baselines import hard_network
from dmtg_core.search.budget import Budget
from dmtg_core.search.extendable import begin_average
from dmtg_core.search.feature_overlap import overlap_spec
from dmtg_core.search.guided import GROUPS, LEAST_DISTILLATION, MEMBERS
from dmtg_core.search.options import BASELINE, GUIDED, ONE, OVERLAP_ENCODER, WIDE, SearchOptions
from dmtg_core.training.context import TrainContext
from dmtg_core.training.data import Batch, Data
from dmtg_core.training.loop import Hooks, advance
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState

GATE = "gate"  # a network with all heads: its cost does not depend on where the gate starts
WARM_UP, STEPS = 2, 5  # steps of a network before its timed ones, and timed steps
EVALUATED = 3  # timed batches of the validation split


@dataclass(frozen=True)
class Plan:
    """What a search does with its budget.

    Args:
        runs: The most training of the search in runs of naive MTL, without the baseline.
        budget: The budget; None for a search of fixed length.
        baseline: Runs of the baseline, 1 or 0.
        left_out: Candidates that the budget leaves out.
        overlap_epochs: Epochs of an encoder for the feature overlap alone.
        rung: Candidate of the first rung → its epochs before they are compared first. A search of fixed length has
            all gates in it.
        longest: The most epochs of the first candidate until its groups are stable, see `Budget.longest`.
        rung_runs: Cost of these epochs, with those for the feature overlap.
        epochs: Epochs of the best network, if it has all groups and the others are dropped after the first rung.
            With fewer groups there is room for more.
        members: Further networks of an ensemble that is distilled, if each needs as many epochs as naive MTL. The
            baseline is one of them.
        costs: Cost of an epoch of each network: `BASELINE`, `WIDE` or `ONE`, `OVERLAP_ENCODER`, `GATE`, and
            `GROUPS` with all groups.
    """

    runs: float
    budget: float | None
    baseline: int
    left_out: tuple[str, ...]
    overlap_epochs: int
    rung: Mapping[str, int]
    longest: int
    rung_runs: float
    epochs: int
    members: int
    costs: Mapping[str, float] = field(repr=False)


def networks(spec: NetworkSpec, options: SearchOptions) -> dict[str, GroupingNetwork]:
    """Return a fresh network of each kind that a search trains, without pretrained weights.

    Args:
        spec: The grouping network.
        options: Options of the search.
    """
    bare = spec.without_weights()
    names, groups = [task.name for task in spec.tasks], min(spec.groups, len(spec.tasks))
    one = replace(bare, groups=1, sampling="fixed")
    found = {BASELINE: GroupingNetwork(one)}
    if spec.groups == 1:
        return found | {GATE: GroupingNetwork(bare), GROUPS: GroupingNetwork(one)}
    if WIDE in options.candidates(spec):
        found[WIDE] = GroupingNetwork(wide_spec(bare))
        if (wider := overlap_spec(bare)) is not None:
            found[OVERLAP_ENCODER] = GroupingNetwork(wider)
    elif ONE in options.candidates(spec):
        found[ONE] = GroupingNetwork(one)
    spread = Grouping.from_assignment(names, [n % groups for n in range(len(names))])
    return found | {GATE: GroupingNetwork(bare), GROUPS: hard_network(bare, spread)}


def plan(
    spec: NetworkSpec,
    settings: TrainSettings,
    options: SearchOptions,
    *,
    baseline: bool = True,
    champion: bool = False,
    found: Mapping[str, GroupingNetwork] | None = None,
) -> Plan:
    """Return what a search does with its budget.

    Args:
        spec, settings, options, baseline: As for `search`.
        champion: Whether the search starts from the models of a grouping, which are a candidate then.
        found: Result of `networks`, if it is there already.
    """
    found = found or networks(spec, options)
    runs = options.runs(spec.groups)
    budget = Budget(spec, settings, runs or math.inf)
    costs = {name: budget.epoch(network) for name, network in found.items()}
    names, groups = options.candidates(spec, champion=champion), costs[GROUPS]
    if runs is None:
        rung, rest = dict.fromkeys(names, settings.search_epochs), settings.epochs - settings.search_epochs
        first = sum(rung.values()) * costs[GATE]
        return Plan(
            runs=first + rest * groups, budget=None, baseline=int(baseline), left_out=(), overlap_epochs=0,
            rung=rung, longest=settings.search_epochs, rung_runs=first, epochs=settings.epochs, members=0,
            costs=costs,
        )  # fmt: skip
    wider = costs.get(OVERLAP_ENCODER)
    apart = budget.overlap_epochs(wider) if wider is not None else 0
    spent = apart * (wider or 0.0)
    each = {name: costs[kind_of(name)] for name in names}
    rung = budget.first_rung(each, options.compare, options.rung, spent)
    longest = rung[names[0]]
    if GUIDED in rung and not apart:
        longest = budget.longest(longest, each[names[0]])
    first = spent + sum(count * each[name] for name, count in rung.items())
    trained = min(rung.values())  # those of the candidate whose epochs cost most
    whole = first + max(settings.epochs - trained, 0) * groups
    members = _members(costs, budget, settings.epochs, whole, baseline)
    return Plan(
        runs=max(budget.runs, first), budget=budget.runs, baseline=int(baseline),
        left_out=tuple(names[len(rung) :]), overlap_epochs=apart, rung=rung, longest=longest, rung_runs=first,
        epochs=trained + budget.epochs(groups, first), members=members if options.distil else 0, costs=costs,
    )  # fmt: skip


def _members(costs: Mapping[str, float], budget: Budget, epochs: int, spent: float, baseline: bool) -> int:
    """Return how many further networks fit, with a distillation: naive MTL, then others of all groups."""
    one, taught = costs[GROUPS], costs[GROUPS] / 3  # a forward pass is a third of a step
    for count in range(MEMBERS):
        epoch = one if count else costs[BASELINE]
        spent += 0.0 if baseline and not count else epochs * epoch
        taught += epoch / 3
        if spent + LEAST_DISTILLATION * epochs * (one + taught) > budget.runs:
            return count
    return MEMBERS


def kind_of(candidate: str) -> str:
    """Return the key of a candidate in `networks`."""
    return candidate if candidate in (WIDE, ONE) else GATE


@dataclass(frozen=True)
class Epoch:
    """Seconds of an epoch: of each training step, of each validation batch, and the rest."""

    step: float
    validation: float
    rest: float

    def seconds(self, steps: int, batches: int) -> float:
        """Return the seconds of an epoch with this many steps and validation batches."""
        return steps * self.step + batches * self.validation + self.rest


def seconds_of(found: Plan, settings: TrainSettings, epochs: Mapping[str, float]) -> float:
    """Return the seconds of a search, if it needs its whole budget.

    Args:
        found: What it does.
        settings: Its training settings.
        epochs: Seconds of an epoch of each network of `Plan.costs`.
    """
    total = found.baseline * settings.epochs * epochs[BASELINE]
    total += sum(count * epochs[kind_of(name)] for name, count in found.rung.items())
    total += found.overlap_epochs * epochs.get(OVERLAP_ENCODER, 0.0)
    if found.budget is None:
        return total + (settings.epochs - settings.search_epochs) * epochs[GROUPS]
    rest = [epochs[name] / found.costs[name] for name in (WIDE, ONE, GROUPS) if name in epochs]
    return total + (found.runs - found.rung_runs) * max(rest)


def measure(
    found: Mapping[str, GroupingNetwork], data: Data, settings: TrainSettings, context: TrainContext
) -> tuple[dict[str, Epoch], int | None]:
    """Time a few training steps of networks, as a guided search trains them.

    All workers call it, each with its part of the data. The learning rate is so low that no loss can diverge.

    Returns:
        The epoch of each network, and the peak memory in bytes, see `peak_memory`.
    """
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    short = replace(
        settings, epochs=2, search_share=1.0, prune_threshold=0.0, patience=0, checkpoint_every=0, lr_hold=0,
        learning_rate=1e-9, gate_learning_rate=None, lr_min=0.0,
    )  # fmt: skip
    held, timed = [], {}
    for name, network in found.items():
        state = TrainState.fresh(network.to(context.device), short)
        if name != BASELINE:
            begin_average(state, short)
        timed[name] = _epoch(state, data, short, context)
        held.append(state)  # a search holds the networks of all candidates
    return timed, peak_memory(context.device)


def _epoch(state: TrainState, data: Data, settings: TrainSettings, context: TrainContext) -> Epoch:
    """Time the second of two short epochs of a network. The first one allocates memory and compiles."""
    watched, ends = _TimedData(data, context.device), []

    def on_epoch(state: TrainState) -> None:
        # as a checkpoint of a run; without space for it the estimate lacks its time
        with suppress(OSError), tempfile.TemporaryDirectory() as folder:
            state.save(Path(folder))
        ends.append(time.perf_counter())

    advance(state, watched, settings, context, until=2, hooks=Hooks(on_epoch=on_epoch))
    steps, batches = watched.steps_seconds, watched.evaluation_seconds
    return Epoch(median(steps), median(batches), max(ends[1] - ends[0] - sum(steps) - sum(batches), 0.0))


class _TimedData:
    """A few batches of a data set, with the seconds of each in the last epoch."""

    def __init__(self, data: Data, device: torch.device) -> None:
        self.data, self.device = data, device
        self.steps_seconds: list[float] = []
        self.evaluation_seconds: list[float] = []

    def steps(self, batch_size: int) -> int:
        """See `Data.steps`."""
        del batch_size  # the number does not depend on it
        return STEPS

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Data.train`. The batches of a small data set are repeated."""
        del start  # the warm-up has fewer steps than `steps`
        count = WARM_UP if epoch == 0 else STEPS
        self.steps_seconds = yield from self._timed(islice(self._endless(epoch, batch_size), count))

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`. It has the first batches alone."""
        self.evaluation_seconds = yield from self._timed(islice(self.data.evaluate(split, batch_size), EVALUATED))

    def _endless(self, epoch: int, batch_size: int) -> Iterator[Batch]:
        while True:
            yield from self.data.train(epoch, batch_size)
            epoch += 1

    def _timed(self, batches: Iterator[Batch]) -> Generator[Batch, None, list[float]]:
        seconds: list[float] = []
        before = self._now()
        for batch in batches:
            yield batch
            after = self._now()
            seconds.append(after - before)
            before = after
        return seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def peak_memory(device: torch.device) -> int | None:
    """Return the peak of the allocated memory of a GPU, or of this process, in bytes; None if it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
