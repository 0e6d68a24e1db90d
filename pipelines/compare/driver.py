"""`dmtg compare`: the search and its baselines over seeds, with paired intervals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from dmtg_core.addresses import CodeError, is_address, load
from dmtg_core.evaluation.trees import TREES, trees_apply
from dmtg_core.grouping import Grouping
from dmtg_core.names import listed
from dmtg_core.search.options import SearchOptions
from dmtg_core.tasks import Task
from pipelines.compare.cells import Result
from pipelines.compare.estimate import estimated
from pipelines.compare.job import CellJob
from pipelines.compare.methods import (
    BUDGETED,
    DISTILLED_WIDE,
    EXHAUSTIVE,
    EXHAUSTIVE_TASKS,
    FIXED,
    FULL_FINETUNING,
    HEADS_ALONE,
    MARK,
    NAIVE,
    WIDE,
    Comparison,
    first_cells,
    results_of,
    rows_of,
    second_cells,
)
from pipelines.compare.preparation import cell_job, cells_session, open_cells_folder, unwritten_job
from pipelines.compare.results import summary
from pipelines.compare.training import train_cells
from pipelines.config.code import allow_named, records_of
from pipelines.config.loading import Config
from pipelines.config.search_section import SearchSection
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.execution.executor import Executor
from pipelines.execution.resources import cells_cpus, processes
from pipelines.registry.tracking import connect, enabled, open_tracker
from pipelines.runs.files import CONFIG
from pipelines.runs.identity import earlier_verdict
from pipelines.storage import Location
from pipelines.training.checks import Prepared, folder_of_data

FOUND, PAGE = "compare.json", "compare.html"
WIDENED = (WIDE, DISTILLED_WIDE)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComparisonResult:
    """The result of a comparison.

    Args:
        folder: Folder of the comparison.
        run_id: MLflow run; empty without tracking.
        found: Content of `compare.json`.
    """

    folder: Location
    run_id: str
    found: dict[str, Any]

    @property
    def page(self) -> Location:
        """The report page."""
        return self.folder / PAGE


def compare(config: Config, log: Callable[[str], None] = logger.info) -> ComparisonResult:
    """Run a comparison to its end. It resumes where an earlier call with the same configuration stopped.

    Finished cells are not trained again, also if methods, budgets or seeds were added.

    Raises:
        UserError: For every problem, before training if it can be known by then.
    """
    from pipelines.compare.page import write_page

    with _opened(config, log) as (data, executor, folder):
        comparison, methods = _methods(config, data)
        job = cell_job(data, executor, folder)
        tracker = open_tracker(data.config, folder, data.manifest)
        results = train_methods(comparison, methods, job, executor, log)
        found = summary(comparison, data.tasks, methods, results, data.notes)
        found["code"] = records_of(config.model_dump(), data.tasks, methods=True)
        found |= {"name": folder.name, "signal": earlier_verdict(config, data.manifest.digest())}
        write_page(folder / PAGE, found, config)
        (folder / FOUND).write_json(found)
    artifacts = {name: (folder / name).read_text() for name in (PAGE, FOUND, CONFIG)}
    tracker.finish(_tracked(found), artifacts)
    return ComparisonResult(folder, tracker.run_id, found)


def dry_run(config: Config, log: Callable[[str], None] = logger.info) -> dict[str, Any]:
    """Run every check of `compare` that needs no training, and estimate its time. Its folder does not change.

    Shards that are missing are written, and so are the outputs of a frozen stem.

    Returns:
        The estimate, see `estimated`.

    Raises:
        UserError: As `compare`.
    """
    with _opened(config, log) as (data, executor, folder):
        comparison, methods = _methods(config, data)
        job = unwritten_job(data, executor, folder)
        at_once = processes(config.ray) if executor.embedded else 0
        return estimated(comparison, methods, job, executor, at_once)


@contextmanager
def _opened(config: Config, log: Callable[[str], None]) -> Iterator[tuple[Prepared, Executor, Location]]:
    """Check the configuration and the data; the data, the executor and the folder of the comparison."""
    for name, changes in config.compare.variants.items():
        check_variant(config, name, changes)
    check_encoder_of_methods(config)
    named, base = open_cells_folder(config, "compare")
    if enabled(config.track):
        connect(config.track)
    with (
        folder_of_data(config, named, base, cells_cpus(config.ray), log) as (named, folder, manifest),
        cells_session(named, log, folder, manifest) as (data, executor),
    ):
        yield data, executor, folder


def _methods(config: Config, data: Prepared) -> tuple[Comparison, list[str]]:
    methods = methods_of(config, data.tasks, data.manifest.description.input.kind)
    return Comparison(config, tuple(task.name for task in data.tasks)), methods


def _tracked(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that go to MLflow. Names of its metrics cannot have `MARK`."""
    ours = next((row for row in found["rows"] if row["method"] == found["reference"]), found["rows"][0])
    return {
        "split": found["split"],
        "metrics": {
            row["method"].replace(MARK, " "): {
                "gain": row["gain"]["value"],
                "gain_loss": row["gain_loss"]["value"],
                "training_cost": row["cost"],
            }
            for row in found["rows"]
        },
        "normalized_gain": ours["gain"]["value"],
        "grouping_name": "",
    }


