"""`dmtg train`: checks, shards, Ray Train, registry and report, each step taken up where a call before left it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.tasks import Task
from dmtg_core.training.aggregation import load_aggregator
from dmtg_core.training.data import epoch_steps
from dmtg_core.training.step import WeighedLoss
from dmtg_core.training.warm_start import WarmStart
from pipelines.cluster import session, set_environment, user_error
from pipelines.config.loading import Config
from pipelines.data.ingest import keeps_in_memory, load_splits
from pipelines.data.manifest import Manifest, check_shards, check_targets, support_notes
from pipelines.data.reader import Reader
from pipelines.data.shards import ensure_shards
from pipelines.errors import UserError
from pipelines.registry.models import Registered
from pipelines.registry.tracking import connect, enabled, open_tracker, shown
from pipelines.runs.events import for_result
from pipelines.runs.files import CONFIG, EVENTS, REPORT, RESULT, SEARCHED, read_jsonl
from pipelines.runs.identity import open_run
from pipelines.runs.models import check_models
from pipelines.storage import Location, locate
from pipelines.training.finetune import train_groups
from pipelines.training.monitor import monitoring
from pipelines.training.progress import Plan, display
from pipelines.training.publish import opened, publish
from pipelines.training.ray.failures import training_failed
from pipelines.training.warm_start import explained, fairness_notes, keep_models, open_models
from pipelines.training.worker import Job, work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a finished run gave.

    Args:
        run: The run folder.
        run_id: MLflow run; empty without tracking.
        result: The run's `result.json`.
        models: What was registered.
        resumed: Whether the run had been finished before and was only read.
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
    """Run a configuration to its end, from wherever an earlier call with the same configuration got to.

    Raises:
        UserError: For anything that stands in the way, before training starts where that can be known.
    """
    run = open_run(config)
    config.check_options()
    check_models(config, run)
    if enabled(config.track) and not (run / RESULT).exists():
        connect(config.track)  # before shards are made, which can take hours
    models = open_models(config, run)
    with session_if_needed(config):
        manifest = ensure_shards(config, log)
        folder = locate(config.data.shards)
        tasks = check_all(config, manifest, folder, models, log)
        notes = support_notes(manifest, tasks, config.data.min_support)
        for note in notes:
            log(f"note: {note}")
        finished = (run / RESULT).exists()
        tracker = opened(config, run, manifest) if finished else open_tracker(config, run, manifest)
        if finished:
            log(f"this run is finished: {run} (another run.name trains anew)")
        else:
            (run / CONFIG).write_text(yaml.safe_dump(shown(config), sort_keys=False))
            reader = Reader(folder, manifest, tasks)
            start = keep_models(models, run)
            notes += fairness_notes(config, start)
            earlier = read_jsonl(run / EVENTS)
            notes += for_result(earlier)
            held = load_splits(reader) if keeps_in_memory(reader, config.data) else None
            plan = Plan.of(config, config.network_spec(manifest.description.input, tasks))
            with (
                display(plan) as shown_there,
                monitoring(run, config.ray, tracker, log, earlier, shown_there) as event_log,
            ):
                train_job(Job(config, reader, held, run, tuple(notes), start, event_log, details=True), log)
    registered = publish(config, run, tracker, manifest, log)
    return Trained(run, tracker.run_id, (run / RESULT).read_json(), registered, finished)


def train_job(job: Job, log: Callable[[str], None]) -> None:
    """Search and training of the groups, from wherever they are, to the result in the run folder.

    Raises:
        UserError: When they cannot be brought to their end.
    """
    if not (job.run / SEARCHED).exists():
        run_workers(job, log)
    if job.config.search.group_epochs:
        train_groups(job, log)


@contextmanager
def session_if_needed(config: Config) -> Iterator[None]:
    """No cluster for a run that is finished."""
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
    """Everything about data and network that can be known before a worker starts; the chosen tasks.

    Args:
        models: What the network is to start from.

    Raises:
        UserError: For the first thing that is wrong.
    """
    tasks = check_data(config, manifest, folder)
    check_network(config, manifest, tasks, models, log)
    return tasks


def check_data(config: Config, manifest: Manifest, folder: Location) -> tuple[Task, ...]:
    """What can be known of the data; the chosen tasks.

    Raises:
        UserError: For the first thing that is wrong.
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
    """What can be known of the network, and of the models that it is to start from.

    Raises:
        UserError: For the first thing that is wrong.
    """
    with _section("network"):
        spec = config.network_spec(manifest.description.input, tasks)
        network = GroupingNetwork(spec)
    with _section("train"):
        WeighedLoss(network, aggregator=config.train.aggregator)
        if config.train.aggregator != "sum":
            load_aggregator(config.train.aggregator)
    if models is not None:
        with explained():
            models.check(spec)
        for note in models.notes(spec):
            log(note)


def check_workers(config: Config, manifest: Manifest) -> None:
    """Whether the data can be shared by as many workers as there may be, and an epoch is the same for all numbers.

    Raises:
        UserError: When it cannot, or is not.
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
                f"{steps[1]} for {most}, who could not share the last one"
            )
    if problem:
        raise UserError(
            problem, where="ray.workers", remedy="lower the number of workers, or change train.batch_size"
        )


@contextmanager
def _section(name: str) -> Iterator[None]:
    """What the core refuses, as an error of a section of the configuration."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=name, remedy=f"correct the {name} section", wrong_use=True) from error


def run_workers(job: Job, log: Callable[[str], None], work: Callable[[dict[str, Any]], None] = work) -> None:
    """Have Ray Train's workers do a job.

    Args:
        job: The job.
        say: Hears that they begin.
        work: What each of them does.

    Raises:
        UserError: When they could not.
    """
    import ray.train
    import ray.train.torch

    from pipelines.training.ray.controller import Lead, Trainer, Watch

    config = job.config
    fewest, most = config.ray.fewest, config.ray.most
    count = f"{most}" if fewest == most else f"{fewest} to {most}"
    log(f"training on {count} workers, samples {'streamed' if job.held is None else 'in shared memory'}")
    set_environment()  # a trial of a sweep runs this in a process that may have joined a cluster
    # Ray Train's own collectives have no limit, and would wait for ever where PyTorch's give up
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(config.ray.timeout_s)
    with tempfile.TemporaryDirectory(prefix="dmtg-") as scratch:
        trainer = Trainer(
            work,
            train_loop_config={"job": job},
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.ray.workers,
                elastic_resize_monitor_interval_s=config.ray.resize_every_s,
                use_gpu=config.ray.gpus_per_worker > 0,
                resources_per_worker={"CPU": config.ray.cpus_per_worker}
                | ({"GPU": config.ray.gpus_per_worker} if config.ray.gpus_per_worker else {}),
            ),
            torch_config=ray.train.torch.TorchConfig(
                backend="nccl" if config.ray.gpus_per_worker else "gloo", timeout_s=config.ray.timeout_s
            ),
            run_config=ray.train.RunConfig(
                # Ray keeps nothing for us: it could not do without the storage for a moment
                name=job.run.name,
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=config.ray.max_failures),
                callbacks=[Lead(job.event_log), Watch(job.event_log)],
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise user_error(error) or training_failed(error, str(job.run)) from error
