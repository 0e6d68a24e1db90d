"""Resources of workers and trials, of a cluster and of this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from pipelines.config.ray_section import RaySection
from pipelines.errors import UserError

MEMORY_SHARE = 1 / 3  # of the machine's memory, for samples that are kept: Ray's default for its shared memory
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sample_memory(section: RaySection) -> int:
    """Bytes of this machine's memory for samples that are kept: `ray.object_store_mib`, or a share of it."""
    if section.object_store_mib:
        return section.object_store_mib * 2**20
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return int(MEMORY_SHARE * (memory if limit == "max" else min(memory, int(limit))))


def missing_resources(section: RaySection, resources: Mapping[str, float]) -> str:
    """Resources that are missing for the fewest workers and a data task, as a sentence; empty if none are."""
    cpus = section.fewest * section.cpus_per_worker + min(section.data_cpus, 1)
    gpus = section.fewest * section.gpus_per_worker
    held = (resources.get("CPU", 0), resources.get("GPU", 0))
    if held[0] >= cpus and held[1] >= gpus:
        return ""
    return (
        f"{section.fewest} workers and a data task need {cpus:g} CPUs and {gpus:g} GPUs, the cluster has "
        f"{held[0]:g} and {held[1]:g}"
    )


def trial_needs(section: RaySection) -> tuple[float, float]:
    """CPUs and GPUs of one trial of a sweep: those of its driver process and of its workers."""
    cpus = section.tune_cpus + section.fewest * section.cpus_per_worker
    return cpus, section.fewest * section.gpus_per_worker


def processes(section: RaySection) -> int:
    """Number of trials or cells that this machine trains at the same time without Ray."""
    return section.trials or max(int(cores() // section.cpus_per_worker), 1)


def sweep_cpus(section: RaySection) -> float:
    """Logical CPUs of a local cluster for a sweep: enough trials to keep the cores of this machine busy."""
    busy = cores() / (section.fewest * section.cpus_per_worker)
    trials = section.trials or max(math.floor(busy), 1)
    return trials * trial_needs(section)[0] + section.data_cpus


def cells_cpus(section: RaySection) -> float:
    """Logical CPUs of a local cluster for cells: one cell for each core, and at least those of any session."""
    cpus = section.cpus_per_worker
    return max(processes(section) * cpus, section.fewest * cpus + min(section.data_cpus, 1))


def trials_at_once(section: RaySection, resources: Mapping[str, float]) -> int:
    """Number of trials that a cluster can hold beside the data tasks; `ray.trials` at most.

    With this number, no trial waits for resources that another trial holds. On a cluster that adds machines, the
    number is `ray.trials`, or the number that the cluster can hold now.

    Raises:
        UserError: When the cluster cannot hold one trial.
    """
    cpus, gpus = trial_needs(section)
    held = (resources.get("CPU", 0), resources.get("GPU", 0))
    capacity = [(held[0] - section.data_cpus) / cpus] + ([held[1] / gpus] if gpus else [])
    if section.autoscaling:
        return section.trials or max(math.floor(min(capacity) + 1e-6), 1)
    if min(capacity) < 1:
        least = cpus + min(section.data_cpus, 1)  # one data task is enough, but slow
        if held[0] < least or held[1] < gpus:
            raise UserError(
                f"the cluster cannot hold a trial: {section.fewest} workers, their driver process and a "
                f"data task need {least:g} CPUs and {gpus:g} GPUs, it has {held[0]:g} and {held[1]:g}",
                where="ray.workers, ray.cpus_per_worker, ray.gpus_per_worker, ray.tune_cpus",
                remedy="lower one of them, or use a larger cluster",
            )
    count = max(math.floor(min(capacity) + 1e-6), 1)
    return count if section.trials is None else min(count, section.trials)
