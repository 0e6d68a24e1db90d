"""`dmtg train`: checks, shards, tasks, training, publishing. Each step resumes what an earlier call has left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import yaml

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.tasks import Task
from dmtg_core.training.aggregation import load_aggregator
from dmtg_core.training.data import epoch_steps
from dmtg_core.training.step import WeighedLoss
from dmtg_core.training.warm_start import WarmStart
from pipelines.cluster import session
from pipelines.config.loading import Config
from pipelines.data.ingest import keeps_in_memory, load_splits
from pipelines.data.manifest import Manifest, check_shards, check_targets, support_notes
from pipelines.data.reader import Reader
from pipelines.data.shards import ensure_shards
from pipelines.errors import UserError
from pipelines.registry.models import Registered
from pipelines.registry.tracking import Tracker, connect, enabled, open_tracker, shown
from pipelines.runs.events import for_result
from pipelines.runs.files import CONFIG, EVENTS, REPORT, RESULT, SEARCHED, read_jsonl
from pipelines.runs.identity import open_run
from pipelines.runs.models import check_models
from pipelines.storage import Location, locate
from pipelines.training.finetune import train_groups
from pipelines.training.monitor import monitoring
from pipelines.training.progress import Plan, display
from pipelines.training.publish import publish, reopen_tracker
from pipelines.training.ray.trainer import run_workers
from pipelines.training.warm_start import baseline_notes, keep_models, open_models, warm_start_errors
from pipelines.training.worker import Job

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
    run = open_run(config)
    config.check_options()
    check_models(config, run)
    finished = (run / RESULT).exists()
    if enabled(config.track) and not finished:
        connect(config.track)  # before shards are written, which can take hours
    models = open_models(config, run)
    with session_if_needed(config):
        manifest = ensure_shards(config, log)
        tasks = check_all(config, manifest, locate(config.data.shards), models, log)
        notes = support_notes(manifest, tasks, config.data.min_support)
        for note in notes:
            log(f"note: {note}")
        if finished:
            tracker = reopen_tracker(config, run, manifest)
            log(f"this run is finished: {run} (give another run.name to train again)")
        else:
            tracker = open_tracker(config, run, manifest)
            (run / CONFIG).write_text(yaml.safe_dump(shown(config), sort_keys=False))
            start = keep_models(models, run)
            reader = Reader(locate(config.data.shards), manifest, tasks)
            job = Job(config, reader, None, run, (*notes, *baseline_notes(config, start)), start, details=True)
            train_monitored(job, tracker, log)
    registered = publish(config, run, tracker, manifest, log)
    return Trained(run, tracker.run_id, (run / RESULT).read_json(), registered, finished)


def train_monitored(job: Job, tracker: Tracker, log: Callable[[str], None]) -> None:
    """Train a job and copy its metrics and events to the terminal and the tracker meanwhile.

    Args:
        job: The job, without its tables and its event log.
        tracker: The tracker of the run.
        log: Called with each line.
    """
    config, reader, earlier = job.config, job.reader, read_jsonl(job.run / EVENTS)
    held = load_splits(reader) if keeps_in_memory(reader, config.data) else None
    plan = Plan.of(config, config.network_spec(reader.manifest.description.input, reader.tasks))
    with (
        display(plan) as live,
        monitoring(job.run, config.ray, tracker, log, earlier, live) as event_log,
    ):
        notes = (*job.notes, *for_result(earlier))
        train_job(replace(job, held=held, notes=notes, event_log=event_log), log)


def train_job(job: Job, log: Callable[[str], None]) -> None:
    """Run the search and the training of the groups, as far as they are not finished, to the result of the run.

    Raises:
        UserError: When training failed.
    """
    if not (job.run / SEARCHED).exists():
        run_workers(job, log)
    if job.config.search.group_epochs:
        train_groups(job, log)


@contextmanager
def session_if_needed(config: Config) -> Iterator[None]:
    """A Ray session, unless the run is finished."""
    run = locate(config.run.root) / config.run_name()
    if (run / RESULT).exists():
        yield
        return
    with session(config.ray):
        yield


def check_all(
    config: Config,
    manifest: Manifest,
    folder: Location,
    models: WarmStart | None = None,
    log: Callable[[str], None] = logger.info,
) -> tuple[Task, ...]:
    """Check data and network before a worker starts; the chosen tasks.

    Args:
        models: The models that the network starts from.

    Raises:
        UserError: For the first check that fails.
    """
    tasks = check_data(config, manifest, folder)
    check_network(config, manifest, tasks, models, log)
    return tasks


def check_data(config: Config, manifest: Manifest, folder: Location) -> tuple[Task, ...]:
    """Check the data; the chosen tasks.

    Raises:
        UserError: For the first check that fails.
    """
    tasks = manifest.tasks(config.data.tasks, str(folder))
    check_targets(manifest, tasks, str(folder))
    check_shards(folder, manifest, checksums=config.data.verify_checksums)
    check_workers(config, manifest)
    return tasks


def check_network(
    config: Config,
    manifest: Manifest,
    tasks: Sequence[Task],
    models: WarmStart | None = None,
    log: Callable[[str], None] = logger.info,
) -> None:
    """Check the network, and the models that it starts from.

    Raises:
        UserError: For the first check that fails.
    """
    with _section("network"):
        spec = config.network_spec(manifest.description.input, tasks)
        network = GroupingNetwork(spec)
    with _section("train"):
        WeighedLoss(network, aggregator=config.train.aggregator)
        if config.train.aggregator != "sum":
            load_aggregator(config.train.aggregator)
    if models is not None:
        with warm_start_errors():
            models.check(spec)
        for note in models.notes(spec):
            log(note)


def check_workers(config: Config, manifest: Manifest) -> None:
    """Check that the data can be divided among the workers, and that an epoch is as long for any number of them.

    Raises:
        UserError: When one of the checks fails.
    """
    fewest, most = config.ray.fewest, config.ray.most
    few = [split for split in manifest.shards if 0 < manifest.rows(split) < most]
    problem = f"split {few[0]} has {manifest.rows(few[0])} samples for {most} workers" if few else ""
    try:
        steps = [epoch_steps(manifest.rows("train"), config.train.batch_size, n) for n in (fewest, most)]
    except ValueError as error:
        problem = str(error)
    else:
        if steps[0] != steps[1]:
            problem = (
                f"an epoch of {manifest.rows('train')} samples has {steps[0]} batches for {fewest} workers and "
                f"{steps[1]} for {most}, which could not share the last one"
            )
    if problem:
        raise UserError(
            problem, where="ray.workers", remedy="lower the number of workers, or change train.batch_size"
        )


@contextmanager
def _section(name: str) -> Iterator[None]:
    """Convert a ValueError of `dmtg_core` to an error of a section of the configuration."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=name, remedy=f"correct the {name} section", wrong_use=True) from error
