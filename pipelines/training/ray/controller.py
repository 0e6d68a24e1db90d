"""Callbacks that run in Ray Train's controller: they report lost workers and end runs after permanent errors."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import ray

from pipelines.execution.errors import causes
from pipelines.execution.session import set_environment
from pipelines.runs.events import LOST, emitter
from pipelines.training.failures import PermanentError
from pipelines.training.ray.adapter import ControllerSetup, StartFailureCallback, abort
from pipelines.training.ray.events import RayEventLog
from pipelines.training.ray.failures import lost_at_start, reason


class FailureCallback(StartFailureCallback):
    """Reports why workers were lost, and ends a run whose next workers would fail with the same error."""

    def __init__(self, event_log: RayEventLog) -> None:
        self.emit = emitter(event_log)
        self.reported = ""

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:  # noqa: ARG002 - Ray's names
        """Note that training proceeds, so that the next loss is reported."""
        self.reported = ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Handle the failures that one poll of the workers has found.

        Raises:
            PermanentError: The controller does not retry after an error of its own callbacks.
        """
        for error in worker_exceptions.values():
            permanent = next((one for one in causes(error) if isinstance(one, PermanentError)), None)
            if permanent is not None:
                raise permanent
        self._report(reason(worker_exceptions))

    def after_start_failure(self, error: Exception) -> str:
        """See `StartFailureCallback`."""
        why = lost_at_start(error)
        if why:
            self._report(why)
        return why

    def _report(self, why: str) -> None:
        """Emit the event once: while a machine is removed, every poll finds the same loss."""
        if why != self.reported:
            self.emit(LOST, f"workers were lost ({why})")
        self.reported = why


def controller_callbacks(event_log: RayEventLog) -> list[Any]:
    """The callbacks of a run, for `ray.train.RunConfig`."""
    return [ControllerSetup(partial(_register, event_log)), FailureCallback(event_log)]


def _register(event_log: RayEventLog, controller: Any) -> None:
    set_environment()  # the controller of a joined cluster inherits none of the driver's variables
    ray.get(event_log.actor.set_controller.remote(controller))


def end_workers(event_log: RayEventLog) -> None:
    """End a run's workers and free their resources, when the process that started them is about to exit.

    Without a dashboard Ray does not notice that the process has exited and keeps the resources.
    """
    with contextlib.suppress(ray.exceptions.RayError):  # the controller ends with an error, or has ended
        controller = ray.get(event_log.actor.get_controller.remote())
        if controller is not None:
            abort(controller)
