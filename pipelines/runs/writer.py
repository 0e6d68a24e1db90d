"""Writes in the background, which never stop what is written about."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.errors import UserError
from pipelines.runs.events import UNWRITTEN, Emit
from pipelines.storage import is_transient, retry_delays


@dataclass(frozen=True)
class PendingWrite:
    """Something to write, and what to do when it is written or given up."""

    write: Callable[[], None]
    done: Callable[[], None] = lambda: None


class BackgroundWriter:
    """Writes in a thread of its own, each thing until it succeeds or a newer one of its name takes its place.

    So a disk that is full, or a server that is away, costs checkpoints and not the training.

    Args:
        tell: Hears when writing begins to fail, and when it succeeds again.
    """

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.failing = self.closed = False
        self.waiting: dict[str, PendingWrite] = {}
        self.at: str | None = None  # what is being written
        self.changed = threading.Condition()
        threading.Thread(target=self._run, name="outbox", daemon=True).start()

    def put(self, name: str, pending: PendingWrite) -> None:
        """Write this, in the place of what still waits under its name."""
        with self.changed:
            old = self.waiting.pop(name, None)
            self.waiting[name] = pending
            self.changed.notify_all()
        if old is not None:
            old.done()

    def flush(self, patience_s: float) -> bool:
        """Wait until all is written, and no longer than `patience_s`; whether it is."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.waiting and self.at is None, patience_s)

    def close(self) -> None:
        """Give up what is not written."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.at = None
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                self.at = next(iter(self.waiting))
                pending = self.waiting.pop(self.at)
            self._deliver(self.at, pending)

    def _deliver(self, name: str, pending: PendingWrite) -> None:
        for pause in retry_delays():
            try:
                pending.write()
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on without
                self._failed(name, error)
                if not is_transient(error) or self._superseded(name, pause):
                    break
            else:
                self._succeeded(name)
                break
        pending.done()

    def _superseded(self, name: str, pause: float) -> bool:
        """Whether a newer one of this name has come, within the pause before the next try."""
        with self.changed:
            return self.changed.wait_for(lambda: name in self.waiting or self.closed, pause)

    def _failed(self, name: str, error: Exception) -> None:
        if not self.failing and not self.closed:
            reason = error.what.removeprefix("cannot write: ") if isinstance(error, UserError) else str(error)
            self.emit(UNWRITTEN, f"{name} cannot be written, training goes on without it ({reason})")
        self.failing = True

    def _succeeded(self, name: str) -> None:
        if self.failing:
            self.emit(UNWRITTEN, f"{name} could be written again")
        self.failing = False
