"""The choice of the executor: the only place that decides whether the work of a command runs on Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from pipelines.config.ray_section import RaySection
from pipelines.errors import UserError
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.execution.executor import Executor
from pipelines.execution.pool import preload
from pipelines.execution.ray_executor import RayExecutor
from pipelines.execution.session import session


@contextmanager
def open_executor(
    section: RaySection, *, processes: int = 0, imports: Sequence[str] = (), cpus: float | None = None
) -> Iterator[Executor]:
    """The executor of a command, for the time of the block.

    Args:
        section: The configured resources.
        processes: Number of processes for tasks of the embedded executor; 0 for the process of the command.
        imports: Modules of these tasks, which the processes import when they start.
        cpus: Logical CPUs of a local Ray cluster; by default those of the most workers and of the data tasks.

    Raises:
        UserError: For options that exclude each other, and if Ray does not start or has too few resources.
    """
    if on_ray(section):
        with session(section, cpus):
            yield RayExecutor(section)
    else:
        with EmbeddedExecutor(section, processes, imports) as embedded:
            yield embedded


def kept_session(section: RaySection, cpus: float) -> AbstractContextManager[None]:
    """One Ray session for several executors that follow each other; nothing if the work does not run on Ray.

    Args:
        section: The configured resources.
        cpus: Logical CPUs of a local Ray cluster, as many as the executor needs that uses the most.

    Raises:
        UserError: As `on_ray` and `session`.
    """
    return session(section, cpus) if on_ray(section) else nullcontext()


def preload_processes(section: RaySection, imports: Sequence[str]) -> None:
    """Start the imports of the processes of an embedded executor that is opened later; nothing if that is on Ray.

    This module imports neither PyTorch nor Ray: a command calls it before it imports PyTorch itself.

    Args:
        section: The configured resources.
        imports: Modules of the tasks.

    Raises:
        UserError: As `on_ray`.
    """
    if not on_ray(section):
        preload(imports)


def on_ray(section: RaySection) -> bool:
    """Whether the work runs on Ray.

    Raises:
        UserError: If the embedded executor is configured with an address or with several workers.
    """
    if section.executor == "embedded":
        problem = "an address" if section.address else f"{section.most} workers" if section.most > 1 else ""
        if problem:
            raise UserError(
                f"the embedded executor is the process of the command, with one worker; {problem} needs Ray",
                where="ray.executor=embedded",
                remedy="leave ray.executor out, or set ray.workers=1 and no ray.address",
                wrong_use=True,
            )
        return False
    needed = section.address or os.environ.get("RAY_ADDRESS") or section.most > 1 or _in_session()
    return section.executor == "ray" or bool(needed)


def _in_session() -> bool:
    """Whether this process belongs to a Ray session. Ray is not imported for the answer."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
