"""What each training worker does: data, search, results. It runs inside Ray Train."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmtg_core.network.grouping_network import NetworkSpec
from dmtg_core.search.search import SearchResult, search
from dmtg_core.training import checkpoint
from dmtg_core.training.data import Data
from dmtg_core.training.profile import profile_steps
from pipelines.config.loading import Config
from pipelines.data.ingest import open_data
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.runs.events import for_result
from pipelines.runs.files import DETAILS, PROFILE, RESULT, SEARCHED
from pipelines.runs.models import warm_start
from pipelines.runs.results import write_result
from pipelines.storage import Location
from pipelines.training.ray.context import RayContext
from pipelines.training.ray.events import emitter, events_after
from pipelines.training.ray.failures import PermanentError, permanent_error
from pipelines.training.ray.watchdog import MonitoredData, StepReporter


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, sent to it whole.

    Args:
        held: References to the tables of each split in shared memory; None to stream.
        notes: Warnings to keep beside the result, such as tasks with thin support.
        start: Names and places of the models to start from, kept in the run folder.
        board: Where to tell the driver what happens.
        profile: Only measure some steps.
        details: Also write what the run's page shows beside the result.
    """

    config: Config
    reader: Reader
    held: Mapping[str, Any] | None
    run: Location
    notes: tuple[str, ...] = ()
    start: tuple[tuple[str, Location], ...] = ()
    event_log: Any = None
    profile: bool = False
    details: bool = False


def work(values: dict[str, Any]) -> None:
    """The training function of Ray Train.

    Raises:
        LastingError: For what other workers would meet again.
    """
    job: Job = values["job"]
    context = RayContext(job.run, emitter(job.event_log), job.config.ray.hung_after_s)
    try:
        # each worker on a machine gets its share of the cores
        torch.set_num_threads(max((os.cpu_count() or 1) // context.local_world_size, 1))
        if job.profile:
            with _explaining(job, context):
                _profile(job, context)
            return
        with _explaining(job, context):
            result = _search(job, context)
        if context.rank == 0:
            _keep(job, context, result)
    finally:
        context.close()


@contextmanager
def _explaining(job: Job, context: RayContext) -> Iterator[None]:
    """Errors that come from the configuration, as what they are."""
    try:
        yield
    except (RuntimeError, MemoryError, checkpoint.OutdatedNetworkError) as error:
        permanent = permanent_error(error, job.config, str(job.run), context.world_size)
        if permanent is None:
            raise
        raise permanent from error


def _open(job: Job, context: RayContext) -> tuple[NetworkSpec, Data]:
    config, reader = job.config, job.reader
    data = open_data(
        reader, job.held, config.data, seed=config.train.seed,
        rank=context.rank, world_size=context.world_size, device=context.device,
    )  # fmt: skip
    return config.network_spec(reader.manifest.description.input, reader.tasks), MonitoredData(
        data, context.watchdog, StepReporter(job.event_log) if context.rank == 0 else None
    )


def _search(job: Job, context: RayContext) -> SearchResult:
    config, (spec, data) = job.config, _open(job, context)
    splits = [split for split in ("val", "test") if job.reader.manifest.rows(split)]
    return search(
        spec, data, config.settings(), config.search_options(), baseline=config.search.baseline,
        splits=splits, context=context, warm_start=warm_start(job.start),
    )  # fmt: skip


def _profile(job: Job, context: RayContext) -> None:
    spec, data = _open(job, context)
    with tempfile.TemporaryDirectory(prefix="dmtg-") as folder:
        profile_steps(spec, data, job.config.settings(), context, Path(folder))
        if context.rank == 0:
            for file in sorted(Path(folder).iterdir()):
                (job.run / PROFILE / file.name).write_bytes(file.read_bytes())


def _keep(job: Job, context: RayContext, result: SearchResult) -> None:
    """The result in the run folder, after the checkpoint from which another call would come to the same."""
    whole = context.flush()
    last = "the last checkpoint, without training again" if whole else "the last whole checkpoint"
    run = job.run if whole else job.run.retrying(0)  # it has been waited for long enough
    try:
        if job.details:
            write_details(job, run, result)
        notes = (*job.notes, *warnings_of(context.records), *for_result(events_after(job.event_log)))
        write_result(run, result, notes, SEARCHED if job.config.search.group_epochs else RESULT)
    except UserError as error:
        raise PermanentError(
            f"training is done, its result {error.what.removeprefix('cannot write: ')}",
            where=error.where,
            remedy=f"{error.remedy}; then run the same words again: they go on from {last}",
        ) from error


def write_details(job: Job, run: Location, result: SearchResult) -> None:
    """What the run's page shows beside the result."""
    from pipelines.training.diagnostics import details_of  # the report reads what is written here

    config = job.config
    spec = config.network_spec(job.reader.manifest.description.input, job.reader.tasks)
    found = details_of(
        result, job.reader, spec,
        samples=config.run.samples, batch_size=config.train.batch_size, seed=config.train.seed,
    )  # fmt: skip
    (run / DETAILS).write_json(found)


def warnings_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the epochs of a run have warned of, each once, with the stage."""
    logged = [f"{record['stage']}: {warning}" for record in records for warning in record.get("warnings", ())]
    return list(dict.fromkeys(logged))
