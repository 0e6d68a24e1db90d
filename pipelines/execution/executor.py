"""The interface of an executor, which `EmbeddedExecutor` and `RayExecutor` implement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.config.ray_section import RaySection


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task: the index of its item, and its value or error."""

    index: int
    value: Any = None
    error: Exception | None = None


class Held(Protocol):
    """A value that the tasks and workers of an executor can read without a copy for each."""

    def get(self) -> Any:
        """The value."""
        ...


class Executor(Protocol):
    """Runs the work of a command.

    Args:
        name: The name in the log.
        embedded: Whether the work runs in the process of the command or in processes that it starts.
        section: The configured resources.
    """

    name: str
    embedded: bool
    section: RaySection

    def run(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
        """Call a function with each item, each time with the resources of one worker.

        Yields the outcomes as they come. A lost process is repeated `ray.max_failures` times.
        """
        ...

    def hold(self, value: Any) -> Held:
        """Keep a value for tasks and workers."""
        ...

    def sample_memory(self) -> int:
        """Bytes that samples may use where they are kept for tasks and workers."""
        ...

    def missing_resources(self) -> str:
        """Resources that the fewest workers lack at present, as a sentence; empty if none are."""
        ...
