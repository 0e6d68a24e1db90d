"""Ray Train's trainer, configured for a job: starts the workers and waits for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipelines.execution.resources import cores
from pipelines.execution.session import set_environment
from pipelines.runs.events import emitter
from pipelines.scratch import temporary_folder
from pipelines.training.ray.events import RayEventLog
from pipelines.training.ray.failures import training_failed
from pipelines.training.worker import Job, work


def work_on_ray(values: dict[str, Any]) -> str:
    """The training function of Ray Train; see `work`. It returns `STOPPED` if a machine is being drained."""
    from pipelines.training.ray.adapter import STOPPED
    from pipelines.training.ray.context import DrainedError, RayContext

    job: Job = values["job"]
    context = RayContext(job.run, emitter(job.event_log), job.config.ray.hung_after_s)
    torch.set_num_threads(max(cores() // context.local_world_size, 1))  # the workers of a machine share its cores
    try:
        work(job, context)
    except DrainedError:
        return STOPPED
    return ""


def run_workers(job: Job, log: Callable[[str], None], work: Callable[[dict[str, Any]], Any] = work_on_ray) -> None:
    """Run a job on Ray Train's workers.

    Args:
        job: The job. Its event log is a `RayEventLog`.
        log: Called when the workers are about to start.
        work: The training function of each worker.

    Raises:
        UserError: When training failed.
    """
    set_environment()  # a trial of a sweep calls this in a process that may belong to a joined cluster
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from pipelines.training.ray.adapter import InterruptibleTrainer, limit_collectives
    from pipelines.training.ray.controller import controller_callbacks

    assert isinstance(job.event_log, RayEventLog)
    section, event_log = job.config.ray, job.event_log
    count = f"{section.most}" if section.fewest == section.most else f"{section.fewest} to {section.most}"
    samples = "streamed" if job.held is None else "in shared memory"
    log(f"training on Ray with {count} worker{'s' * (section.most > 1)}, samples {samples}")
    limit_collectives(section.timeout_s)  # the same limit as for PyTorch's collectives
    with temporary_folder() as scratch:
        trainer = InterruptibleTrainer(
            work,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=section.fewest if section.fewest == section.most else (section.fewest, section.most),
                elastic_resize_monitor_interval_s=section.resize_every_s,
                use_gpu=section.gpus_per_worker > 0,
                resources_per_worker={"CPU": section.cpus_per_worker}
                | ({"GPU": section.gpus_per_worker} if section.gpus_per_worker else {}),
            ),
            torch_config=TorchConfig(
                backend="nccl" if section.gpus_per_worker else "gloo", timeout_s=section.timeout_s
            ),
            run_config=RunConfig(
                # Ray's own storage is a temporary folder: a short failure of the run's storage would end the run
                name=job.run.name,
                storage_path=str(scratch),
                # a drained machine is no failure: it may happen any number of times
                failure_config=FailureConfig(max_failures=section.max_failures, max_preemption_failures=-1),
                callbacks=controller_callbacks(event_log),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise training_failed(error, str(job.run)) from error
