"""`dmtg train`: checks, shards, training, publishing. Each step resumes what an earlier call has left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.data.manifest import read_manifest
from pipelines.data.renewal import ready_shards
from pipelines.execution.choice import open_executor
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.execution.executor import Executor
from pipelines.monitoring.exporter import Exporter
from pipelines.monitoring.opening import open_exporters
from pipelines.monitoring.ray_metrics import RayExporter
from pipelines.registry.models import Registered
from pipelines.registry.tracking import Tracker, connect, enabled, open_tracker
from pipelines.runs.events import for_result
from pipelines.runs.files import (
    ESTIMATE,
    EVENTS,
    METRICS,
    PROFILE,
    REGISTERED,
    REPORT,
    RESULT,
    SEARCHED,
    TRACKING,
    read_jsonl,
)
from pipelines.runs.identity import data_of, open_run, record_identity, results_folder
from pipelines.runs.lease import Lease, only_one
from pipelines.runs.models import check_models
from pipelines.runs.warm_start import baseline_notes, keep_models, open_models
from pipelines.storage import Location, locate
from pipelines.training.checks import Prepared, check_network, prepare, write_config
from pipelines.training.finetune import train_groups
from pipelines.training.measures.trees import tree_figures
from pipelines.training.monitor import monitoring
from pipelines.training.progress import Plan, display
from pipelines.training.publish import publish, reopen_tracker
from pipelines.training.worker import Job
from pipelines.training.workers import new_event_log, open_workers, run_workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Args:
        run: The run folder.
        run_id: MLflow run; empty without tracking.
        result: The contents of `result.json`.
        models: The registered models.
        resumed: Whether an earlier call had finished the run.
    """

    run: Location
    run_id: str
    result: dict[str, Any]
    models: list[Registered]
    resumed: bool

    @property
    def report(self) -> Location:
        """The report page."""
        return self.run / REPORT


def train(
    config: Config, log: Callable[[str], None] = logger.info, *, reuse: bool = False, renew: bool = True
) -> Trained:
    """Run a configuration to its end; resumes what an earlier call with the same configuration and data has left.

    Args:
        config: The configuration.
        log: Called with each line.
        reuse: Use the result of a finished run of the configuration even if the data has changed since.
        renew: Compare the shards with the raw data of the configuration first. A nightly run does not: its shards
            are those of its date.

    Raises:
        UserError: For any error of the user, before training starts if it can be known then. One error is that
            another job trains the same run.
    """
    base = open_run(config)
    config.check_options()
    with open_exporters(config.track) as exporters:
        return _train(config, base, exporters, log, reuse, renew)


def _train(
    config: Config,
    base: Location,
    exporters: Sequence[Exporter],
    log: Callable[[str], None],
    reuse: bool,
    renew: bool,
) -> Trained:
    """See `train`: the shards, and the folder of the run."""
    ready = ready_shards(config, log) if renew else read_manifest(locate(config.data.shards))
    folder = partial(results_folder, config, base, log=log, named=bool(config.run.name), reuse=reuse)
    run = base if ready is None else folder(ready.digest())
    models = _open(config, run)
    finished = ready is not None and (run / RESULT).exists()
    # a finished run needs no executor
    with EmbeddedExecutor(config.ray) if finished else open_executor(config.ray) as executor:
        data = prepare(config, executor, log, partial(check_network, config, models=models, log=log), ready)
        for note in data.notes:
            log(f"note: {note}")
        if ready is None:
            run = folder(data.manifest.digest())
            models = models if run == base else _open(config, run)
        with only_one(run, f"job that trains {run.name}", log) as lease:
            return _train_once(config, run, models, data, executor, lease, exporters, log)


def dry_run(config: Config, log: Callable[[str], None] = logger.info) -> dict[str, Any]:
    """Run every check of `train` that needs no training, and estimate its time. The run does not change.

    Shards that are missing or stale are written.

    Returns:
        The estimate, see `estimated`.

    Raises:
        UserError: As `train`.
    """
    run = open_run(config)
    config.check_options()
    models, file = _open(config, run), run / PROFILE / ESTIMATE
    file.delete()
    with open_executor(config.ray) as executor:
        data = prepare(config, executor, log, partial(check_network, config, models=models, log=log))
        for note in data.notes:
            log(f"note: {note}")
        with open_workers(data, executor, log) as (chosen, workers):
            held, event_log = data.samples(workers), new_event_log(workers)
            job = Job(
                chosen, data.reader, held, run, start=keep_models(models, run / PROFILE), event_log=event_log,
                outputs=data.outputs, estimate=file, dry_run=True,
            )  # fmt: skip
            run_workers(job, workers, log)
    found: dict[str, Any] = file.read_json()
    return found


