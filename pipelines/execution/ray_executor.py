"""The Ray executor: the work of a command runs as tasks, workers and trials on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.config.ray_section import RaySection
from pipelines.execution.errors import LostProcessError, causes
from pipelines.execution.executor import Held, Outcome
from pipelines.execution.resources import missing_resources

STORE_SHARE = 0.7  # share of Ray's shared memory that kept samples may use


@dataclass(frozen=True)
class Reference:
    """A value in Ray's shared memory."""

    reference: Any

    def get(self) -> Any:
        """The value."""
        import ray

        return ray.get(self.reference)


class RayExecutor:
    """See `Executor`. A Ray session exists as long as it is used."""

    name, embedded = "Ray", False

    def __init__(self, section: RaySection) -> None:
        self.section = section

    def run(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
        """See `Executor.run`."""
        import ray

        task = ray.remote(_call).options(
            num_cpus=self.section.cpus_per_worker, num_gpus=self.section.gpus_per_worker or None,
            max_retries=self.section.max_failures, retry_exceptions=False,
            scheduling_strategy="DEFAULT",  # a trial of a sweep would put them into its own resources
        )  # fmt: skip
        shared = ray.put(function)
        waiting = {task.remote(shared, item): index for index, item in enumerate(items)}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting))
            index = waiting.pop(ready)
            try:
                outcome = Outcome(index, ray.get(ready))
            except ray.exceptions.RayError as error:
                outcome = Outcome(index, error=_cause(error))
            yield outcome

    def hold(self, value: Any) -> Held:
        """See `Executor.hold`."""
        import ray

        return Reference(ray.put(value))

    def sample_memory(self) -> int:
        """See `Executor.sample_memory`: a share of the smallest object store of the cluster."""
        import ray

        stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
        return int(STORE_SHARE * min(store for store in stores if store))

    def missing_resources(self) -> str:
        """See `Executor.missing_resources`."""
        import ray

        return missing_resources(self.section, ray.cluster_resources())


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def _cause(error: Exception) -> Exception:
    """The error that a task raised, or how its process was lost."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return error
    if any("low on memory" in str(one) for one in causes(error)):
        return LostProcessError("Ray ended its process because its machine was running out of memory")
    return LostProcessError("its process was lost; the system ends processes like this when memory runs out")
