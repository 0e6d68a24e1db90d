"""What runs in Ray Train's controller: it knows why workers were lost, and whether new ones would do better."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.train import UserCallback, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from pipelines.cluster import causes, set_environment
from pipelines.runs.events import LOST
from pipelines.training.ray.events import emitter
from pipelines.training.ray.failures import PermanentError, lost_at_start, reason


class Watch(UserCallback):
    """Tells why workers were lost, and ends a run whose next workers would meet the same error."""

    def __init__(self, event_log: Any) -> None:
        self.emit = emitter(event_log)
        self.told = ""

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:  # noqa: ARG002 - Ray's names
        """Training moves."""
        self.told = ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Called for what one look at the workers has found.

        Raises:
            LastingError: The controller does not retry after an error of its own callbacks.
        """
        for error in worker_exceptions.values():
            permanent = next((one for one in causes(error) if isinstance(one, PermanentError)), None)
            if permanent is not None:
                raise permanent
        self.lost(reason(worker_exceptions))

    def lost(self, why: str) -> None:
        """Tell it, once: while a machine is being taken away, it is found at every look."""
        if why != self.told:
            self.emit(LOST, f"workers were lost ({why})")
        self.told = why


class Workers(WorkerGroup):
    """Ray's workers, which may also be lost between the start of their processes and that of training.

    Ray keeps the room of those, and their successors wait for it; and where they were just given their work, it
    takes the loss for an error of the controller's own, after which it tries no more.
    """

    def _start(self) -> None:
        try:
            super()._start()
        except Exception as error:
            if not self.has_started():  # their processes did not come up: Ray lets the room go, and tries again
                raise
            self._worker_group_state.shutdown()
            why = lost_at_start(error)
            if not why:
                raise
            for callback in self._train_run_context.run_config.callbacks:
                if isinstance(callback, Watch):
                    callback.lost(why)
            raise WorkerGroupError(why, {}) from error


class Lead(ControllerCallback):
    """Gives the controller its kind of workers, and puts it on the board for `end_workers`, before any starts."""

    def __init__(self, event_log: Any) -> None:
        self.event_log = event_log

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002 - Ray's name
        """In the controller's own process."""
        set_environment()  # the controller of a cluster that was joined inherits none of the driver's variables
        TrainController.worker_group_cls = Workers
        ray.get(self.event_log.led_by.remote(ray.get_runtime_context().current_actor))


def end_workers(event_log: Any) -> None:
    """Let a run's workers and their room go, where the process that started them is about to leave.

    Left to Ray, the room stays taken wherever there is no dashboard that says who is alive.
    """
    with contextlib.suppress(ray.exceptions.RayError):  # it leaves with an error, or has left
        controller = ray.get(event_log.leader.remote())
        if controller is not None:
            ray.get(controller.abort.remote())


class Trainer(TorchTrainer):
    """Ray's trainer, which leaves Ctrl-C to the command: Ray's own handler ends the process with exit code 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Nothing: KeyboardInterrupt comes out of `fit`."""
