"""The embedded executor: the work of a command runs in its own process, or in processes that it starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.config.ray_section import RaySection
from pipelines.execution.executor import Held, Outcome
from pipelines.execution.pool import Pool
from pipelines.execution.resources import sample_memory
from pipelines.scratch import new_scratch


@dataclass(frozen=True)
class InProcess:
    """A table of this process."""

    table: pa.Table

    def get(self) -> pa.Table:
        """The table."""
        return self.table


@dataclass(frozen=True)
class Mapped:
    """A table in a file that every process maps into its memory, so that all share one copy of it."""

    file: str

    def get(self) -> pa.Table:
        """The table; its columns are views of the file."""
        return pa.ipc.open_file(pa.memory_map(self.file)).read_all()


class EmbeddedExecutor(AbstractContextManager["EmbeddedExecutor"]):
    """See `Executor`.

    Args:
        section: The configured resources.
        processes: Number of processes for tasks; 0 for the process of the command itself.
        imports: Modules of the tasks, which the processes import when they start.
    """

    name, embedded = "embedded", True

    def __init__(self, section: RaySection, processes: int = 0, imports: Sequence[str] = ()) -> None:
        self.section = section
        self.pool = Pool(processes, section.max_failures, imports) if processes else None
        if self.pool is not None:
            self.pool.start()
        self.scratch = new_scratch() if processes else None
        self.numbers = itertools.count()

    def run(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
        """See `Executor.run`."""
        return self.pool.run(function, items) if self.pool is not None else _here(function, items)

    def hold(self, value: pa.Table) -> Held:
        """See `Executor.hold`."""
        if self.scratch is None:
            return InProcess(value)
        file = str(self.scratch.path / f"{next(self.numbers)}.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, value.schema) as writer:
            writer.write_table(value)
        return Mapped(file)

    def sample_memory(self) -> int:
        """See `Executor.sample_memory`."""
        return sample_memory(self.section)

    def missing_resources(self) -> str:
        """See `Executor.missing_resources`: none, as the process that asks is the one that works."""
        return ""

    def __exit__(self, *error: object) -> None:
        """End the processes and remove the files."""
        if self.pool is not None:
            self.pool.close()
        if self.scratch is not None:
            self.scratch.close()


def _here(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
    for index, item in enumerate(items):
        try:
            outcome = Outcome(index, function(item))
        except Exception as error:  # noqa: BLE001 - the caller decides, as with any other executor
            outcome = Outcome(index, error=error)
        yield outcome
