"""What runs in Ray Train's controller: it knows why workers were lost, and whether new ones would do better."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback

from pipelines.cluster import causes
from pipelines.faults import LastingError, reason
from pipelines.notices import LOST, teller


class Watch(UserCallback):
    """Tells why workers were lost, and ends a run whose next workers would meet the same error."""

    def __init__(self, board: Any) -> None:
        self.tell = teller(board)
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
            lasting = next((one for one in causes(error) if isinstance(one, LastingError)), None)
            if lasting is not None:
                raise lasting
        why = reason(worker_exceptions)
        if why != self.told:  # while a machine is being taken away, it is found at every look
            self.tell(LOST, f"workers were lost ({why})")
        self.told = why


class Named(ControllerCallback):
    """Puts the controller on the board before it starts a worker: see `end_workers`."""

    def __init__(self, board: Any) -> None:
        self.board = board

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002 - Ray's name
        """The board knows it before any worker can report."""
        ray.get(self.board.led_by.remote(ray.get_runtime_context().current_actor))


def end_workers(board: Any) -> None:
    """Let a run's workers and their room go, where the process that started them is about to leave.

    Left to Ray, the room stays taken wherever there is no dashboard that says who is alive.
    """
    with contextlib.suppress(ray.exceptions.RayError):  # it leaves with an error, or has left
        controller = ray.get(board.leader.remote())
        if controller is not None:
            ray.get(controller.abort.remote())


class Trainer(TorchTrainer):
    """Ray's trainer, which leaves Ctrl-C to the command: Ray's own handler ends the process with exit code 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Nothing: KeyboardInterrupt comes out of `fit`."""
