"""Training in the process of the command, with one worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.network.threads import step_threads
from pipelines.config.ray_section import RaySection
from pipelines.errors import UserError
from pipelines.runs.events import LOST, emitter
from pipelines.training.context import RunContext
from pipelines.training.failures import PermanentError, describe, training_failed
from pipelines.training.worker import Job, work


def train_here(
    job: Job, log: Callable[[str], None], on_record: Callable[[Mapping[str, Any]], None] | None = None
) -> None:
    """Run a job in this process. After a failure it resumes from the last checkpoint, `ray.max_failures` times.

    Args:
        job: The job.
        log: Called when training is about to start.
        on_record: Called with the record of every epoch. An exception that it raises ends the training.

    Raises:
        UserError: When training failed.
    """
    section, emit = job.config.ray, emitter(job.event_log)
    device = training_device(section)
    where = _threads(job) if device.type == "cpu" else f"on {device}"
    samples = "streamed" if job.held is None else "in memory"
    log(f"training in this process (embedded) {where}, samples {samples}")
    for retries_left in range(section.max_failures, -1, -1):
        try:
            work(job, RunContext(job.run, emit, section.hung_after_s, device, on_record))
        except PermanentError:
            raise
        except (RuntimeError, OSError, UserError) as error:
            if not retries_left:
                raise training_failed(error, str(job.run)) from error
            failed = describe(error)
        else:
            return
        emit(LOST, f"training failed ({failed})")


def training_device(section: RaySection) -> torch.device:
    """The GPU of this machine if workers use GPUs or their number is automatic; else the CPU."""
    uses_gpu = section.gpus_per_worker > 0 or section.workers == "auto"
    return torch.device("cuda" if uses_gpu and torch.cuda.is_available() else "cpu")


def _threads(job: Job) -> str:
    """The number of threads of a training step, as text."""
    if torch.get_num_threads() == 1:
        return "with 1 thread"
    spec = job.config.network_spec(job.reader.manifest.description.input, job.reader.tasks)
    count = step_threads(GroupingNetwork(spec.without_weights()), job.config.train.batch_size)
    return f"with {count} threads" if count > 1 else "with 1 thread, as its steps are small"
