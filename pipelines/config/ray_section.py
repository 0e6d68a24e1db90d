"""The `ray` section of a configuration, which has a file of its own: `ray_config.yaml`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipelines.config.validation import Section


class RaySection(Section):
    """Where the work of a command runs, and how Ray runs (ray_config.yaml)."""

    executor: Literal["auto", "embedded", "ray"] = Field(
        "auto",
        description="Where the work of a command runs: embedded is the process of the command, ray is a Ray "
        "cluster; auto is ray with an address, a running cluster or more than one worker, else embedded.",
    )
    address: str = Field("", description="Address of a cluster; empty for RAY_ADDRESS, else a local cluster.")
    workers: Literal["auto"] | int | tuple[int, int] = Field(
        "auto",
        description="Data-parallel training workers; with two numbers, the fewest and the most, the number "
        "follows the size of the cluster. With auto there is one, or as many as shorten the training.",
    )
    cpus_per_worker: float = Field(1, gt=0, le=10**6, description="CPUs of a training worker.")
    gpus_per_worker: float = Field(
        0, ge=0, le=10**6, description="GPUs of a training worker; 1 for training on GPUs."
    )
    data_cpus: float = Field(
        2,
        gt=0,
        le=10**6,
        description="CPUs for Ray Data, in addition to those of the workers; also the number of shards that Ray "
        "writes at a time.",
    )
    object_store_mib: int | None = Field(
        None,
        ge=80,
        le=2**30,
        description="Memory for samples in MiB, on a local cluster its shared memory; by default a third of the "
        "memory of the machine.",
    )
    tune_cpus: float = Field(
        0.5, gt=0, le=10**6, description="CPUs of the process that drives a trial of a sweep."
    )
    trials: int | None = Field(
        None, ge=1, le=10**6, description="Trials of a sweep at a time; by default as many as the resources allow."
    )
    autoscaling: bool = Field(
        False, description="The cluster adds machines on demand, so its present resources are no limit."
    )
    storage: str = Field(
        "",
        description="Local folder, or address in object storage, to which relative paths in run, data and regroup "
        "refer.",
    )
    tracking_uri: str = Field("", description="MLflow server, used if track.uri is empty.")
    registry_uri: str = Field("", description="MLflow model registry, if it is not the tracking server.")
    max_failures: int = Field(
        2, ge=0, le=10**6, description="How many times lost workers and processes are replaced."
    )
    timeout_s: int = Field(
        300, ge=1, le=10**9, description="Longest time in seconds that a worker waits for the others."
    )
    resize_every_s: float = Field(
        60,
        gt=0,
        le=10**9,
        description="Seconds between two checks whether resources for more workers are available.",
    )
    hung_after_s: float = Field(
        1800, ge=0, le=10**6, description="Seconds without a batch after which a worker is ended; 0 for never."
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _one_or_two(cls, value: object) -> object:
        if value == "auto":
            return value
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        counts = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 10**6]
        if len(counts) != len(numbers) or len(counts) not in (1, 2) or counts != sorted(counts):
            raise ValueError("expected auto, a number from 1 to 1000000, or two such numbers [fewest, most]")
        return tuple(counts) if len(counts) == 2 else counts[0]

    @property
    def fewest(self) -> int:
        """Smallest number of workers with which training starts."""
        return self._numbers()[0]

    @property
    def most(self) -> int:
        """Largest number of workers."""
        return self._numbers()[1]

    def _numbers(self) -> tuple[int, int]:
        """Fewest and most workers; one, where `auto` has not been resolved."""
        if self.workers == "auto":
            return 1, 1
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers
