"""Preparation of cells, which `dmtg compare` and `dmtg signal` share: folder, executor, checks, and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from dmtg_core.tasks import Task
from pipelines.compare.job import CellJob
from pipelines.compare.training import train_cell
from pipelines.config.loading import Config
from pipelines.data.manifest import Manifest
from pipelines.errors import UserError
from pipelines.execution.choice import open_executor
from pipelines.execution.executor import Executor
from pipelines.execution.resources import cells_cpus, processes
from pipelines.runs.identity import folder_name, record_identity
from pipelines.runs.lease import only_one
from pipelines.storage import Location
from pipelines.training.checks import Prepared, check_network, open_folder, prepare, write_config


def open_cells_folder(config: Config, kind: str) -> tuple[Config, Location]:
    """Check the options and open the folder of the cells.

    Args:
        config: Configuration of the command.
        kind: `compare` or `signal`, a part of the folder's name.

    Returns:
        The configuration with the folder's name, and the folder.

    Raises:
        UserError: As `Config.check_options` and `open_folder`.
    """
    config.check_options()
    return open_folder(config, config.run.name or folder_name(config, kind))


@contextmanager
def cells_session(
    config: Config, log: Callable[[str], None], folder: Location, manifest: Manifest
) -> Iterator[tuple[Prepared, Executor]]:
    """Open the executor, prepare the data, and check everything that can be checked before a cell is trained.

    There is one session for a folder of cells at a time.

    Raises:
        UserError: For the first problem.
    """
    section = config.ray
    with (
        only_one(folder, f"job that trains {folder.name}", log),
        open_executor(
            section, processes=processes(section), imports=[train_cell.__module__], cpus=cells_cpus(section)
        ) as executor,
    ):
        yield prepare(config, executor, log, partial(check_cells, config), manifest), executor


def check_cells(config: Config, manifest: Manifest, tasks: tuple[Task, ...]) -> None:
    """Check that cells can be trained: there are tasks to group, and every network is trained from scratch.

    Raises:
        UserError: For the first problem.
    """
    check_network(config, manifest, tasks)
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


def cell_job(data: Prepared, executor: Executor, folder: Location) -> CellJob:
    """Write the configuration into the folder, and load the input of the cells."""
    write_config(data.config, folder)
    record_identity(folder, data.config, data.manifest.digest())
    return unwritten_job(data, executor, folder)


def unwritten_job(data: Prepared, executor: Executor, folder: Location) -> CellJob:
    """Load the input of the cells, without a change of the folder."""
    return CellJob(data.config, data.training, data.samples(executor), folder, data.reader)
