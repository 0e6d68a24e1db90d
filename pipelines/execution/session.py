"""Ray sessions: start or join a cluster as the configuration says."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipelines.config.ray_section import RaySection
from pipelines.errors import UserError
from pipelines.execution.cluster_address import check_cluster
from pipelines.execution.resources import missing_resources

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    # Data source V2 starts dozens of one-CPU actors at every execution and makes small reads many times slower.
    # Ray Data reads the variable once, when it is imported.
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    # The controller collects the reports of the workers when it polls. Its default of 2 s is added to every epoch.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray Train replaces `print` in its workers by a logger; workers report through the run folder instead.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Workers that wait for a lost one cannot leave their process group in order. Waiting 30 s for it is useless.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}


def set_environment() -> None:
    """Set the environment variables that Ray reads, except those that the user has set.

    `session` calls it before it imports Ray. A local cluster inherits the variables. The processes
    of a cluster that was joined inherit nothing from the driver, so those that start or control Ray Train call
    this function too.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def session(section: RaySection, cpus: float | None = None) -> Iterator[None]:
    """Ray for the time of a command: a cluster that is available, or a local one that ends with the command.

    Args:
        cpus: Logical CPUs of a local cluster; by default those of the most workers and of the data tasks.

    Raises:
        UserError: When the cluster does not answer, refuses the token, or cannot hold the workers and the data
            tasks at the same time.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        _check_resources(section, ray.cluster_resources())
        yield
        return
    address = section.address or os.environ.get("RAY_ADDRESS")
    logging.getLogger("ray").setLevel(logging.ERROR)  # Ray's notes on its own start-up
    # messages of workers reach the driver through the run folder; their logs stay in Ray's own files
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        logger.info("connecting to the Ray cluster at %s", address)
        check_cluster(address)
    else:
        logger.info("starting Ray")
    with _kept_sigterm_handler(), _start_errors(address):
        if address:
            ray.init(address=address, **quiet)
        else:
            # logical CPUs: workers and data tasks each have their own, even if the machine has fewer
            cpus = cpus or section.most * section.cpus_per_worker + section.data_cpus
            store = section.object_store_mib and section.object_store_mib * 2**20
            # without address="local", Ray joins any cluster that it finds on this machine
            own = {"num_cpus": math.ceil(cpus), "object_store_memory": store, "include_dashboard": False}
            ray.init(address="local", **own, **quiet)
    try:
        silence_progress()
        _check_resources(section, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


@contextmanager
def _start_errors(address: str | None) -> Iterator[None]:
    """Turn any error of Ray's start or of a connection to a cluster into one `UserError`."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if type(error).__name__ == "AuthenticationError":
            raise UserError(
                f"the Ray cluster at {address} refuses the token: {reason}", where="RAY_AUTH_MODE, RAY_AUTH_TOKEN",
                remedy="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the token of the cluster",
            ) from error  # fmt: skip
        if address:
            raise UserError(
                f"the Ray cluster at {address} does not answer: {reason}", where=f"ray.address = {address}",
                remedy="correct ray.address or RAY_ADDRESS, or start the cluster; dmtg doctor tests the address",
            ) from error  # fmt: skip
        raise UserError(
            f"Ray does not start: {reason}", where="this machine",
            remedy="run the same command again when the machine is less busy; dmtg doctor checks what Ray needs",
        ) from error  # fmt: skip


@contextmanager
def _kept_sigterm_handler() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray's handler ends the command with another exit code and without a message."""
    held = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if held is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, held)


def silence_progress() -> None:
    """Turn off Ray Data's progress output: the commands print one line an event themselves."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.use_datasource_v2 = False  # if Ray Data was imported before the variable was set


def _check_resources(section: RaySection, resources: Mapping[str, float]) -> None:
    missing = missing_resources(section, resources)
    if missing and section.autoscaling:
        logger.info("%s: the cluster adds machines when they are needed", missing)
    elif missing:
        raise UserError(
            missing,
            where="ray.workers, ray.cpus_per_worker, ray.gpus_per_worker",
            remedy="lower one of them, or use a larger cluster",
        )
