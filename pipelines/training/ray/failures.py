"""Failures of workers on Ray: their causes, and the error for the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pipelines.errors import UserError
from pipelines.execution.errors import causes, user_error
from pipelines.training.failures import AGAIN, LESS_HOST_MEMORY, first_line
from pipelines.training.failures import training_failed as failed


def killed_for_memory(error: BaseException) -> bool:
    """Whether Ray ended a process because its machine ran low on memory."""
    from ray.exceptions import OutOfMemoryError

    return any(isinstance(one, OutOfMemoryError) or "low on memory" in str(one) for one in causes(error))


def _died(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return any(isinstance(one, RayActorError) for one in causes(error))


def _lost_connection(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe")
    named = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return named or isinstance(error, torch.distributed.DistError)


def _timed_out(error: BaseException) -> bool:
    from pipelines.training.ray.adapter import is_collective_timeout

    if any(is_collective_timeout(one) for one in causes(error)):
        return True
    return _lost_connection(error) and any(word in str(error).lower() for word in ("timed out", "timeout"))


Causes = tuple[tuple[Callable[[BaseException], bool], str], ...]
DEATHS: Causes = (
    (killed_for_memory, "Ray ended it because its machine was running out of memory"),
    (lambda error: _died(error) and "node has died" in str(error), "its machine was lost"),
    (_died, "its process was lost; the system ends processes like this when memory runs out"),
    (lambda error: "health check has been hanging" in str(error), "it did not respond"),
)
# failures of workers that follow from the loss of another worker
COLLATERAL: Causes = (
    (_timed_out, "it waited for the other workers longer than ray.timeout_s"),
    (_lost_connection, "it lost its connection to the other workers"),
)


def _cause(*errors: BaseException) -> str:
    found = (text for applies, text in (*DEATHS, *COLLATERAL) if any(applies(one) for one in errors))
    return next(found, "")


def describe_failure(error: BaseException) -> str:
    """One line with the cause of a worker's failure, as far as it is known."""
    cause = _cause(error)
    if cause:
        return cause
    found = user_error(error)
    return found.what if found is not None else f"{type(error).__name__}: {first_line(error)}"


def reason(failures: Mapping[int, BaseException]) -> str:
    """One line with the cause of a loss of workers: the failure that caused those of the others."""

    def order(rank: int) -> tuple[int, int]:
        collateral = any(applies(failures[rank]) for applies, _ in COLLATERAL)
        dead = any(applies(failures[rank]) for applies, _ in DEATHS)
        return (0 if dead else 2 if collateral else 1), rank

    rank = min(failures, key=order)
    return f"worker {rank}: {describe_failure(failures[rank])}"


def lost_at_start(error: BaseException) -> str:
    """One line with the cause of a loss of workers before they trained; empty for any other error."""
    cause = _cause(*causes(error))
    return cause and f"while they started: {cause}"


def training_failed(error: BaseException, run: str) -> UserError:
    """The error for the user of a run whose retries are used up, or that Ray could not start."""
    from ray.train import WorkerGroupError

    lost = next((one for one in causes(error) if isinstance(one, WorkerGroupError)), None)
    found = user_error(error)
    if found is not None or lost is None:
        return found or failed(error, run)
    why = reason(lost.worker_failures) if lost.worker_failures else str(lost).splitlines()[-1]
    hint = f"if it was memory: {LESS_HOST_MEMORY}; then " if "memory" in why else ""
    return UserError(
        f"training failed, and ray.max_failures allows no more retries: {why}", where=run, remedy=f"{hint}{AGAIN}"
    )
