"""The training of the cells of a comparison, each by a task of the executor.

Each cell writes its result to a file. A cell with a file is not trained again, so that a comparison resumes after
it was killed, and methods that find the same grouping share its cell. A cell that is trained for more than
`CHECKPOINT_S` writes checkpoints, from which it resumes.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean

import torch

from dmtg_core.addresses import load
from dmtg_core.evaluation.jackknife import score_parts
from dmtg_core.evaluation.trees import train_trees
from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import inference_cost, wide_spec
from dmtg_core.network.encoders import heads_alone
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
from dmtg_core.search.options import SearchOptions
from dmtg_core.search.search import search
from dmtg_core.training.context import LocalContext, TrainContext
from dmtg_core.training.loop import rows_evaluated
from dmtg_core.training.metrics import Metrics
from dmtg_core.training.settings import TrainSettings
from pipelines.compare.cells import FORMAT, LEAST_RUNS, Cell, Kind, Result
from pipelines.compare.job import CELLS, CellJob, Work, is_current, stored
from pipelines.config.loading import Config
from pipelines.data.ingest import open_data
from pipelines.errors import UserError
from pipelines.execution.executor import Executor
from pipelines.scratch import temporary_folder
from pipelines.training.context import TaskContext
from pipelines.training.estimate import duration
from pipelines.training.failures import permanent_error, training_failed

UNFINISHED = "unfinished"  # folder of the checkpoints of cells in training
CHECKPOINT_S = 60.0  # between two of them
NETWORK, ENCODER, SEARCH = "network", "encoder", "search"  # their trainings
logger = logging.getLogger(__name__)


def train_cells(
    job: CellJob, executor: Executor, cells: Iterable[Cell], log: Callable[[str], None]
) -> dict[Cell, Result]:
    """Read the results of finished cells and train the other cells as tasks of the executor.

    Raises:
        UserError: If a cell fails. All other cells are trained first.
    """
    wanted = list(dict.fromkeys(cells))
    written = stored(job, wanted)
    found = {cell: result for cell, result in written.items() if is_current(result)}
    left = [cell for cell in wanted if cell not in found]
    begun = _begun(job, found)
    if not left:
        return found
    if len(found) < len(written):
        log(f"{len(written) - len(found)} results are from an earlier version with other figures: trained again")
    resumed = sum(cell.name in begun for cell in left)
    resume = f", {resumed} of them from {'their' if resumed > 1 else 'its'} last checkpoint" if resumed else ""
    log(f"{len(left)} of {len(wanted)} networks and searches to train{resume}; lower scores are better")
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
    config, folder, device = job.config, job.run / UNFINISHED / cell.name, LocalContext().device
    reader, held = job.samples(cell.kind)
    opened: list[TaskContext] = []
    with temporary_folder() as scratch:

        def context(training: str) -> TrainContext:
            opened.append(TaskContext(folder / training, scratch, _warn, CHECKPOINT_S))
            return opened[-1]

        work = Work(
            cell,
            spec=job.spec(cell.seed),
            data=open_data(reader, held, config.data, seed=cell.seed, rank=0, world_size=1, device=device),
            settings=replace(config.settings(), seed=cell.seed, epochs=cell.epochs or config.train.epochs),
            splits=[split for split in ("val", "test") if job.reader.manifest.rows(split)],
            config=config,
            contexts=context,
        )
        started = time.perf_counter()
        try:
            result = TRAIN[cell.kind](work)
        except (RuntimeError, MemoryError) as error:
            raise permanent_error(error, config, str(job.run), 1) or error from error
    seconds = time.perf_counter() - started + sum(one.before for one in opened)
    result["cost"] *= (cell.epochs or config.train.epochs) / config.train.epochs
    result |= {"format": FORMAT, "kind": cell.kind, "seed": cell.seed, "seconds": seconds}
    (job.run / CELLS / f"{cell.name}.json").write_json(result)
    if any(one.checkpoints.whole for one in opened):
        folder.delete()
    return result


def _warn(_kind: str, message: str) -> None:
    logger.warning(message)


def _begun(job: CellJob, found: Mapping[Cell, Result]) -> set[str]:
    """The names of unfinished cells with checkpoints. Those of finished cells, left by a kill, are removed."""
    finished, folder = {cell.name for cell in found}, job.run / UNFINISHED
    names = {*folder.folders()}
    for name in names & finished:
        (folder / name).delete()
    return names - finished


def _result(network: GroupingNetwork, score: float, metrics: Mapping[str, Metrics], cost: float) -> Result:
    return {
        "grouping": network.grouping().to_dict(),
        "score": score,
        "metrics": dict(metrics),
        "cost": cost,
        **asdict(inference_cost(network)),
    }


def _result_of(done: Trained) -> Result:
    return _result(done.network, done.score, done.metrics, done.cost)


def _parts(network: GroupingNetwork, work: Work) -> list[float]:
    rows = rows_evaluated(network.spec, work.settings)
    return score_parts(network.tasks, network, work.data, LocalContext(), batch_size=rows)


def _fixed(network: GroupingNetwork, work: Work, budget: float | None = None) -> Result:
    """Train a network with fixed groups within a budget, by default that of the cell; with 0 for its epochs."""
    budget = work.cell.budget if budget is None else budget
    if budget:
        done = train_within(
            network, work.data, work.settings, budget, splits=work.splits, context=work.contexts(NETWORK),
            unit=work.unit,
        )  # fmt: skip
    else:
        done = _own_length(network, work)
    return _result_of(done) | {"score_parts": _parts(done.network, work)}


def _own_length(network: GroupingNetwork, work: Work) -> Trained:
    context = work.contexts(NETWORK)
    return train_hard(network, work.data, work.settings, splits=work.splits, context=context, unit=work.unit)


def _one_encoder(spec: NetworkSpec, work: Work) -> Result:
    return _fixed(hard_network(spec, together(spec)), work)


def _naive(work: Work) -> Result:
    return _one_encoder(work.spec, work)


def _wide(work: Work) -> Result:
    return _one_encoder(wide_spec(work.spec), work)


def _heads_alone(work: Work) -> Result:
    return _one_encoder(replace(work.spec, encoder=heads_alone(work.spec.encoder)), work)


def unfrozen(spec: NetworkSpec) -> NetworkSpec:
    """The spec with an encoder of which nothing is frozen."""
    return replace(spec, encoder=replace(spec.encoder, branch="copy", adapter=None))


def _full_finetuning(work: Work) -> Result:
    return _one_encoder(unfrozen(work.spec), work)


def _affinities(work: Work) -> Result:
    done, affinities, costs = train_naive_with_affinities(
        work.spec, work.data, work.settings, splits=work.splits, context=work.contexts(NETWORK)
    )
    return _result_of(done) | {
        "affinities": {name: value.tolist() for name, value in affinities.items()},
        "affinity_costs": costs,
    }


def _distilled_wide(work: Work) -> Result:
    specs = [replace(wide_spec(work.spec), seed=work.spec.seed + n) for n in range(3)]
    done = train_distilled(
        specs, work.data, work.settings, work.cell.budget, splits=work.splits, contexts=work.contexts,
        unit=work.unit,
    )  # fmt: skip
    return _result_of(done)


def _grouping(work: Work) -> Result:
    grouping = Grouping.of(work.cell.groups, [task.name for task in work.spec.tasks])
    return _fixed(hard_network(work.spec, grouping), work)


def _pair(work: Work) -> Result:
    own = tuple(task for task in work.spec.tasks if task.name in work.cell.groups[0])
    spec = replace(work.spec, tasks=own)
    network = hard_network(spec, together(spec))
    return _result_of(_own_length(network, work))


def _proposal(work: Work) -> Result:
    budget = work.cell.budget
    runs = budget or default_budget(work.spec.groups)
    overlap, grouping, cost = overlap_groups(
        work.spec, work.data, work.settings, work.config.search.rung, runs, context=work.contexts(ENCODER)
    )
    left = max(budget - cost, LEAST_RUNS) if budget else 0.0
    found = _fixed(hard_network(work.spec, grouping), work, left)
    return found | {"affinity": overlap.tolist(), "cost": found["cost"] + cost}


def search_of(cell: Cell, config: Config, settings: TrainSettings) -> tuple[SearchOptions, TrainSettings]:
    """The options and settings of a SEARCH, with its own changes."""
    budget = {"budget": cell.budget} if cell.budget else {}
    section = config.search.model_copy(update=budget | dict(cell.options))
    options = config.model_copy(update={"search": section}).search_options()
    return options, replace(settings, search_share=section.share, average=section.average)


def _search(work: Work) -> Result:
    options, settings = search_of(work.cell, work.config, work.settings)
    found = search(
        work.spec, work.data, settings, options, baseline=False, splits=work.splits, context=work.contexts(SEARCH)
    )
    chosen = next(candidate for candidate in found.candidates if candidate["stage"] == found.chosen)
    return _result(found.network, found.score, found.metrics, found.cost) | {
        "chosen": found.chosen,
        "distilled": found.distilled,
        "candidates": found.candidates,
        "affinity": found.affinity,
        "costs": found.costs,
        "probabilities": chosen["probabilities"],
        "score_parts": _parts(found.network, work),
    }


def own_method(work: Work) -> Result:
    """Call a method of another package, `(spec, data, settings, budget, splits) -> Trained`.

    It trains a network as the functions of `dmtg_core.search.baselines` do. `Trained.cost` is its whole training,
    in runs of naive MTL.

    Raises:
        UserError: If it returns something else.
    """
    method = load("method", work.cell.label)
    done: object = method(work.spec, work.data, work.settings, work.cell.budget, work.splits)
    if not isinstance(done, Trained):
        raise UserError(
            f"method {work.cell.label} must return dmtg_core.search.baselines.Trained, got {type(done).__name__}",
            where="compare.methods",
            remedy="return the result of train_within or train_hard",
            wrong_use=True,
        )
    return _result_of(done)


def _trees(work: Work) -> Result:
    """One ensemble for each task. Its cost is not one of operations, so it is 0; `seconds` has the duration."""
    tasks, threads = work.spec.tasks, torch.get_num_threads()
    done = train_trees(
        work.cell.label, tasks, work.data, splits=work.splits, seed=work.settings.seed, threads=threads
    )
    grouping = {f"group_{n}": [task.name] for n, task in enumerate(tasks)}
    figures = {"score": done.score, "metrics": done.metrics}
    return {"grouping": grouping, **figures, "cost": 0.0, "flops": 0, "parameters": 0}


TRAIN: Mapping[Kind, Callable[[Work], Result]] = {
    Kind.NAIVE: _naive,
    Kind.AFFINITIES: _affinities,
    Kind.WIDE: _wide,
    Kind.DISTILLED_WIDE: _distilled_wide,
    Kind.GROUPING: _grouping,
    Kind.PAIR: _pair,
    Kind.PROPOSAL: _proposal,
    Kind.SEARCH: _search,
    Kind.HEADS_ALONE: _heads_alone,
    Kind.FULL_FINETUNING: _full_finetuning,
    Kind.TREE_ENSEMBLES: _trees,
    Kind.OWN: own_method,
}
