"""Ray started, or joined, the way the configuration says."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipelines.config.sections import RaySection
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

# Data source V2 starts dozens of one-CPU actors at every execution and makes small reads many times slower.
os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
# A report of a worker is taken in when the controller polls; its default of 2 s is added to every epoch.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Workers that wait for one that was lost cannot leave their group in order; there is no use in waiting for it.
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")


@contextmanager
def session(section: RaySection, cpus: float | None = None) -> Iterator[None]:
    """Ray for the time of a command: the cluster at hand, or a local one that ends with the command.

    Args:
        cpus: Logical CPUs of a local one; by default those of the most workers and of the data tasks.

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
    with _own_sigterm(), _starting(address):
        if address:
            ray.init(address=address, **quiet)
        else:
            # logical CPUs: workers and data tasks each have theirs, even where the machine has fewer
            cpus = cpus or section.most * section.cpus_per_worker + section.data_cpus
            store = section.object_store_mib and section.object_store_mib * 2**20
            # left out, the address would be that of any cluster that Ray finds on this machine
            own = {"num_cpus": math.ceil(cpus), "object_store_memory": store, "include_dashboard": False}
            ray.init(address="local", **own, **quiet)
    try:
        quieten()
        _check_room(section, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


@contextmanager
def _starting(address: str | None) -> Iterator[None]:
    """What Ray raises when it does not start or is not reached, which is of several kinds, as one error."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if address:
            raise UserError(
                f"the Ray cluster does not answer: {reason}", where=f"ray.address = {address}",
                remedy="correct ray.address or RAY_ADDRESS, or start the cluster; dmtg doctor tries it",
            ) from error  # fmt: skip
        raise UserError(
            f"Ray does not start: {reason}", where="this machine",
            remedy="run the same words again when the machine is less busy; dmtg doctor looks at what Ray needs",
        ) from error  # fmt: skip


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray's would end the command with another exit code, and nothing said."""
    held = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if held is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, held)


def quieten() -> None:
    """Progress is printed by the commands themselves, a line an event."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True


def short_of_room(section: RaySection, resources: Mapping[str, float]) -> str:
    """What is missing for the fewest workers and a data task; empty where nothing is."""
    cpus = section.fewest * section.cpus_per_worker + min(section.data_cpus, 1)
    gpus = section.fewest * section.gpus_per_worker
    held = (resources.get("CPU", 0), resources.get("GPU", 0))
    if held[0] >= cpus and held[1] >= gpus:
        return ""
    return (
        f"{section.fewest} workers and a data task need {cpus:g} CPUs and {gpus:g} GPUs, the cluster has "
        f"{held[0]:g} and {held[1]:g}"
    )


def _check_room(section: RaySection, resources: Mapping[str, float]) -> None:
    short = short_of_room(section, resources)
    if short and section.autoscaling:
        logger.info("%s: machines are asked for as they are needed", short)
    elif short:
        raise UserError(
            short,
            where="ray.workers, ray.cpus_per_worker, ray.gpus_per_worker",
            remedy="lower one of them, or use a larger cluster",
        )


def trial_needs(section: RaySection) -> tuple[float, float]:
    """CPUs and GPUs of a trial of a sweep: the process that drives it, and its workers."""
    cpus = section.tune_cpus + section.fewest * section.cpus_per_worker
    return cpus, section.fewest * section.gpus_per_worker


def sweep_cpus(section: RaySection) -> float:
    """Logical CPUs of a local cluster for a sweep: its trials keep the cores of this machine busy, no more."""
    busy = (os.cpu_count() or 1) / (section.fewest * section.cpus_per_worker)
    trials = section.trials or max(math.floor(busy), 1)
    return trials * trial_needs(section)[0] + section.data_cpus


def trials_at_once(section: RaySection, resources: Mapping[str, float]) -> int:
    """How many trials a cluster can hold beside the data tasks; `ray.trials` at most.

    Nothing that runs waits then for room that another trial holds. A cluster that adds machines is asked for
    `ray.trials` of them, or for as many as it can hold now.

    Raises:
        UserError: When it cannot hold one.
    """
    cpus, gpus = trial_needs(section)
    held = (resources.get("CPU", 0), resources.get("GPU", 0))
    room = [(held[0] - section.data_cpus) / cpus] + ([held[1] / gpus] if gpus else [])
    if section.autoscaling:
        return section.trials or max(math.floor(min(room) + 1e-6), 1)
    if min(room) < 1:
        least = cpus + min(section.data_cpus, 1)  # a single data task does, if slowly
        if held[0] < least or held[1] < gpus:
            raise UserError(
                f"the cluster cannot hold a trial: {section.fewest} workers, the process that drives them and a "
                f"data task need {least:g} CPUs and {gpus:g} GPUs, it has {held[0]:g} and {held[1]:g}",
                where="ray.workers, ray.cpus_per_worker, ray.gpus_per_worker, ray.tune_cpus",
                remedy="lower one of them, or use a larger cluster",
            )
    count = max(math.floor(min(room) + 1e-6), 1)
    return count if section.trials is None else min(count, section.trials)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it wraps, in Python's way or in one of Ray's."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        todo += [current.__cause__, current.__context__]
        todo += [getattr(current, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
        todo += list((getattr(current, "worker_failures", None) or {}).values())


def user_error(error: BaseException) -> UserError | None:
    """The `UserError` that a Ray task or worker raised, however deep it is wrapped."""
    return next((one for one in causes(error) if isinstance(one, UserError)), None)
