"""The cells of a comparison: a cell is one network or one search, trained with one seed by a task of the executor.

Each cell writes its result to a file. A cell with a file is not trained again, so that a comparison resumes after
it was killed, and methods that find the same grouping share its cell.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from dmtg_core.addresses import load
from dmtg_core.evaluation.jackknife import score_parts
from dmtg_core.evaluation.trees import train_trees
from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import inference_cost, naive_flops, wide_spec
from dmtg_core.network.encoders import EncoderSpec, heads_alone
from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.search.baselines import (
    Trained,
    hard_network,
    overlap_groups,
    together,
    train_distilled,
    train_hard,
    train_naive_with_affinities,
    train_within,
)
from dmtg_core.search.budget import default_budget
from dmtg_core.search.search import search
from dmtg_core.training.context import LocalContext
from dmtg_core.training.data import Data
from dmtg_core.training.loop import rows_evaluated
from dmtg_core.training.metrics import Metrics
from dmtg_core.training.settings import TrainSettings
from pipelines.config.loading import Config
from pipelines.data.ingest import open_data
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.execution.executor import Executor, Held
from pipelines.storage import Location
from pipelines.training.estimate import duration
from pipelines.training.failures import permanent_error, training_failed

CELLS = "cells"
FORMAT = 4  # 3 had no parts of the validation score, 2 scores of the losses alone, 1 AUROC from bins
NAIVE, AFFINITIES, WIDE, DISTILLED_WIDE, GROUPING, PAIR, PROPOSAL, SEARCH, TREE_ENSEMBLES, OWN = (
    "naive_mtl", "affinities", "wide", "wide_distilled", "grouping", "pair", "proposal", "search", "trees", "own"
)  # fmt: skip
HEADS_ALONE, FULL_FINETUNING = "heads_alone", "full_finetuning"
LEAST_RUNS = 0.5  # training of groups in runs of naive MTL, also if finding them has used the budget
Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One network or one search with one seed.

    Args:
        kind: NAIVE, AFFINITIES (naive MTL again, with the affinities of the published selectors; with many tasks
            the affinities take far longer than the run), WIDE, DISTILLED_WIDE (the best of three wide encoders,
            distilled from all three), GROUPING, PAIR, PROPOSAL (groups of tasks with a high feature overlap,
            trained from scratch; the budget includes finding them), SEARCH, HEADS_ALONE (heads on a frozen
            encoder), FULL_FINETUNING (one encoder, of which nothing is frozen), TREE_ENSEMBLES (`label` is the
            method), or OWN (`label` is the address of a function of another package, see `own_method`).
        seed: Seed of initial weights, data order and gate noise.
        epochs: Number of epochs; 0 for `train.epochs`.
        budget: The most training in runs of naive MTL, see `train_within`; 0 for `epochs`.
        groups: Groups of a GROUPING, tasks of a PAIR.
        options: Changes of a SEARCH to the search section.
        label: Name of a SEARCH, of TREE_ENSEMBLES or of an OWN method, for its file.
    """

    kind: str
    seed: int
    epochs: int = 0
    budget: float = 0.0
    groups: tuple[tuple[str, ...], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """Name of the file without its suffix. Equal cells have equal names."""
        stem = (self.label or self.kind).replace(":", ".")
        if self.kind == GROUPING:
            stem = f"{self.kind}_{Grouping.of(self.groups).name}"
        elif self.kind == PAIR:
            stem = f"{self.kind}_{Grouping.of(self.groups).name}_of_{len(self.groups[0])}"
        length = f"_{self.epochs}epochs" * bool(self.epochs) + f"_{self.budget:g}runs" * bool(self.budget)
        return f"{stem}{length}_seed{self.seed}"

    @property
    def without_seed(self) -> Cell:
        """The cell without its seed and its groups, which is equal for all seeds of a method."""
        return replace(self, seed=0, groups=())

    @classmethod
    def of(cls, grouping: Grouping, seed: int, epochs: int = 0, budget: float = 0.0) -> Cell:
        """The cell that trains a grouping from scratch."""
        return cls(GROUPING, seed, epochs, budget, grouping.groups)


@dataclass(frozen=True)
class CellJob:
    """The input that all cells of a comparison share.

    Args:
        config: Configuration of the comparison.
        reader: Reader of what training reads: the shards, or the outputs of a frozen stem.
        held: Samples that the executor holds; None if they are streamed.
        run: Folder of the comparison.
        inputs: Reader of the shards.
    """

    config: Config
    reader: Reader
    held: Mapping[str, Sequence[Held]] | None
    run: Location
    inputs: Reader


def train_cells(
    job: CellJob, executor: Executor, cells: Iterable[Cell], log: Callable[[str], None]
) -> dict[Cell, Result]:
    """Read the results of finished cells and train the other cells as tasks of the executor.

    Raises:
        UserError: If a cell fails. All other cells are trained first.
    """
    wanted = list(dict.fromkeys(cells))
    files = {cell: job.run / CELLS / f"{cell.name}.json" for cell in wanted}
    stored = {cell: file.read_json() for cell, file in files.items() if file.exists()}
    found = {cell: result for cell, result in stored.items() if result.get("format") == FORMAT}
    left = [cell for cell in wanted if cell not in found]
    if not left:
        return found
    if len(found) < len(stored):
        log(f"{len(stored) - len(found)} results are from an earlier version with other figures: trained again")
    log(f"{len(left)} of {len(wanted)} networks and searches to train; lower scores are better")
    failed: list[UserError] = []
    started, waiting = time.perf_counter(), dict.fromkeys(left)
    for done in executor.run(partial(train_cell, job), left):
        cell = left[done.index]
        del waiting[cell]
        if done.error is not None:  # raised below, after the other cells have ended
            failed.append(training_failed(done.error, str(job.run)))
            log(f"{cell.name} failed: {failed[-1].what}")
            continue
        found[cell] = done.value
        trained = [one for one in left if one in found]
        remaining = time_left(found, trained, waiting, time.perf_counter() - started)
        log(f"{len(trained)}/{len(left)} {cell.name}: validation score {found[cell]['score']:.4f}{remaining}")
    if failed:
        raise failed[0]
    return found


def time_left(found: Mapping[Cell, Result], trained: Sequence[Cell], left: Iterable[Cell], elapsed: float) -> str:
    """Estimate the time that the cells that are left take, from those with other seeds, for a line of progress.

    Args:
        found: Results, also those of earlier calls.
        trained: The cells with a result of this call.
        left: The cells that this call has still to train.
        elapsed: Seconds since its start.

    Returns:
        An empty text if no cell is left, or if one has none of its kind with another seed in `found`.
    """
    seconds = defaultdict(list)
    for cell, result in found.items():
        seconds[cell.without_seed].append(result["seconds"])
    known = [seconds[cell.without_seed] for cell in left]
    if not known or not all(known):
        return ""
    at_once = sum(found[cell]["seconds"] for cell in trained) / elapsed
    return f", about {duration(sum(map(fmean, known)) / at_once)} left"


def train_cell(job: CellJob, cell: Cell) -> Result:
    """Train one cell in its own process and write its file.

    Returns:
        `grouping`, `score` (the validation score, see `score_of`), `metrics` by split, `cost` in runs of naive
        MTL, `flops` and `parameters` of inference, `seconds`, and the keys that its kind adds.
    """
    context = LocalContext()
    config = job.config
    # all of an encoder is trained on inputs
    reader, held = (
        (job.inputs, None) if cell.kind == FULL_FINETUNING and job.reader.outputs else (job.reader, job.held)
    )
    data = open_data(reader, held, config.data, seed=cell.seed, rank=0, world_size=1, device=context.device)
    settings = replace(config.settings(), seed=cell.seed, epochs=cell.epochs or config.train.epochs)
    spec = replace(config.network_spec(job.reader.manifest.description.input, job.reader.tasks), seed=cell.seed)
    splits = [split for split in ("val", "test") if job.reader.manifest.rows(split)]
    started = time.perf_counter()
    try:
        result = TRAIN[cell.kind](cell, spec, data, settings, splits, config)
    except (RuntimeError, MemoryError) as error:
        raise permanent_error(error, config, str(job.run), 1) or error from error
    result["cost"] *= (cell.epochs or config.train.epochs) / config.train.epochs
    result |= {"format": FORMAT, "kind": cell.kind, "seed": cell.seed, "seconds": time.perf_counter() - started}
    (job.run / CELLS / f"{cell.name}.json").write_json(result)
    return result


def _result(network: GroupingNetwork, score: float, metrics: Mapping[str, Metrics], cost: float) -> Result:
    return {
        "grouping": network.grouping().to_dict(),
        "score": score,
        "metrics": dict(metrics),
        "cost": cost,
        **asdict(inference_cost(network)),
    }


def _training_result(done: Trained) -> Result:
    return _result(done.network, done.score, done.metrics, done.cost)


def _fixed(
    cell: Cell,
    network: GroupingNetwork,
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    splits: Sequence[str],
) -> Result:
    """Train a network with fixed groups for its epochs, or within the budget of the cell."""
    unit = naive_flops(spec)
    if cell.budget:
        done = train_within(network, data, settings, cell.budget, splits=splits, unit=unit)
    else:
        done = train_hard(network, data, settings, splits=splits, unit=unit)
    return _training_result(done) | {"score_parts": _parts(done.network, data, settings)}


def _naive(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    return _fixed(cell, hard_network(spec, together(spec)), spec, data, settings, splits)


def _parts(network: GroupingNetwork, data: Data, settings: TrainSettings) -> list[float]:
    rows = rows_evaluated(network.spec, settings)
    return score_parts(network.tasks, network, data, LocalContext(), batch_size=rows)


def _affinities(
    _cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    done, affinities, costs = train_naive_with_affinities(spec, data, settings, splits=splits)
    return _training_result(done) | {
        "affinities": {name: value.tolist() for name, value in affinities.items()},
        "affinity_costs": costs,
    }


def _wide(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    return _fixed(cell, hard_network(wide_spec(spec), together(spec)), spec, data, settings, splits)


def _heads_alone(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    return _with_encoder(cell, heads_alone(spec.encoder), spec, data, settings, splits)


def _full_finetuning(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    encoder = replace(spec.encoder, branch="copy", adapter=None)
    return _with_encoder(cell, encoder, spec, data, settings, splits)


def _with_encoder(
    cell: Cell,
    encoder: EncoderSpec,
    spec: NetworkSpec,
    data: Data,
    settings: TrainSettings,
    splits: Sequence[str],
) -> Result:
    network = hard_network(replace(spec, encoder=encoder), together(spec))
    return _fixed(cell, network, spec, data, settings, splits)


def _distilled_wide(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    specs = [replace(wide_spec(spec), seed=spec.seed + n) for n in range(3)]
    done = train_distilled(specs, data, settings, cell.budget, splits=splits, unit=naive_flops(spec))
    return _training_result(done)


def _grouping(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    network = hard_network(spec, Grouping.of(cell.groups, [task.name for task in spec.tasks]))
    return _fixed(cell, network, spec, data, settings, splits)


def _pair(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    own = replace(spec, tasks=tuple(task for task in spec.tasks if task.name in cell.groups[0]))
    network = hard_network(own, together(own))
    done = train_hard(network, data, settings, splits=splits, unit=naive_flops(spec))
    return _training_result(done)


def _proposal(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], config: Config
) -> Result:
    runs = cell.budget or default_budget(spec.groups)
    overlap, grouping, cost = overlap_groups(spec, data, settings, config.search.rung, runs)
    left = replace(cell, budget=max(cell.budget - cost, LEAST_RUNS)) if cell.budget else cell
    found = _fixed(left, hard_network(spec, grouping), spec, data, settings, splits)
    return found | {"affinity": overlap.tolist(), "cost": found["cost"] + cost}


def _search(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], config: Config
) -> Result:
    budget = {"budget": cell.budget} if cell.budget else {}
    section = config.search.model_copy(update=budget | dict(cell.options))
    options = config.model_copy(update={"search": section}).search_options()
    own = replace(settings, search_share=section.share, average=section.average)
    found = search(spec, data, own, options, baseline=False, splits=splits)
    chosen = next(candidate for candidate in found.candidates if candidate["stage"] == found.chosen)
    return _result(found.network, found.score, found.metrics, found.cost) | {
        "chosen": found.chosen,
        "distilled": found.distilled,
        "candidates": found.candidates,
        "affinity": found.affinity,
        "costs": found.costs,
        "probabilities": chosen["probabilities"],
        "score_parts": _parts(found.network, data, settings),
    }


def own_method(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    """Call a method of another package, `(spec, data, settings, budget, splits) -> Trained`.

    It trains a network as the functions of `dmtg_core.search.baselines` do. `Trained.cost` is its whole training,
    in runs of naive MTL.

    Raises:
        UserError: If it returns something else.
    """
    done: object = load("method", cell.label)(spec, data, settings, cell.budget, splits)
    if not isinstance(done, Trained):
        raise UserError(
            f"method {cell.label} must return dmtg_core.search.baselines.Trained, got {type(done).__name__}",
            where="compare.methods",
            remedy="return the result of train_within or train_hard",
            wrong_use=True,
        )
    return _training_result(done)


def _trees(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    """One ensemble for each task. Its cost is not one of operations, so it is 0; `seconds` has the duration."""
    threads = torch.get_num_threads()
    done = train_trees(cell.label, spec.tasks, data, splits=splits, seed=settings.seed, threads=threads)
    grouping = {f"group_{n}": [task.name] for n, task in enumerate(spec.tasks)}
    figures = {"score": done.score, "metrics": done.metrics}
    return {"grouping": grouping, **figures, "cost": 0.0, "flops": 0, "parameters": 0}


TRAIN: Mapping[str, Callable[..., Result]] = {
    NAIVE: _naive,
    AFFINITIES: _affinities,
    WIDE: _wide,
    DISTILLED_WIDE: _distilled_wide,
    GROUPING: _grouping,
    PAIR: _pair,
    PROPOSAL: _proposal,
    SEARCH: _search,
    HEADS_ALONE: _heads_alone,
    FULL_FINETUNING: _full_finetuning,
    TREE_ENSEMBLES: _trees,
    OWN: own_method,
}
