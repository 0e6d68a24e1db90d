"""The cells of a comparison: one network or one search, trained with one seed, as a Ray task that leaves a file.

A cell that has its file is never trained again: a comparison that was killed goes on, and methods that come to the
same grouping share its cell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dmtg_core.grouping import Grouping
from dmtg_core.network.cost import inference_cost, naive_flops, training_flops, wide_spec
from dmtg_core.network.grouping_network import GroupingNetwork, NetworkSpec
from dmtg_core.search.affinity_phase import affinity_plan, compare_tasks
from dmtg_core.search.baselines import (
    Trained,
    hard_network,
    together,
    train_distilled,
    train_hard,
    train_naive_with_affinities,
)
from dmtg_core.search.feature_overlap import cluster
from dmtg_core.search.search import search
from dmtg_core.training.context import LocalContext
from dmtg_core.training.data import Data
from dmtg_core.training.loop import score_of
from dmtg_core.training.metrics import Metrics
from dmtg_core.training.settings import TrainSettings
from dmtg_core.training.state import TrainState
from pipelines.cluster import user_error
from pipelines.config.loading import Config
from pipelines.data.ingest import open_data
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.storage import Location
from pipelines.training.ray.failures import permanent_error, training_failed

CELLS = "cells"
FORMAT = 2  # 1: AUROC from bins, and more than ten branches in a wrong order
NAIVE, AFFINITIES, WIDE, DISTILLED_WIDE, GROUPING, PAIR, PROPOSAL, SEARCH = (
    "naive_mtl", "affinities", "wide", "wide_distilled", "grouping", "pair", "proposal", "search"
)  # fmt: skip
Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One thing to train.

    Args:
        kind: NAIVE, AFFINITIES (naive MTL again, with the affinities that published selectors collect on its way:
            with many tasks they take far longer than the run), WIDE, DISTILLED_WIDE (the best of three wide
            encoders, which learns on from all of them), GROUPING, PAIR, PROPOSAL (the groups that the guided
            search starts from, trained as they are) or SEARCH.
        seed: Of initial weights, order of data and gate noise.
        epochs: How many, where it is not `train.epochs`; 0 for these.
        groups: The groups of a GROUPING; the tasks of a PAIR.
        options: What a SEARCH changes in the search section.
        label: Of a SEARCH, for its name.
    """

    kind: str
    seed: int
    epochs: int = 0
    groups: tuple[tuple[str, ...], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """The same for the same cell."""
        what = self.label or self.kind
        if self.kind == GROUPING:
            what = f"{self.kind}_{Grouping.of(self.groups).name}"
        elif self.kind == PAIR:
            what = f"{self.kind}_{Grouping.of(self.groups).name}_of_{len(self.groups[0])}"
        return f"{what}{f'_{self.epochs}epochs' if self.epochs else ''}_seed{self.seed}"

    @classmethod
    def of(cls, grouping: Grouping, seed: int, epochs: int = 0) -> Cell:
        """A grouping to be trained from scratch."""
        return cls(GROUPING, seed, epochs, grouping.groups)


@dataclass(frozen=True)
class CellJob:
    """What every cell of a comparison needs, sent to it whole."""

    config: Config
    reader: Reader
    held: Mapping[str, Any] | None
    run: Location


def train_cells(job: CellJob, cells: Iterable[Cell], log: Callable[[str], None]) -> dict[Cell, Result]:
    """The results of some cells, those that are there read and the others trained as Ray tasks.

    Raises:
        UserError: When a cell cannot be trained; those that can are trained first.
    """
    import ray

    wanted = list(dict.fromkeys(cells))
    files = {cell: job.run / CELLS / f"{cell.name}.json" for cell in wanted}
    there = {cell: file.read_json() for cell, file in files.items() if file.exists()}
    found = {cell: result for cell, result in there.items() if result.get("format") == FORMAT}
    left = [cell for cell in wanted if cell not in found]
    if not left:
        return found
    if len(found) < len(there):
        log(f"{len(there) - len(found)} results are of an earlier version, whose figures differ: trained again")
    log(f"{len(left)} of {len(wanted)} networks and searches to train")
    task = ray.remote(train_cell).options(
        num_cpus=job.config.ray.cpus_per_worker, num_gpus=job.config.ray.gpus_per_worker or None,
        max_retries=job.config.ray.max_failures, retry_exceptions=False,
    )  # fmt: skip
    shared = ray.put(job)
    waiting = {task.remote(shared, cell): cell for cell in left}
    failed: list[UserError] = []
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting))
        cell = waiting.pop(ready)
        try:
            found[cell] = ray.get(ready)
        except ray.exceptions.RayError as error:  # told below, once the others have ended
            failed.append(user_error(error) or training_failed(error, str(job.run)))
            log(f"{cell.name} failed: {failed[-1].what}")
            continue
        done = len(left) - len(waiting) - len(failed)
        log(f"{done}/{len(left)} {cell.name}: validation score {found[cell]['score']:.4f}")
    if failed:
        raise failed[0]
    return found


