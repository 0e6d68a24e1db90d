"""`dmtg compare`: the search beside all that it should beat, over seeds, and what that says."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import yaml

from dmtg_core.grouping import Grouping
from dmtg_core.network.encoders import WIDTHS
from dmtg_core.search.options import SearchOptions
from dmtg_core.tasks import Task
from pipelines.cluster import session
from pipelines.compare.cells import NAIVE, Cell, CellJob, Result, train_cells
from pipelines.compare.methods import (
    EXHAUSTIVE_TASKS,
    FIRST,
    GUIDED,
    LONG,
    LONGER,
    Contest,
    entries,
    first_cells,
    last_cells,
    second_cells,
)
from pipelines.compare.results import comparison
from pipelines.config.loading import Config
from pipelines.config.sections import SearchSection
from pipelines.config.validation import checked
from pipelines.data.ingest import keeps_in_memory, load_splits
from pipelines.data.manifest import Manifest, support_notes
from pipelines.data.reader import Reader
from pipelines.data.shards import ensure_shards
from pipelines.errors import UserError
from pipelines.registry.tracking import connect, enabled, open_tracker, shown
from pipelines.runs.files import CONFIG
from pipelines.runs.identity import earlier_verdict, folder_name, open_run
from pipelines.storage import Location, locate
from pipelines.training.driver import check_data, check_network

FOUND, PAGE = "compare.json", "compare.html"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """What a comparison gave.

    Args:
        folder: Its folder.
        run_id: Its MLflow run; empty without tracking.
        found: The content of `compare.json`.
    """

    folder: Location
    run_id: str
    found: dict[str, Any]

    @property
    def page(self) -> Location:
        """The report page."""
        return self.folder / PAGE


def compare(config: Config, log: Callable[[str], None] = logger.info) -> Compared:
    """Run a comparison to its end, from wherever an earlier call with the same configuration got to.

    What has been trained is not trained again, also where methods or seeds were added since.

    Raises:
        UserError: For anything that stands in the way, before anything is trained where that can be known.
    """
    from pipelines.compare.page import write_page

    described, folder = open_folder(config, "compare")
    if enabled(config.track):
        connect(config.track)
    with cells_session(config):
        manifest = ensure_shards(config, log)
        tasks = check_cells(described, manifest, log)
        methods = methods_of(config, tasks)
        contest = Contest(config, tuple(task.name for task in tasks))
        tracker = open_tracker(described, folder, manifest)
        (folder / CONFIG).write_text(yaml.safe_dump(shown(described), sort_keys=False))
        job = cell_job(config, manifest, tasks, folder)
        results = train_both(contest, methods, job, log)
        notes = support_notes(manifest, tasks, config.data.min_support)
        found = comparison(contest, tasks, methods, results, notes)
        found |= {"name": folder.name, "signal": earlier_verdict(config)}
        write_page(folder / PAGE, found, config)
        (folder / FOUND).write_json(found)
    ours = next((row for row in found["rows"] if row["method"] == GUIDED), found["rows"][0])
    result = {
        "split": found["split"],
        "metrics": {
            row["method"]: {
                "gain": row["gain"]["value"],
                "gain_loss": row["gain_loss"]["value"],
                "training_cost": row["cost"],
            }
            for row in found["rows"]
        },
        "normalized_gain": ours["gain"]["value"],
        "grouping_name": "",
    }
    tracker.finish(result, {name: (folder / name).read_text() for name in (PAGE, FOUND, CONFIG)})
    return Compared(folder, tracker.run_id, found)


def open_folder(config: Config, what: str) -> tuple[Config, Location]:
    """The folder and the configuration that names it.

    Raises:
        UserError: When it cannot be written to, or belongs to another configuration; as `Config.check_options`.
    """
    config.check_options()
    name = config.run.name or folder_name(config, what)
    described = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return described, open_run(described)


@contextmanager
def cells_session(config: Config) -> Iterator[None]:
    """Ray with room for as many cells as the machine has cores for, and for the data tasks."""
    cpus = config.ray.cpus_per_worker
    at_once = config.ray.trials or max(int((os.cpu_count() or 1) // cpus), 1)
    least = config.ray.fewest * cpus + min(config.ray.data_cpus, 1)  # what any session needs
    with session(config.ray, max(at_once * cpus, least)):
        yield


def check_cells(config: Config, manifest: Manifest, log: Callable[[str], None]) -> tuple[Task, ...]:
    """Everything that can be known before a cell is trained; the tasks.

    Raises:
        UserError: For the first thing that is wrong.
    """
    tasks = check_data(config, manifest, locate(config.data.shards))
    check_network(config, manifest, tasks, None, log)
    if config.network.groups < 2 or len(tasks) < 2:
        raise UserError(
            f"nothing to group: {len(tasks)} tasks, {config.network.groups} group",
            where="data.tasks, network.groups",
            remedy="give at least two tasks and two groups",
            wrong_use=True,
        )
    if config.network.start_from:
        raise UserError(
            "a comparison trains every network from scratch",
            where=f"network.start_from={list(config.network.start_from)}",
            remedy="leave network.start_from out",
            wrong_use=True,
        )
    return tasks


def methods_of(config: Config, tasks: Sequence[Task]) -> list[str]:
    """The methods in their order, naive MTL first, with the variants and what runs at an equal budget.

    Raises:
        UserError: For a method that cannot be run on these tasks or this encoder, or a variant of a taken name.
    """
    chosen = list(dict.fromkeys((NAIVE, *config.compare.methods)))
    if "exhaustive" in chosen and len(tasks) > EXHAUSTIVE_TASKS:
        raise UserError(
            f"{len(tasks)} tasks have too many partitions to train them all",
            where="compare.methods: exhaustive",
            remedy=f"leave exhaustive out, or name at most {EXHAUSTIVE_TASKS} tasks in data.tasks",
            wrong_use=True,
        )
    if {"wide", "wide_distilled"} & {*chosen} and config.network.encoder not in WIDTHS:
        raise UserError(
            f"encoder {config.network.encoder} has fixed widths and cannot be made wide",
            where="compare.methods: wide",
            remedy="leave wide and wide_distilled out of compare.methods",
            wrong_use=True,
        )
    named = [*config.compare.variants, *config.compare.groupings]
    taken = [name for name in named if name in FIRST or name.endswith(LONG) or named.count(name) > 1]
    if taken:
        raise UserError(
            f"there is more than one {taken[0]}",
            where="compare.variants, compare.groupings",
            remedy="give what you add a name of its own",
            wrong_use=True,
        )
    for name, changes in config.compare.variants.items():
        checked_variant(config, name, changes)
    for name, groups in config.compare.groupings.items():
        try:
            Grouping.of(groups, [task.name for task in tasks])
        except ValueError as error:
            raise UserError(
                str(error),
                where=f"compare.groupings.{name}",
                remedy="put each task into one group",
                wrong_use=True,
            ) from error
    chosen += named
    if config.compare.equal_budget and GUIDED in chosen:
        chosen += [f"{name}{LONG}" for name, methods in LONGER.items() if {*methods} & {*chosen}]
    return chosen


def checked_variant(config: Config, name: str, changes: dict[str, Any]) -> None:
    """Whether a variant's changes make a search of a comparison.

    Raises:
        UserError: When not.
    """
    where = f"compare.variants.{name}"
    section = checked(SearchSection, config.search.model_dump() | changes, where)
    config.model_copy(update={"search": section}).search_options(where)
    able = {"share", *SearchOptions.__dataclass_fields__}
    other = sorted(set(changes) - able)
    if other:
        raise UserError(
            f"a search of a comparison does not depend on {other[0]}",
            where=f"{where}.{other[0]}",
            remedy=f"change one of {', '.join(sorted(able))}",
            wrong_use=True,
        )


def cell_job(config: Config, manifest: Manifest, tasks: Sequence[Task], folder: Location) -> CellJob:
    """What every cell needs; samples that fit are read once, into shared memory."""
    reader = Reader(locate(config.data.shards), manifest, tuple(tasks))
    held = load_splits(reader) if keeps_in_memory(reader, config.data) else None
    return CellJob(config, reader, held, folder)


def train_both(
    contest: Contest, methods: Sequence[str], job: CellJob, log: Callable[[str], None]
) -> dict[str, dict[int, list[Result]]]:
    """Method → seed → what it came to. First what needs nothing, then what follows from it, long runs last."""
    seeds = contest.config.compare.seeds
    base = [method.removesuffix(LONG) for method in methods]
    first: list[Cell] = list(chain.from_iterable(first_cells(contest, m, s) for s in seeds for m in base))
    found = train_cells(job, first, log)
    for cells, names in ((second_cells, base), (last_cells, methods)):
        found |= train_cells(
            job, chain.from_iterable(cells(contest, m, s, found) for s in seeds for m in names), log
        )
    return {method: {seed: entries(contest, method, seed, found) for seed in seeds} for method in methods}
