"""Failures of training: which of them are permanent, and the error for the user."""

from __future__ import annotations

import torch

from dmtg_core.addresses import CodeError
from dmtg_core.training.checkpoint import OutdatedNetworkError
from dmtg_core.training.loop import NonFiniteLossError
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.execution.errors import user_error

LESS_MEMORY = (
    "lower train.batch_size, or keep it and raise train.accumulate, set train.recompute=true, or "
    "train.precision=bf16"
)
LESS_HOST_MEMORY = (
    "give the machine more memory, or use less: lower ray.workers, ray.object_store_mib, data.shuffle_mib or "
    "train.batch_size"
)
AGAIN = "run the same command again to resume from the last checkpoint; --debug shows where it failed"


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
    if isinstance(error, CodeError):
        return PermanentError(error.problem, where=run, remedy=error.remedy)
    if out_of_memory(error):
        share = f"{config.train.batch_size} samples on {workers} worker{'s' * (workers > 1)}"
        return PermanentError(
            f"memory ran out in training on a batch of {share}: {first_line(error)}",
            where="training worker",
            remedy=LESS_MEMORY
            + ("" if config.ray.fewest == config.ray.most else ", or raise the smaller number of ray.workers"),
        )
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, had no memory for a tensor."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def training_failed(error: BaseException, run: str) -> UserError:
    """The error for the user of a task or a run that failed."""
    found = user_error(error)
    if found is not None:
        return found
    why = last_line(error)
    hint = f"if it was memory: {LESS_HOST_MEMORY}; then " if "memory" in why else ""
    return UserError(f"training failed: {why}", where=run, remedy=f"{hint}{AGAIN}")


def describe(error: BaseException) -> str:
    """An error in one line."""
    found = user_error(error)
    return found.what if found is not None else f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class if it has none."""
    return (_lines(error) or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """The last line of an error's text, or its class if it has none."""
    return (_lines(error) or [type(error).__name__])[-1]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()]
