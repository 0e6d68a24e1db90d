"""Failures of workers: which of them are permanent, their causes, and the error for the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dmtg_core.training.checkpoint import OutdatedNetworkError
from dmtg_core.training.loop import NonFiniteLossError
from pipelines.cluster import causes, user_error
from pipelines.config.loading import Config
from pipelines.errors import UserError

LESS_MEMORY = (
    "lower train.batch_size, or keep it and raise train.accumulate, set train.recompute=true, or "
    "train.precision=bf16"
)
LESS_HOST_MEMORY = (
    "give the machine more memory, or use less: lower ray.workers, ray.object_store_mib, data.shuffle_mib or "
    "train.batch_size"
)


class PermanentError(UserError):
    """An error that retrying cannot help: the run ends with it and no other workers are started."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # raised in a worker, it keeps its class when it is sent to the controller and the driver
        return _rebuild, (self.what, self.where, self.remedy)


def _rebuild(what: str, where: str, remedy: str) -> PermanentError:
    return PermanentError(what, where=where, remedy=remedy)


def permanent_error(error: Exception, config: Config, run: str, workers: int) -> PermanentError | None:
    """The error for the user if the configuration is its cause; None for any other error.

    Args:
        error: The error that training raised.
        config: The configuration.
        run: The run folder.
        workers: Number of workers.
    """
    if isinstance(error, NonFiniteLossError):
        problem, _, remedy = str(error).partition(": ")
        return PermanentError(problem, where=f"{run} (the last good checkpoint stays)", remedy=remedy)
    if isinstance(error, OutdatedNetworkError):
        remedy = "delete the run folder, or give another run.name, and train it again"
        return PermanentError(str(error).partition(": ")[2], where=run, remedy=remedy)
    if out_of_memory(error):
        share = f"{config.train.batch_size} samples on {workers} worker{'s' * (workers > 1)}"
        return PermanentError(
            f"memory ran out in training on a batch of {share}: {_first_line(error)}",
            where="training worker",
            remedy=LESS_MEMORY
            + ("" if config.ray.fewest == config.ray.most else ", or raise the smaller number of ray.workers"),
        )
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, had no memory for a tensor."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


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
    return found.what if found is not None else f"{type(error).__name__}: {_first_line(error)}"


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
    again = "run the same command again to resume from the last checkpoint"
    if lost is None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return UserError(
            f"training failed: {lines[-1] if lines else type(error).__name__}",
            where=run,
            remedy=f"{again}; --debug shows where it failed",
        )
    why = reason(lost.worker_failures) if lost.worker_failures else str(lost).splitlines()[-1]
    if "memory" in why:
        again = f"if it was memory: {LESS_HOST_MEMORY}; then {again}"
    return UserError(
        f"training failed, and ray.max_failures allows no more retries: {why}",
        where=run,
        remedy=f"{again}; --debug shows where it failed",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
