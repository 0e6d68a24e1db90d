"""The training function of a worker, of any executor: data, search and results."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dmtg_core.addresses import CodeError
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.own_code import code_of_tasks
from dmtg_core.search.options import DISTILLED
from dmtg_core.search.search import SearchResult, search
from dmtg_core.training import checkpoint
from dmtg_core.training.data import Data
from dmtg_core.training.diagnostics import conflicts
from dmtg_core.training.loop import rows_evaluated
from dmtg_core.training.metrics import normalized_gain
from dmtg_core.training.profile import profile_steps
from dmtg_core.training.settings import is_compiled
from pipelines.config.code import allow_named, check_allowed, records_of
from pipelines.config.loading import Config
from pipelines.data.ingest import open_data
from pipelines.data.reader import Reader
from pipelines.errors import UserError
from pipelines.execution.executor import Held
from pipelines.runs.events import EventLog, LocalEventLog, for_result
from pipelines.runs.files import DETAILS, PROFILE, RESULT, SEARCHED
from pipelines.runs.models import warm_start
from pipelines.runs.results import write_result
from pipelines.scratch import temporary_folder
from pipelines.storage import Location
from pipelines.training.context import RunContext
from pipelines.training.failures import PermanentError, permanent_error
from pipelines.training.watchdog import MonitoredData, StepReporter


@dataclass(frozen=True)
class Job:
    """The input of a worker.

    Args:
        held: The tables of each split that the executor holds; None to stream.
        notes: Warnings to store with the result, such as tasks with low support.
        start: Names and places of the models to start from, in the run folder.
        event_log: Receives the events of the worker.
        profile: Only measure some steps.
        details: Also write the details of the run's page.
        trees: The figures of extra trees, to store with the result.
        outputs: Reader of the outputs of a frozen stem, whose tables are `held`; None if training reads inputs.
        estimate: File for the estimate before the start; None for no estimate. A file that exists is kept.
        dry_run: End with the estimate.
    """

    config: Config
    reader: Reader
    held: Mapping[str, Sequence[Held]] | None
    run: Location
    notes: tuple[str, ...] = ()
    start: tuple[tuple[str, Location], ...] = ()
    event_log: EventLog = field(default_factory=LocalEventLog)
    profile: bool = False
    details: bool = False
    trees: Mapping[str, Any] = field(default_factory=dict)
    outputs: Reader | None = None
    estimate: Location | None = None
    dry_run: bool = False

    @property
    def training(self) -> Reader:
        """The reader of what training reads."""
        return self.outputs or self.reader

    def allow_code(self) -> None:
        """Allow the code of other packages that the job names in this process."""
        allow_named(self.config.model_dump())
        check_allowed(code_of_tasks(self.reader.tasks), trust_code=self.config.run.trust_code)

    @property
    def spec(self) -> NetworkSpec:
        """The configured network."""
        return self.config.network_spec(self.reader.manifest.description.input, self.reader.tasks)


def work(job: Job, context: RunContext) -> None:
    """The training function.

    Raises:
        PermanentError: For an error that retrying cannot help.
    """
    try:
        job.allow_code()
        if job.profile:
            with _permanent_errors(job, context):
                _profile(job, context)
            return
        with _permanent_errors(job, context):
            if job.estimate is not None and not job.estimate.exists():
                _estimate(job, job.estimate, context)
            if job.dry_run:
                return
            result = _search(job, context)
        if context.rank == 0:
            _write(job, context, result)
    finally:
        context.close()


@contextmanager
def _permanent_errors(job: Job, context: RunContext) -> Iterator[None]:
    """Convert errors whose cause is the configuration to a `PermanentError`."""
    try:
        yield
    except (RuntimeError, MemoryError, checkpoint.OutdatedNetworkError, CodeError) as error:
        permanent = permanent_error(error, job.config, str(job.run), context.world_size)
        if permanent is None:
            raise
        raise permanent from error


def _open(job: Job, context: RunContext, *, reports: bool = True) -> tuple[NetworkSpec, Data]:
    """The network and the data, which report the steps of training to the event log."""
    config = job.config
    data = open_data(
        job.training, job.held, config.data, seed=config.train.seed,
        rank=context.rank, world_size=context.world_size, device=context.device,
    )  # fmt: skip
    reporter = StepReporter(job.event_log) if reports and context.rank == 0 else None
    return job.spec, MonitoredData(data, context.watchdog, reporter)


def _search(job: Job, context: RunContext) -> SearchResult:
    config, (spec, data) = job.config, _open(job, context)
    splits = [split for split in ("val", "test") if job.reader.manifest.rows(split)]
    return search(
        spec, data, config.settings(), config.search_options(), baseline=config.search.baseline,
        splits=splits, context=context, warm_start=warm_start(job.start, trust_code=config.run.trust_code),
    )  # fmt: skip


def _estimate(job: Job, file: Location, context: RunContext) -> None:
    """Write the estimate before the search starts."""
    from pipelines.training.estimate import estimated

    config, (spec, data) = job.config, _open(job, context, reports=False)
    start = warm_start(job.start, trust_code=config.run.trust_code)
    rows = -(-job.reader.manifest.rows("val") // context.world_size)
    batch = rows_evaluated(spec, config.settings(), compiled=is_compiled(config.settings(), context.device))
    found = estimated(
        spec, data, config.settings(), config.search_options(), context, baseline=config.search.baseline,
        champion=start is not None and start.is_grouping(spec.tasks),
        validation=-(-rows // batch),
    )  # fmt: skip
    if context.rank == 0:
        file.write_json(found)


def _profile(job: Job, context: RunContext) -> None:
    spec, data = _open(job, context)
    with temporary_folder() as folder:
        profile_steps(spec, data, job.config.settings(), context, folder)
        if context.rank == 0:
            for file in sorted(folder.iterdir()):
                (job.run / PROFILE / file.name).write_bytes(file.read_bytes())


def _write(job: Job, context: RunContext, result: SearchResult) -> None:
    """Write the result into the run folder, after the checkpoint from which another call gets the same result."""
    whole = context.flush()
    last = "the last checkpoint, without training again" if whole else "the last whole checkpoint"
    run = job.run if whole else job.run.retrying(0)  # `flush` has waited long enough
    try:
        if job.details:
            write_details(job, run, result)
        warned = (*warnings_of(context.records), *conflict_notes(context.records, result))
        notes = (*job.notes, *warned, *for_result(job.event_log.after(0)))
        file = SEARCHED if job.config.search.group_epochs else RESULT
        estimate = job.estimate.read_json() if job.estimate is not None and job.estimate.exists() else None
        code = records_of(job.config.model_dump(), job.reader.tasks)
        write_result(run, result, job.spec, notes, file, job.trees, estimate, code)
    except UserError as error:
        raise PermanentError(
            f"training is done, its result {error.what.removeprefix('cannot write: ')}",
            where=error.where,
            remedy=f"{error.remedy}; then run the same command again: it resumes from {last}",
        ) from error
    except OSError as error:  # of the files from which it is stored
        raise PermanentError(
            f"training is done, its result cannot be written: {error}",
            where=tempfile.gettempdir(),
            remedy=f"free space there, or set TMPDIR, and run the same command again: it resumes from {last}",
        ) from error


def write_details(job: Job, run: Location, result: SearchResult) -> None:
    """Write the details of the run's page."""
    from pipelines.training.diagnostics import details_of  # imports the report

    config = job.config
    found = details_of(
        result, job.reader, job.spec,
        samples=config.run.samples, batch_size=config.train.batch_size, seed=config.train.seed,
    )  # fmt: skip
    (run / DETAILS).write_json(found)


def conflict_notes(records: Sequence[Mapping[str, Any]], result: SearchResult) -> list[str]:
    """Notes on two tasks of a group with conflicting gradients, of which one is worse than with naive MTL."""
    if len(result.grouping.groups) == 1:
        return []
    chosen = DISTILLED if result.distilled.get("kept") else result.chosen
    history, tasks = [one for one in records if one["stage"] == chosen], result.network.spec.tasks
    naive, metrics = result.baseline.get("val"), result.metrics["val"]
    lost = {task.name for task in tasks if naive and normalized_gain([task], metrics, naive) < 0}
    found = []
    for a, b, cosine in conflicts(history, [task.name for task in tasks]):
        worse = [name for name in (a, b) if name in lost]
        if worse or not naive:
            behind = f", and {' and '.join(worse)} lost against naive MTL" if worse else ""
            found.append(
                f"{a} and {b} share a group and their gradients conflict (mean cosine {cosine:.2f}){behind}: "
                "try more groups (network.groups) or more starts (search.starts)"
            )
    return found


def warnings_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The warnings of all epochs, each once, with the stage."""
    found = [f"{record['stage']}: {warning}" for record in records for warning in record.get("warnings", ())]
    return list(dict.fromkeys(found))
