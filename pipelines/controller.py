"""What runs in Ray Train's controller: it knows why workers were lost, and whether new ones would do better."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback
from ray.train.torch import TorchTrainer

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


class Trainer(TorchTrainer):
    """Ray's trainer, which leaves Ctrl-C to the command: Ray's own handler ends the process with exit code 0."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Nothing: KeyboardInterrupt comes out of `fit`."""