def train_cell(job: CellJob, cell: Cell) -> Result:
    """Train one cell, in a process of its own, and leave its file.

    Returns:
        `grouping`, `score` (mean logarithm of the validation losses), `metrics` by split, `cost` in units of one
        naive-MTL run, `flops` and `parameters` of inference, `seconds`; and what its kind adds.
    """
    context = LocalContext()
    config = job.config
    data = open_data(
        job.reader, job.held, config.data, seed=cell.seed, rank=0, world_size=1, device=context.device
    )
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


def _described(network: GroupingNetwork, score: float, metrics: Mapping[str, Metrics], cost: float) -> Result:
    return {
        "grouping": network.grouping().to_dict(),
        "score": score,
        "metrics": dict(metrics),
        "cost": cost,
        **asdict(inference_cost(network)),
    }


def _trained(done: Trained) -> Result:
    return _described(done.network, done.score, done.metrics, done.cost)


def _naive(
    _cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    return _trained(train_hard(hard_network(spec, together(spec)), data, settings, splits=splits))


def _affinities(
    _cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    done, affinities, costs = train_naive_with_affinities(spec, data, settings, splits=splits)
    return _trained(done) | {
        "affinities": {name: value.tolist() for name, value in affinities.items()},
        "affinity_costs": costs,
    }


def _wide(
    _cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    network = hard_network(wide_spec(spec), together(spec))
    done = train_hard(network, data, settings, splits=splits, unit=naive_flops(spec))
    return _trained(done)


def _distilled_wide(
    _cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], config: Config
) -> Result:
    # as many as a search has candidates
    specs = [replace(wide_spec(spec), seed=spec.seed + n) for n in range(3)]
    longer = config.search_options().distilled(settings)
    done = train_distilled(specs, data, settings, longer, splits=splits, unit=naive_flops(spec))
    return _trained(done)


def _grouping(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    network = hard_network(spec, Grouping.of(cell.groups, [task.name for task in spec.tasks]))
    done = train_hard(network, data, settings, splits=splits, unit=naive_flops(spec))
    return _trained(done)


def _pair(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], _config: Config
) -> Result:
    own = replace(spec, tasks=tuple(task for task in spec.tasks if task.name in cell.groups[0]))
    network = hard_network(own, together(own))
    done = train_hard(network, data, settings, splits=splits, unit=naive_flops(spec))
    return _trained(done)


def _proposal(
    _cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], config: Config
) -> Result:
    options, count = config.search_options(), min(spec.groups, len(spec.tasks))
    least, most = options.affinity_epochs(settings)
    wide, short = affinity_plan(spec, settings, most)
    compared = TrainState.fresh(GroupingNetwork(wide), short)
    overlap = compare_tasks(compared, data, short, LocalContext(), groups=count, least=least)
    grouping = Grouping.from_assignment([task.name for task in spec.tasks], cluster(overlap, count))
    unit = naive_flops(spec)
    done = train_hard(hard_network(spec, grouping), data, settings, splits=splits, unit=unit)
    share = training_flops(compared.network) * compared.epoch / (unit * settings.epochs)
    return _described(done.network, done.score, done.metrics, done.cost + share) | {"affinity": overlap.tolist()}


def _search(
    cell: Cell, spec: NetworkSpec, data: Data, settings: TrainSettings, splits: Sequence[str], config: Config
) -> Result:
    section = config.search.model_copy(update=dict(cell.options))
    options = config.model_copy(update={"search": section}).search_options()
    own = replace(settings, search_share=section.share)
    found = search(spec, data, own, options, baseline=False, splits=splits)
    chosen = next(candidate for candidate in found.candidates if candidate["stage"] == found.chosen)
    return _described(found.network, score_of(found.metrics["val"]), found.metrics, found.cost) | {
        "chosen": found.chosen,
        "distilled": found.distilled,
        "candidates": found.candidates,
        "affinity": found.affinity,
        "affinity_cost": found.affinity_cost,
        "probabilities": chosen["probabilities"],
    }


TRAIN: Mapping[str, Callable[..., Result]] = {
    NAIVE: _naive,
    AFFINITIES: _affinities,
    WIDE: _wide,
    DISTILLED_WIDE: _distilled_wide,
    GROUPING: _grouping,
    PAIR: _pair,
    PROPOSAL: _proposal,
    SEARCH: _search,
}
