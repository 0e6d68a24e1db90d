"""The workers of a run: their number, and their start on either executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from dmtg_core.network.cost import training_flops
from dmtg_core.network.grouping_network import GroupingNetwork
from pipelines.config.loading import Config
from pipelines.data.manifest import Manifest
from pipelines.errors import UserError
from pipelines.execution.choice import open_executor
from pipelines.execution.executor import Executor
from pipelines.execution.resources import cores
from pipelines.runs.events import EventLog, LocalEventLog
from pipelines.training.checks import Prepared, check_workers
from pipelines.training.embedded import train_here, training_device
from pipelines.training.worker import Job

WORTH_S = 120.0  # a run that takes less, by its operations, is not measured
RATES = {"cpu": 2e10, "cuda": 5e12}  # assumed operations a second of a core or GPU, for that estimate
OVERHEAD = 1.2  # assumed factor of the exchange of gradients
STEPS = 3


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


@contextmanager
def open_workers(
    data: Prepared, executor: Executor, log: Callable[[str], None]
) -> Iterator[tuple[Config, Executor]]:
    """The configuration and the executor of the workers of a run.

    They are those of the command, except that a number of workers that is `auto` becomes the one that shortens the
    training. Several workers are started on Ray.

    Args:
        data: The data set, and the configuration of the command.
        executor: The executor of the command.
        log: Called with each line.
    """
    config = data.config
    if config.ray.workers != "auto" or config.ray.executor == "embedded":
        yield config, executor
        return
    gpus, most = _gpus(config, executor), _most_workers(config, executor)
    count = worthwhile_workers(config, data, most, gpus > 0, log) if most > 1 else 1
    if executor.embedded and count == 1:
        yield config, executor
        return
    update = {"executor": "ray", "workers": count} | ({"gpus_per_worker": 1.0} if gpus else {})
    section = config.ray.model_copy(update=update)
    with open_executor(section) as chosen:
        yield config.model_copy(update={"ray": section}), chosen


def _gpus(config: Config, executor: Executor) -> int:
    """Number of GPUs that workers can use."""
    if executor.embedded:
        return torch.cuda.device_count() if training_device(config.ray).type == "cuda" else 0
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _most_workers(config: Config, executor: Executor) -> int:
    """Number of workers that the executor's machine or cluster can hold: one for each GPU, or for two cores."""
    gpus, section = _gpus(config, executor), config.ray
    if gpus or executor.embedded:
        return gpus or max(cores() // 2, 1)
    import ray

    free = ray.cluster_resources().get("CPU", 0) - section.data_cpus
    return max(int(free // section.cpus_per_worker), 1)


def worthwhile_workers(
    config: Config, data: Prepared, most: int, on_gpus: bool, log: Callable[[str], None]
) -> int:
    """The number of workers with the shortest training, by a short measurement of a step with 1, 2, 4, … workers.

    A small run is not measured and has one. A worker has its part of the batch and of this machine's cores. If
    only other machines have GPUs, no step can be measured here, and a large run has a worker for each of them.

    Args:
        config: Configuration of the run.
        data: Its data set.
        most: Largest number of workers.
        on_gpus: Whether workers use GPUs.
        log: Called with the measurement.
    """
    spec = config.network_spec(data.manifest.description.input, data.tasks)
    network = GroupingNetwork(spec.without_weights())
    device = torch.device("cuda" if on_gpus and torch.cuda.is_available() else "cpu")
    samples = data.manifest.rows("train") * config.train.epochs
    if training_flops(network) * samples < WORTH_S * RATES["cuda" if on_gpus else "cpu"]:
        return 1
    counts = [n for n in (2**i for i in range(12)) if n <= most and _divides(config, data.manifest, n)]
    if on_gpus and device.type == "cpu":
        log(f"number of workers: {counts[-1]}, for the GPUs of the cluster")
        return counts[-1]
    seconds = _measured(network.to(device), config.train.batch_size, counts, device)
    best = min(seconds, key=lambda count: seconds[count])
    if (seconds[1] - seconds[best]) * samples / config.train.batch_size < WORTH_S:
        best = 1
    shown = ", ".join(f"{1000 * value:.0f} ms with {count}" for count, value in seconds.items())
    log(f"number of workers: a step takes {shown}; training with {best}")
    return best


def _measured(
    network: GroupingNetwork, batch_size: int, counts: Sequence[int], device: torch.device
) -> dict[int, float]:
    """Seconds of a step with each number of workers."""
    threads, seconds = torch.get_num_threads(), {}
    for count in counts:
        if device.type == "cpu":
            torch.set_num_threads(max(threads // count, 1))
        seconds[count] = step_seconds(network, -(-batch_size // count), device) * (OVERHEAD if count > 1 else 1)
    torch.set_num_threads(threads)
    return seconds


def _divides(config: Config, manifest: Manifest, count: int) -> bool:
    """Whether the data set can be shared by a number of workers."""
    section = config.ray.model_copy(update={"workers": count})
    try:
        check_workers(config.model_copy(update={"ray": section}), manifest)
    except UserError:
        return False
    return True


def step_seconds(network: GroupingNetwork, batch_size: int, device: torch.device) -> float:
    """Median seconds of a forward and a backward pass through all heads."""
    spec = network.spec.input
    inputs = torch.zeros(batch_size, *spec.shape, dtype=getattr(torch, spec.dtype), device=device)
    network.train()

    def once() -> float:
        start = time.perf_counter()
        outputs = network.forward_pairs(inputs)
        torch.stack([part.float().sum() for part in (outputs.rows, *outputs.dense.values())]).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return median(once() for _ in range(STEPS))
