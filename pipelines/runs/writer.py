"""Background writer: writes that fail are retried and do not stop training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.errors import UserError
from pipelines.runs.events import UNWRITTEN, Emit
from pipelines.storage import is_transient, retry_delays


@dataclass(frozen=True)
class PendingWrite:
    """A function that writes, and one that is called after it has succeeded or been given up."""

    write: Callable[[], None]
    done: Callable[[], None] = lambda: None


class BackgroundWriter:
    """Writes in its own thread. A write is retried until it succeeds or a newer one of its name replaces it.

    A full disk or an unreachable server therefore costs checkpoints and does not stop training.

    Args:
        emit: Called when writes begin to fail, and when they succeed again.
    """

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.failing = self.closed = False
        self.waiting: dict[str, PendingWrite] = {}
        self.current: str | None = None  # name of the current write
        self.changed = threading.Condition()
        threading.Thread(target=self._run, name="background-writer", daemon=True).start()

    def put(self, name: str, pending: PendingWrite) -> None:
        """Add a write; it replaces a waiting one of the same name."""
        with self.changed:
            old = self.waiting.pop(name, None)
            self.waiting[name] = pending
            self.changed.notify_all()
        if old is not None:
            old.done()

    def flush(self, patience_s: float) -> bool:
        """Wait at most `patience_s` for all writes; whether they have ended."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.waiting and self.current is None, patience_s)

    def close(self) -> None:
        """Give up all waiting writes."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.current = None
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                self.current = next(iter(self.waiting))
                pending = self.waiting.pop(self.current)
            self._deliver(self.current, pending)

    def _deliver(self, name: str, pending: PendingWrite) -> None:
        for pause in retry_delays():
            try:
                pending.write()
            except Exception as error:  # noqa: BLE001 - no error of a write stops training
                self._failed(name, error)
                if not is_transient(error) or self._superseded(name, pause):
                    break
            else:
                self._succeeded(name)
                break
        pending.done()

    def _superseded(self, name: str, pause: float) -> bool:
        """Whether a newer write of this name is added within the pause before the next retry."""
        with self.changed:
            return self.changed.wait_for(lambda: name in self.waiting or self.closed, pause)

    def _failed(self, name: str, error: Exception) -> None:
        if not self.failing and not self.closed:
            reason = error.what.removeprefix("cannot write: ") if isinstance(error, UserError) else str(error)
            self.emit(UNWRITTEN, f"{name} cannot be written, training continues without it ({reason})")
        self.failing = True

    def _succeeded(self, name: str) -> None:
        if self.failing:
            self.emit(UNWRITTEN, f"{name} could be written again")
        self.failing = False
