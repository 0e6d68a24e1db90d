"""Ray started, or joined, the way the configuration says."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.config import RaySection
from pipelines.errors import UserError

# Data source V2 starts dozens of one-CPU actors at every execution and makes small reads many times slower.
os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
# A report of a worker is taken in when the controller polls; its default of 2 s is added to every epoch.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def session(section: RaySection) -> Iterator[None]:
    """Ray for the time of a command: the cluster at hand, or a local one that ends with the command.

    Raises:
        UserError: When the cluster cannot hold the workers and the data tasks at the same time.
    """
    import ray

    if ray.is_initialized():
        _check_room(section, ray.cluster_resources())
        yield
        return
    address = section.address or os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray").setLevel(logging.ERROR)  # Ray's notes on its own start-up
    # what workers have to say reaches the driver through the run folder; their logs stay in Ray's own files
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, **quiet)
    else:
        # logical CPUs: workers and data tasks each have theirs, even where the machine has fewer
        cpus = math.ceil(section.workers * section.cpus_per_worker + section.data_cpus)
        store = section.object_store_mib and section.object_store_mib * 2**20
        ray.init(num_cpus=cpus, object_store_memory=store, include_dashboard=False, **quiet)
    try:
        quieten()
        _check_room(section, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def quieten() -> None:
    """Progress is printed by the commands themselves, a line an event."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True


def _check_room(section: RaySection, resources: dict[str, float]) -> None:
    cpus = section.workers * section.cpus_per_worker + min(section.data_cpus, 1)
    gpus = section.workers * section.gpus_per_worker
    held = (resources.get("CPU", 0), resources.get("GPU", 0))
    if held[0] < cpus or held[1] < gpus:
        raise UserError(
            f"{section.workers} workers and a data task need {cpus:g} CPUs and {gpus:g} GPUs, the cluster has "
            f"{held[0]:g} and {held[1]:g}",
            where="ray.workers, ray.cpus_per_worker, ray.gpus_per_worker",
            remedy="lower one of them, or use a larger cluster",
        )


def user_error(error: BaseException) -> UserError | None:
    """The `UserError` that a Ray task or worker raised, however deep it is wrapped."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, UserError):
            return current
        todo += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        todo += list((getattr(current, "worker_failures", None) or {}).values())
    return None