def methods_of(config: Config, tasks: Sequence[Task], input_kind: str) -> list[str]:
    """The methods in order: naive MTL, the chosen methods, variants, and groupings.

    Raises:
        UserError: For a method that cannot run with these tasks or this encoder, and for a name that is taken.
    """
    check_encoder_of_methods(config)
    check_code_of_methods(config)
    trees = TREES if trees_apply(input_kind, tasks) else ()
    encoder = config.encoder_spec()
    frozen = (HEADS_ALONE, FULL_FINETUNING) if encoder.frozen and encoder.pretrained else ()
    chosen = [NAIVE, *config.compare.methods]
    if "methods" not in config.compare.model_fields_set:
        chosen = [name for name in chosen if encoder.can_widen or name not in WIDENED] + [*frozen, *trees]
    chosen = list(dict.fromkeys(chosen))
    if EXHAUSTIVE in chosen and len(tasks) > EXHAUSTIVE_TASKS:
        raise UserError(
            f"{len(tasks)} tasks have too many partitions to train them all",
            where="compare.methods: exhaustive",
            remedy=f"leave exhaustive out, or name at most {EXHAUSTIVE_TASKS} tasks in data.tasks",
            wrong_use=True,
        )
    if {*TREES} & {*chosen} and not trees:
        raise UserError(
            f"tree ensembles read tables, got {input_kind} input",
            where=f"compare.methods: {', '.join(name for name in chosen if name in TREES)}",
            remedy="leave them out of compare.methods",
            wrong_use=True,
        )
    own = [*config.compare.variants, *config.compare.groupings]
    others = {*FIXED, *BUDGETED, *(name for name in own if MARK not in name)}
    taken = [name for name in own if own.count(name) > 1 or name in {*FIXED, *BUDGETED}]
    taken += [name for name in own if MARK in name and name.partition(MARK)[0] in others]
    if taken:
        raise UserError(
            f"there is more than one {taken[0]}",
            where="compare.variants, compare.groupings",
            remedy="give each variant and each grouping its own name",
            wrong_use=True,
        )
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
    return chosen + own


def check_encoder_of_methods(config: Config) -> None:
    """Check methods that not every encoder can have.

    Raises:
        UserError: For a named method that this encoder cannot have.
    """
    encoder = config.encoder_spec()
    named = {*config.compare.methods} if "methods" in config.compare.model_fields_set else set()
    if {*WIDENED} & named and not encoder.can_widen:
        raise UserError(
            f"encoder {encoder.name} with branch {encoder.branch} has fixed widths and cannot be made wide",
            where="compare.methods: wide",
            remedy=f"leave {listed(WIDENED)} out of compare.methods",
            wrong_use=True,
        )
    if {HEADS_ALONE, FULL_FINETUNING} & named and not encoder.pretrained:
        raise UserError(
            f"encoder {encoder.name} has random initial weights",
            where=f"compare.methods: {HEADS_ALONE}, {FULL_FINETUNING}",
            remedy="name pretrained weights in network.options, or leave these methods out",
            wrong_use=True,
        )


def check_code_of_methods(config: Config) -> None:
    """Import the methods of other packages.

    Raises:
        UserError: For one that cannot be imported.
    """
    allow_named(config.model_dump())
    for method in filter(is_address, config.compare.methods):
        try:
            load("method", method)
        except CodeError as error:
            raise UserError(error.problem, where="compare.methods", remedy=error.remedy, wrong_use=True) from error


def check_variant(config: Config, name: str, changes: dict[str, Any]) -> None:
    """Check that the changes of a variant are those of a search.

    Raises:
        UserError: For an unknown key, and for a key that has no effect in a comparison.
    """
    where = f"compare.variants.{name}"
    section = checked(SearchSection, config.search.model_dump() | changes, where)
    config.model_copy(update={"search": section}).search_options(where)
    allowed = {"share", "average", *SearchOptions.__dataclass_fields__} - {"budget"}
    other = sorted(set(changes) - allowed)
    if other:
        raise UserError(
            f"a search of a comparison does not depend on {other[0]}",
            where=f"{where}.{other[0]}",
            remedy="set compare.budgets for all methods"
            if other[0] == "budget"
            else f"change one of {', '.join(sorted(allowed))}",
            wrong_use=True,
        )


def train_methods(
    comparison: Comparison,
    methods: Sequence[str],
    job: CellJob,
    executor: Executor,
    log: Callable[[str], None],
) -> dict[str, dict[int, list[Result]]]:
    """Train all cells: the first cells, then those that need their results.

    Returns:
        Row → seed → results, see `rows_of`.
    """
    seeds, rows = comparison.config.compare.seeds, rows_of(comparison, methods)
    first = chain.from_iterable(first_cells(comparison, *row, s) for s in seeds for row in rows.values())
    found = train_cells(job, executor, first, log)
    wanted = chain.from_iterable(second_cells(comparison, *row, s, found) for s in seeds for row in rows.values())
    found |= train_cells(job, executor, wanted, log)
    return {
        name: {seed: results_of(comparison, *row, seed, found) for seed in seeds} for name, row in rows.items()
    }
