"""The workers of a run, on either executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.execution.executor import Executor
from pipelines.runs.events import EventLog, LocalEventLog
from pipelines.training.embedded import train_here
from pipelines.training.worker import Job


def new_event_log(executor: Executor) -> EventLog:
    """An event log that the workers of an executor reach."""
    if executor.embedded:
        return LocalEventLog()
    from pipelines.training.ray.events import start_event_log

    return start_event_log()


def run_workers(
    job: Job,
    executor: Executor,
    log: Callable[[str], None],
    on_record: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Run a job on workers.

    Args:
        job: The job.
        executor: The executor of its workers.
        log: Called when the workers are about to start.
        on_record: Called with the record of every epoch, if the executor is embedded.

    Raises:
        UserError: When training failed.
    """
    if executor.embedded:
        train_here(job, log, on_record)
    else:
        from pipelines.training.ray.trainer import run_workers as run_on_ray

        run_on_ray(job, log)
