"""Why workers fail: what another try would meet again, what it would not, and what the user can do about it."""

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
    """An error that other workers would meet again: the run ends with it, instead of starting them."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # raised in a worker, it must arrive in the controller and in the driver as what it is
        return _rebuild, (self.what, self.where, self.remedy)


def _rebuild(what: str, where: str, remedy: str) -> PermanentError:
    return PermanentError(what, where=where, remedy=remedy)


def permanent_error(error: Exception, config: Config, run: str, workers: int) -> PermanentError | None:
    """What to tell the user of an error that comes from the configuration; None for any other.

    Args:
        error: What training raised.
        config: The configuration.
        run: Where the run is.
        workers: How many there are.
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
    """Whether a device, or this machine, had no room for a tensor."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def killed_for_memory(error: BaseException) -> bool:
    """Whether Ray ended a process because its machine ran low on memory."""
    from ray.exceptions import OutOfMemoryError

    return any(isinstance(one, OutOfMemoryError) or "low on memory" in str(one) for one in causes(error))


def _died(error: BaseException) -> bool:
    from ray.exceptions import RayActorError

    return any(isinstance(one, RayActorError) for one in causes(error))


def _lost_the_others(error: BaseException) -> bool:
    words = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe")
    logged = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return logged or isinstance(error, torch.distributed.DistError)


def _late(error: BaseException) -> bool:
    from ray.train.v2._internal.exceptions import CollectiveTimeoutError

    if any(isinstance(one, CollectiveTimeoutError) for one in causes(error)):
        return True
    return _lost_the_others(error) and any(word in str(error).lower() for word in ("timed out", "timeout"))


Signs = tuple[tuple[Callable[[BaseException], bool], str], ...]
DEATHS: Signs = (
    (killed_for_memory, "Ray ended it because its machine was running out of memory"),
    (lambda error: _died(error) and "node has died" in str(error), "its machine was lost"),
    (_died, "its process was lost; the system ends processes like this when memory runs out"),
    (lambda error: "health check has been hanging" in str(error), "it did not answer"),
)
# what the workers meet that are left
COLLATERAL: Signs = (
    (_late, "it waited for the others longer than ray.timeout_s"),
    (_lost_the_others, "it lost the others"),
)


def _how_lost(*errors: BaseException) -> str:
    found = (words for sign, words in (*DEATHS, *COLLATERAL) if any(sign(one) for one in errors))
    return next(found, "")


def explained(error: BaseException) -> str:
    """One line on why a worker failed, as far as that is known."""
    how = _how_lost(error)
    if how:
        return how
    found = user_error(error)
    return found.what if found is not None else f"{type(error).__name__}: {_first_line(error)}"


def reason(failures: Mapping[int, BaseException]) -> str:
    """One line on why workers were lost, from the one whose failure explains those of the others."""

    def order(rank: int) -> tuple[int, int]:
        collateral = any(sign(failures[rank]) for sign, _ in COLLATERAL)
        dead = any(sign(failures[rank]) for sign, _ in DEATHS)
        return (0 if dead else 2 if collateral else 1), rank

    rank = min(failures, key=order)
    return f"worker {rank}: {explained(failures[rank])}"


def lost_at_start(error: BaseException) -> str:
    """One line on how workers were lost before they trained; empty for any other error."""
    how = _how_lost(*causes(error))
    return how and f"while they started: {how}"


def training_failed(error: BaseException, run: str) -> UserError:
    """What to tell the user of a run whose workers were lost once too often, or that Ray could not start."""
    from ray.train import WorkerGroupError

    lost = next((one for one in causes(error) if isinstance(one, WorkerGroupError)), None)
    again = "run the same words again to go on from the last checkpoint"
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
        f"training failed, and ray.max_failures allows no more tries: {why}",
        where=run,
        remedy=f"{again}; --debug shows where it failed",
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
