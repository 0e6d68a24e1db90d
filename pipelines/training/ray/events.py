"""What happened to a run that its user should know: told by its processes, printed and kept by the driver.

It goes through a small actor beside the driver and not through the run folder: a disk that is full, or a server
that is away, is what there is most to tell about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipelines.errors import UserError
from pipelines.runs.events import Emit, Event, event
from pipelines.storage import Location


class EventLog:
    """Where processes put what they have to tell. It runs as a Ray actor."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.at = (0, 0)
        self.controller: Any = None

    def led_by(self, controller: Any) -> None:
        """Keep the actor that leads the workers."""
        self.controller = controller

    def leader(self) -> Any:
        """The actor that leads the workers; None before it has started."""
        return self.controller

    def move(self, step: int, steps: int) -> None:
        """Keep how far the epoch is that is under way."""
        self.at = step, steps

    def moved(self) -> tuple[int, int]:
        """Step, and steps of the epoch."""
        return self.at

    def put(self, told: Event) -> None:
        """Add an event."""
        self.events.append(told)

    def after(self, count: int) -> list[Event]:
        """All events but the first `count`."""
        return self.events[count:]


def start_event_log() -> Any:
    """A board on the node of the driver, which ends with it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(EventLog).options(scheduling_strategy=here).remote()


def emitter(event_log: Any) -> Emit:
    """A function that puts something on the board, without waiting for it."""

    def emit(kind: str, message: str) -> None:
        event_log.put.remote(event(kind, message))

    return emit


def events_after(event_log: Any, count: int = 0) -> list[Event]:
    """All that the board holds but the first `count`; nothing where it has been lost."""
    import ray

    try:
        found: list[Event] = ray.get(event_log.after.remote(count), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return []
    return found


def moved_on(event_log: Any) -> tuple[int, int]:
    """Step and steps of the epoch that is under way; none where the board has been lost."""
    import ray

    try:
        at: tuple[int, int] = ray.get(event_log.moved.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return 0, 0
    return at


class EventWriter:
    """The driver's end: takes what is new from the board, and keeps all of it in the run folder.

    Args:
        file: Where to keep it.
        board: See `start_event_log`.
        earlier: What earlier sessions of the run kept there.
    """

    def __init__(self, file: Location, event_log: Any, earlier: Sequence[Event] = ()) -> None:
        self.file, self.event_log, self.earlier = file.retrying(0), event_log, len(earlier)
        self.events = list(earlier)
        self.kept = len(self.events)

    def new(self) -> list[Event]:
        """What came since the last call."""
        found = events_after(self.event_log, len(self.events) - self.earlier)
        self.events += found
        if self.kept < len(self.events):
            self._keep()
        return found

    def _keep(self) -> None:
        try:
            self.file.write_text("".join(json.dumps(told) + "\n" for told in self.events))
        except UserError:
            return  # the storage is away or full: with the next call
        self.kept = len(self.events)
