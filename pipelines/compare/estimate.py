"""The estimate before a comparison: its networks and searches, their runs of naive MTL, and their time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dmtg_core.names import listed
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.search.baselines import hard_network, together
from dmtg_core.search.budget import Budget
from dmtg_core.search.estimate import measure, networks, plan, seconds_of
from dmtg_core.search.guided import GROUPS
from dmtg_core.search.options import BASELINE, ONE, OVERLAP_ENCODER, WIDE
from dmtg_core.training.context import LocalContext
from dmtg_core.training.loop import rows_evaluated
from dmtg_core.training.settings import is_compiled
from pipelines.compare.cells import LEAST_RUNS, Cell, Kind, Result
from pipelines.compare.job import CellJob, is_current, stored
from pipelines.compare.methods import EXHAUSTIVE, GUIDED, SECOND, Comparison, first_cells, rows_of, second_cells
from pipelines.compare.training import search_of, unfrozen
from pipelines.data.ingest import open_data
from pipelines.execution.executor import Executor
from pipelines.training.estimate import duration
from pipelines.training.failures import training_failed
from pipelines.training.measures.latency import name_of

FULL = "full"  # the network of full fine-tuning
NETWORKS: Mapping[Kind, str] = {
    Kind.NAIVE: BASELINE, Kind.AFFINITIES: BASELINE, Kind.PAIR: BASELINE, Kind.HEADS_ALONE: BASELINE,
    Kind.WIDE: WIDE, Kind.DISTILLED_WIDE: WIDE,
    Kind.GROUPING: GROUPS, Kind.PROPOSAL: GROUPS, Kind.OWN: GROUPS,
    Kind.FULL_FINETUNING: FULL,
}  # fmt: skip
Most = tuple[float, float]  # runs of naive MTL, and seconds in one process


@dataclass(frozen=True)
class Speeds:
    """What the networks of a comparison cost and how long they take, measured in a process of the executor.

    Args:
        costs: Network → cost of an epoch in runs of naive MTL.
        seconds: Network → seconds of an epoch.
        searches: SEARCH without its seed → the most that it needs.
        left_out: SEARCH without its seed → candidates that its budget leaves out.
        epochs: Epochs of a run of naive MTL.
        device: Name of the device.
    """

    costs: Mapping[str, float]
    seconds: Mapping[str, float]
    searches: Mapping[Cell, Most]
    left_out: Mapping[Cell, Sequence[str]]
    epochs: int
    device: str

    def most(self, cell: Cell) -> Most:
        """The most that a cell needs; nothing for trees, which take no runs of a network."""
        if cell.kind == Kind.TREE_ENSEMBLES:
            return 0.0, 0.0
        if cell.kind == Kind.SEARCH:
            return self.searches[cell.without_seed]
        name = NETWORKS[cell.kind]
        runs = cell.budget or (cell.epochs or self.epochs) * self.costs[name]
        return runs, runs / self.costs[name] * self.seconds[name]


def estimated(
    comparison: Comparison, methods: Sequence[str], job: CellJob, executor: Executor, at_once: int
) -> dict[str, Any]:
    """The estimate of a comparison as JSON values; `text` has it in lines.

    Runs and time are upper limits: training ends earlier if validation data says that more does not pay. The time
    of gradient affinities and of tree ensembles is not in them.

    Args:
        comparison, methods, job, executor: As for `driver.train_methods`.
        at_once: Cells that are trained at the same time; 0 if that is not known.

    Raises:
        UserError: If the networks cannot be timed.
    """
    seeds, rows = comparison.config.compare.seeds, [*rows_of(comparison, methods).values()]
    first = [cell for row in rows for seed in seeds for cell in first_cells(comparison, *row, seed)]
    (done,) = executor.run(partial(measured, job), [list(dict.fromkeys(first))])
    if done.error is not None:
        raise training_failed(done.error, str(job.run)) from done.error
    speeds: Speeds = done.value
    found = _finished(job, first)
    cells = set(first)
    for row in rows:
        for seed in seeds:
            cells |= {*_second(comparison, *row, seed, found, lambda cell: speeds.most(cell)[0])}
    known = [cell for cell in cells if cell.kind != Kind.GROUPING or cell.groups]
    found |= _finished(job, [cell for cell in known if cell not in found])
    most = [speeds.most(cell) for cell in cells if cell not in found]
    runs, seconds = math.fsum(runs for runs, _ in most), math.fsum(seconds for _, seconds in most)
    longest = max((seconds for _, seconds in most), default=0.0)
    values = {
        "cells": len(cells), "finished": len(cells) - len(most), "runs": runs,
        "seconds": max(seconds / max(at_once, 1), longest), "at_once": at_once, "device": speeds.device,
        "left_out": {f"{cell.budget:g}": list(names) for cell, names in speeds.left_out.items() if names},
    }  # fmt: skip
    return values | {"text": lines_of(values)}


def lines_of(values: Mapping[str, Any]) -> list[str]:
    """The estimate as lines of text."""
    ended = f", {values['finished']} of them finished" if values["finished"] else ""
    at_once, runs = max(values["at_once"], 1), f"at most {values['runs']:.3g} runs of naive MTL"
    return [
        f"estimate: {values['cells']} networks and searches{ended}; {runs}",
        f"at most {duration(values['seconds'])} with {at_once} at a time, each on {values['device']}",
        *(
            f"a search with {budget} runs leaves out {listed(names)}; raise compare.budgets or train.epochs"
            for budget, names in values["left_out"].items()
        ),
    ]


def _finished(job: CellJob, cells: Sequence[Cell]) -> dict[Cell, Result]:
    return {cell: result for cell, result in stored(job, dict.fromkeys(cells)).items() if is_current(result)}


def _second(
    comparison: Comparison,
    method: str,
    budget: float,
    seed: int,
    found: Mapping[Cell, Result],
    runs: Callable[[Cell], float],
) -> Iterator[Cell]:
    """The cells that follow from the first ones: a network without groups as long as those are not trained."""
    first = first_cells(comparison, method, budget, seed)
    if all(cell in found for cell in first):
        yield from second_cells(comparison, method, budget, seed, dict(found))
    elif method in SECOND and method != EXHAUSTIVE:
        left = max(budget - math.fsum(map(runs, first)), LEAST_RUNS) if budget else 0.0
        yield Cell(Kind.GROUPING, seed, budget=left, label=method)


def measured(job: CellJob, cells: Sequence[Cell]) -> Speeds:
    """Time a few training steps of the networks of cells; a task of the executor."""
    config, device = job.config, LocalContext().device
    spec, settings, options = job.spec(config.train.seed), config.settings(), config.search_options()
    found = networks(spec, replace(options, wide=True))
    budget, seconds = Budget(spec, settings, math.inf), _seconds(job, Kind.NAIVE, found)
    found[ONE], seconds[ONE] = found[BASELINE], seconds[BASELINE]  # of a search without a wide encoder
    searches, left_out = {}, {}
    for cell in {cell.without_seed for cell in cells if cell.kind == Kind.SEARCH}:
        own, own_settings = search_of(cell, config, settings)
        kept = found if own.wide else {k: v for k, v in found.items() if k not in (WIDE, OVERLAP_ENCODER)}
        ours = plan(spec, own_settings, own, baseline=False, found=kept)
        known = {name: seconds[name] for name in kept}
        searches[cell] = ours.runs, seconds_of(ours, own_settings, known)
        if cell.label == GUIDED:
            left_out[cell] = ours.left_out
    if any(cell.kind == Kind.FULL_FINETUNING for cell in cells):
        whole = unfrozen(spec).without_weights()
        found[FULL] = hard_network(whole, together(whole))
        seconds |= _seconds(job, Kind.FULL_FINETUNING, {FULL: found[FULL]})
    costs = {name: budget.epoch(network) for name, network in found.items()}
    return Speeds(costs, seconds, searches, left_out, settings.epochs, name_of(device))


def _seconds(job: CellJob, kind: Kind, found: Mapping[str, GroupingNetwork]) -> dict[str, float]:
    """Seconds of an epoch of networks that are trained on the samples of a kind."""
    config, settings, context = job.config, job.config.settings(), LocalContext()
    reader, held = job.samples(kind)
    data = open_data(reader, held, config.data, seed=0, rank=0, world_size=1, device=context.device)
    rows = rows_evaluated(job.spec(0), settings, compiled=is_compiled(settings, context.device))
    steps, batches = data.steps(settings.batch_size), -(-reader.manifest.rows("val") // rows)
    epochs, _ = measure(found, data, settings, context)
    return {name: epoch.seconds(steps, batches) for name, epoch in epochs.items()}