def _train_once(
    config: Config,
    run: Location,
    models: WarmStart | None,
    data: Prepared,
    executor: Executor,
    lease: Lease,
    exporters: Sequence[Exporter],
    log: Callable[[str], None],
) -> Trained:
    """Train and publish a run of which this is the only job."""
    finished = (run / RESULT).exists()
    if finished and data_of(run) not in ("", data.manifest.digest()):
        return _as_it_was(run)
    if finished:
        tracker = reopen_tracker(config, run, data.manifest)
        log(f"this run is finished: {run} (give another run.name to train again)")
    else:
        record_identity(run, config, data.manifest.digest(), data.manifest.description.preparation)
        tracker = open_tracker(config, run, data.manifest)
        write_config(config, run)
        with open_workers(data, executor, log) as (chosen, workers):
            train_monitored(_job(chosen, data, run, models), data, workers, tracker, log, exporters)
        lease.check()
    registered = publish(config, run, tracker, data.manifest, log)
    return Trained(run, tracker.run_id, (run / RESULT).read_json(), registered, finished)


def _as_it_was(run: Location) -> Trained:
    """A finished run on other data than the shards hold now: it cannot be published with these."""
    note = (run / TRACKING).read_json() if (run / TRACKING).exists() else {}
    models = (run / REGISTERED).read_json() if (run / REGISTERED).exists() else []
    registered = [Registered(**entry) for entry in models]
    return Trained(run, note.get("run_id", ""), (run / RESULT).read_json(), registered, resumed=True)


def _open(config: Config, run: Location) -> WarmStart | None:
    """Check what a run needs before shards are written; the models that the network starts from."""
    check_models(config, run)
    if enabled(config.track) and not (run / RESULT).exists():
        connect(config.track)  # before shards are written, which can take hours
    return open_models(config, run)


def _job(config: Config, data: Prepared, run: Location, models: WarmStart | None) -> Job:
    """The job of the workers, without its tables and its event log."""
    start = keep_models(models, run)
    notes = (*data.notes, *baseline_notes(config, start))
    estimate = run / ESTIMATE
    if not (run / METRICS).exists():
        estimate.delete()  # of a dry run or a call that was killed
    return Job(config, data.reader, None, run, notes, start, details=True, outputs=data.outputs, estimate=estimate)


def train_monitored(
    job: Job,
    data: Prepared,
    executor: Executor,
    tracker: Tracker,
    log: Callable[[str], None],
    exporters: Sequence[Exporter] = (),
) -> None:
    """Train a job and copy its metrics and events to the terminal, the tracker and monitoring systems meanwhile.

    Args:
        job: The job, without its tables and its event log.
        data: The data set of the job.
        executor: The executor of its workers.
        tracker: The tracker of the run.
        log: Called with each line.
        exporters: Exporters of metrics; on Ray, its endpoints have them as well.
    """
    config, earlier = job.config, read_jsonl(job.run / EVENTS)
    exporters = [*exporters, *([] if executor.embedded else [RayExporter()])]
    held, event_log = data.samples(executor), new_event_log(executor)
    trees = tree_figures(replace(job, held=held), executor, log)
    plan = Plan.of(config, config.network_spec(data.manifest.description.input, data.tasks))
    with (
        display(plan) as live,
        monitoring(job.run, executor, event_log, tracker, log, earlier, live, exporters),
    ):
        notes = (*job.notes, *for_result(earlier))
        train_job(replace(job, held=held, notes=notes, event_log=event_log, trees=trees), executor, log)


def train_job(
    job: Job,
    executor: Executor,
    log: Callable[[str], None],
    on_record: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Run the search and the training of the groups, as far as they are not finished, to the result of the run.

    Args:
        job: The job.
        executor: The executor of its workers.
        log: Called with each line.
        on_record: Called with the record of every epoch, if the executor is embedded.

    Raises:
        UserError: When training failed.
    """
    if not (job.run / SEARCHED).exists():
        run_workers(job, executor, log, on_record)
    if job.config.search.group_epochs:
        train_groups(job, executor, log)
