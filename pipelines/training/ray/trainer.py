"""Ray Train's trainer, configured for a job: starts the workers and waits for them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from pipelines.cluster import set_environment, user_error
from pipelines.training.ray.failures import training_failed
from pipelines.training.worker import Job, work


def run_workers(job: Job, log: Callable[[str], None], work: Callable[[dict[str, Any]], None] = work) -> None:
    """Run a job on Ray Train's workers.

    Args:
        job: The job.
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

    section = job.config.ray
    count = f"{section.most}" if section.fewest == section.most else f"{section.fewest} to {section.most}"
    log(f"training on {count} workers, samples {'streamed' if job.held is None else 'in shared memory'}")
    limit_collectives(section.timeout_s)  # the same limit as for PyTorch's collectives
    with tempfile.TemporaryDirectory(prefix="dmtg-") as scratch:
        trainer = InterruptibleTrainer(
            work,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=section.workers,
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
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=section.max_failures),
                callbacks=controller_callbacks(job.event_log),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise user_error(error) or training_failed(error, str(job.run)) from error
