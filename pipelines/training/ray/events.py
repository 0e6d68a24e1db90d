"""The event log: an actor that collects the events of a run's processes, and the driver's side of it.

Events do not go through the run folder: most of them report that its disk is full or its server is unreachable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipelines.errors import UserError
from pipelines.runs.events import Emit, Event, event
from pipelines.storage import Location


class EventLog:
    """Events of a run, the current training step and the controller's actor. It runs as a Ray actor."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.step = (0, 0)
        self.controller: Any = None

    def set_controller(self, controller: Any) -> None:
        """Store the actor of Ray Train's controller."""
        self.controller = controller

    def get_controller(self) -> Any:
        """The actor of Ray Train's controller; None before it has started."""
        return self.controller

    def set_step(self, step: int, steps: int) -> None:
        """Store the step of the current epoch, and its number of steps."""
        self.step = step, steps

    def get_step(self) -> tuple[int, int]:
        """Step of the current epoch, and its number of steps."""
        return self.step

    def put(self, one: Event) -> None:
        """Add an event."""
        self.events.append(one)

    def after(self, count: int) -> list[Event]:
        """All events but the first `count`."""
        return self.events[count:]


def start_event_log() -> Any:
    """Start an event log on the node of the driver, with which it ends."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(EventLog).options(scheduling_strategy=here).remote()


def emitter(event_log: Any) -> Emit:
    """A function that adds an event to the event log and does not wait for it."""

    def emit(kind: str, message: str) -> None:
        event_log.put.remote(event(kind, message))

    return emit


def events_after(event_log: Any, count: int = 0) -> list[Event]:
    """All events of the event log but the first `count`; none if the event log has been lost."""
    import ray

    try:
        found: list[Event] = ray.get(event_log.after.remote(count), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return []
    return found


def current_step(event_log: Any) -> tuple[int, int]:
    """Step of the current epoch and its number of steps; zeros if the event log has been lost."""
    import ray

    try:
        step: tuple[int, int] = ray.get(event_log.get_step.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return 0, 0
    return step


class EventWriter:
    """Copies the events of an event log into the run folder.

    Args:
        file: The file of the run folder.
        event_log: See `start_event_log`.
        earlier: The events of earlier calls, which the file holds already.
    """

    def __init__(self, file: Location, event_log: Any, earlier: Sequence[Event] = ()) -> None:
        self.file, self.event_log, self.earlier = file.retrying(0), event_log, len(earlier)
        self.events = list(earlier)
        self.written = len(self.events)

    def new(self) -> list[Event]:
        """The events since the last call."""
        found = events_after(self.event_log, len(self.events) - self.earlier)
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
