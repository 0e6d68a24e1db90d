"""Adapter to Ray Train's private interfaces: no other module imports or overrides any of them.

- `WorkerGroup._start`, `has_started`, `_worker_group_state.shutdown` and `_train_run_context.run_config`: Ray
  neither frees nor replaces workers that are lost between the start of their processes and that of training.
- `TrainController.worker_group_cls`: the controller has to create that worker group.
- `ControllerCallback.after_controller_start`: the only hook in the controller's process before workers start.
- `TrainController._is_training_succeeded`: workers that stop because a machine is drained have not finished. Ray
  would otherwise let them wait until the machine is gone.
- `TrainController.abort`: a process that exits has to free its workers. Ray does it only with a dashboard.
- `TorchTrainer._register_sigint_handler`: Ray's handler ends the process on Ctrl-C with exit code 0.
- `CollectiveTimeoutError`: a timeout in Ray's own collectives has to be told from an error of training.
- `RAY_TRAIN_COLLECTIVE_TIMEOUT_S`: Ray's own collectives have no time limit otherwise.

`tests/pipelines/training/ray/test_adapter.py` checks each of them against the installed version of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ray
from ray.train import UserCallback, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import CollectiveTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup


class StartFailureCallback(UserCallback):
    """A callback of a run that is also called for workers that were lost before they trained."""

    def after_start_failure(self, error: Exception) -> str:
        """Report the loss of workers; why they were lost, or an empty text for any other error."""
        raise NotImplementedError


class RetriableWorkerGroup(WorkerGroup):
    """Ray's worker group, with a start that can be retried.

    Workers can be lost after their processes have started and before they train. Ray then keeps their resources,
    for which the next workers wait. If they were lost while the training function was sent to them, Ray also takes
    the loss for an error of the controller and does not retry.
    """

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if not self.has_started():  # their processes did not start: Ray frees the resources and retries
                raise
            self._worker_group_state.shutdown()
            callbacks = self._train_run_context.run_config.callbacks
            reasons = [
                one.after_start_failure(error) for one in callbacks if isinstance(one, StartFailureCallback)
            ]
            why = next(filter(None, reasons), "")
            if not why:
                raise
            raise WorkerGroupError(why, {}) from error


STOPPED = "stopped: a machine is being drained"  # return value of a worker that stops before its end


def is_finished(status: Any) -> bool:
    """Whether all workers have ended without an error, and none of them because a machine is being drained.

    Ray starts other workers when all have ended and some machine is being drained. No retry is used up by that.
    """
    stopped = any(one.return_value == STOPPED for one in status.worker_statuses.values())
    return bool(status.finished and not status.errors and not stopped)


# attributes of Ray's controller that are replaced
CONTROLLER = {"worker_group_cls": RetriableWorkerGroup, "_is_training_succeeded": staticmethod(is_finished)}


class ControllerSetup(ControllerCallback):
    """Prepares the controller before it starts workers: `CONTROLLER`, and the way to abort it.

    Args:
        register: Takes the controller's actor.
    """

    def __init__(self, register: Callable[[Any], None]) -> None:
        self.register = register

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002 - Ray's name
        """Run in the controller's process."""
        for name, own in CONTROLLER.items():
            setattr(TrainController, name, own)
        self.register(ray.get_runtime_context().current_actor)


class InterruptibleTrainer(TorchTrainer):
    """Ray's trainer without its handler of Ctrl-C."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Do nothing: `fit` raises KeyboardInterrupt."""


def abort(controller: Any) -> None:
    """End a run's workers and its controller, and free their resources.

    Raises:
        ray.exceptions.RayError: The controller's process ends, or has ended before.
    """
    ray.get(controller.abort.remote())


def limit_collectives(timeout_s: float) -> None:
    """Set the time limit of Ray Train's own collectives for the runs that this process starts from now on."""
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(timeout_s)


def is_collective_timeout(error: BaseException) -> bool:
    """Whether a worker waited too long for the others in one of Ray Train's own collectives."""
    return isinstance(error, CollectiveTimeoutError)
