"""Events of a run: lost workers, damaged checkpoints, failed writes. They are stored in `events.jsonl`.

Processes send events to an event log, not to the run folder: most of them report that its disk is full or its
server is unreachable. The process that monitors the run copies them into the folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pipelines.errors import UserError
from pipelines.storage import Location

DAMAGED, RESIZED, LOST = "damaged", "resized", "lost"
RESUMED, UNWRITTEN, HUNG, WAITING = "resumed", "unwritten", "hung", "waiting"
DRAINED = "drained"  # a machine is about to be taken away
FOR_RESULT = (DAMAGED, RESIZED, LOST, HUNG)  # kinds that are stored with the result

Emit = Callable[[str, str], None]  # kind and message
Event = dict[str, Any]


def event(kind: str, message: str) -> Event:
    """A line of `events.jsonl`."""
    return {"time": time.time(), "kind": kind, "message": message}


def for_result(events: Sequence[Event]) -> list[str]:
    """The messages that are stored with the result, each once."""
    return list(dict.fromkeys(one["message"] for one in events if one["kind"] in FOR_RESULT))


class EventLog(Protocol):
    """Collects the events of a run's processes, and the current training step."""

    def put(self, one: Event) -> None:
        """Add an event, without waiting for it."""
        ...

    def after(self, count: int) -> list[Event]:
        """All events but the first `count`; none if the event log has been lost."""
        ...

    def set_step(self, step: int, steps: int) -> None:
        """Store the step of the current epoch, and its number of steps, without waiting for it."""
        ...

    def get_step(self) -> tuple[int, int]:
        """Step of the current epoch, and its number of steps; zeros if the event log has been lost."""
        ...


class LocalEventLog:
    """The event log of a run that trains in this process."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.step = (0, 0)

    def put(self, one: Event) -> None:
        """See `EventLog.put`."""
        self.events.append(one)

    def after(self, count: int) -> list[Event]:
        """See `EventLog.after`."""
        return self.events[count:]

    def set_step(self, step: int, steps: int) -> None:
        """See `EventLog.set_step`."""
        self.step = step, steps

    def get_step(self) -> tuple[int, int]:
        """See `EventLog.get_step`."""
        return self.step


def emitter(event_log: EventLog) -> Emit:
    """A function that adds an event to the event log."""

    def emit(kind: str, message: str) -> None:
        event_log.put(event(kind, message))

    return emit


class EventWriter:
    """Copies the events of an event log into the run folder.

    Args:
        file: The file of the run folder.
        event_log: The event log.
        earlier: The events of earlier calls, which the file holds already.
    """

    def __init__(self, file: Location, event_log: EventLog, earlier: Sequence[Event] = ()) -> None:
        self.file, self.event_log, self.earlier = file.retrying(0), event_log, len(earlier)
        self.events = list(earlier)
        self.written = len(self.events)

    def new(self) -> list[Event]:
        """The events since the last call."""
        found = self.event_log.after(len(self.events) - self.earlier)
        self.events += found
        if self.written < len(self.events):
            self._write()
        return found

    def _write(self) -> None:
        try:
            self.file.write_text("".join(json.dumps(one) + "\n" for one in self.events))
        except UserError:
            return  # the storage is unreachable or full: the next call writes them
        self.written = len(self.events)
