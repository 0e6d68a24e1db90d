"""`dmtg train`: checks, shards, training, publishing. Each step resumes what an earlier call has left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.execution.choice import open_executor
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.execution.executor import Executor
from pipelines.registry.models import Registered
from pipelines.registry.tracking import Tracker, connect, enabled, open_tracker
from pipelines.runs.events import for_result
from pipelines.runs.files import EVENTS, REPORT, RESULT, SEARCHED, read_jsonl
from pipelines.runs.identity import open_run
from pipelines.runs.models import check_models
from pipelines.runs.warm_start import baseline_notes, keep_models, open_models
from pipelines.storage import Location
from pipelines.training.checks import Prepared, check_network, prepare, write_config
from pipelines.training.finetune import train_groups
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


def train(config: Config, log: Callable[[str], None] = logger.info) -> Trained:
    """Run a configuration to its end; resumes what an earlier call with the same configuration has left.

    Raises:
        UserError: For any error of the user, before training starts if it can be known then.
    """
    run, models = _open(config)
    finished = (run / RESULT).exists()
    # a finished run needs no executor
    with EmbeddedExecutor(config.ray) if finished else open_executor(config.ray) as executor:
        data = prepare(config, executor, log, partial(check_network, config, models=models, log=log))
        for note in data.notes:
            log(f"note: {note}")
        if finished:
            tracker = reopen_tracker(config, run, data.manifest)
            log(f"this run is finished: {run} (give another run.name to train again)")
        else:
            tracker = open_tracker(config, run, data.manifest)
            write_config(config, run)
            with open_workers(data, executor, log) as (chosen, workers):
                train_monitored(_job(chosen, data, run, models), data, workers, tracker, log)
    registered = publish(config, run, tracker, data.manifest, log)
    return Trained(run, tracker.run_id, (run / RESULT).read_json(), registered, finished)


def _open(config: Config) -> tuple[Location, WarmStart | None]:
    """The run folder, and the models that the network starts from."""
    run = open_run(config)
    config.check_options()
    check_models(config, run)
    if enabled(config.track) and not (run / RESULT).exists():
        connect(config.track)  # before shards are written, which can take hours
    return run, open_models(config, run)


def _job(config: Config, data: Prepared, run: Location, models: WarmStart | None) -> Job:
    """The job of the workers, without its tables and its event log."""
    start = keep_models(models, run)
    notes = (*data.notes, *baseline_notes(config, start))
    return Job(config, data.reader, None, run, notes, start, details=True)


def train_monitored(
    job: Job, data: Prepared, executor: Executor, tracker: Tracker, log: Callable[[str], None]
) -> None:
    """Train a job and copy its metrics and events to the terminal and the tracker meanwhile.

    Args:
        job: The job, without its tables and its event log.
        data: The data set of the job.
        executor: The executor of its workers.
        tracker: The tracker of the run.
        log: Called with each line.
    """
    config, earlier = job.config, read_jsonl(job.run / EVENTS)
    held, event_log = data.samples(executor), new_event_log(executor)
    plan = Plan.of(config, config.network_spec(data.manifest.description.input, data.tasks))
    with (
        display(plan) as live,
        monitoring(job.run, executor, event_log, tracker, log, earlier, live),
    ):
        notes = (*job.notes, *for_result(earlier))
        train_job(replace(job, held=held, notes=notes, event_log=event_log), executor, log)


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
