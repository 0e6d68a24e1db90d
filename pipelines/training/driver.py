"""`dmtg train`: checks, shards, Ray Train, registry and report, each step taken up where a call before left it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.cluster import session, user_error
from pipelines.config.loading import Config
from pipelines.registry.models import Registered
from pipelines.registry.tracking import connect, enabled, open_tracker
from pipelines.runs.events import for_result
from pipelines.runs.files import EVENTS, REPORT, RESULT, SEARCHED, read_jsonl
from pipelines.runs.identity import open_run
from pipelines.runs.models import check_models
from pipelines.storage import Location, locate
from pipelines.training.checks import check_network, prepare, write_config
from pipelines.training.finetune import train_groups
from pipelines.training.monitor import monitoring
from pipelines.training.progress import Plan, display
from pipelines.training.publish import opened, publish
from pipelines.training.ray.failures import training_failed
from pipelines.training.warm_start import fairness_notes, keep_models, open_models
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
        data = prepare(config, log, partial(check_network, config, models=models, log=log))
        manifest, notes = data.manifest, list(data.notes)
        for note in notes:
            log(f"note: {note}")
        finished = (run / RESULT).exists()
        tracker = opened(config, run, manifest) if finished else open_tracker(config, run, manifest)
        if finished:
            log(f"this run is finished: {run} (another run.name trains anew)")
        else:
            write_config(config, run)
            start = keep_models(models, run)
            notes += fairness_notes(config, start)
            earlier = read_jsonl(run / EVENTS)
            notes += for_result(earlier)
            held = data.samples()
            plan = Plan.of(config, config.network_spec(manifest.description.input, data.tasks))
            with (
                display(plan) as shown_there,
                monitoring(run, config.ray, tracker, log, earlier, shown_there) as event_log,
            ):
                train_job(Job(config, data.reader, held, run, tuple(notes), start, event_log, details=True), log)
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
