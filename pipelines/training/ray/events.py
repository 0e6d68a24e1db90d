"""The event log of a run on Ray: an actor on the node of the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.runs.events import Event, LocalEventLog


class EventActor(LocalEventLog):
    """An event log that also knows the actor of Ray Train's controller."""

    def __init__(self) -> None:
        super().__init__()
        self.controller: Any = None

    def set_controller(self, controller: Any) -> None:
        """Store the actor of Ray Train's controller."""
        self.controller = controller

    def get_controller(self) -> Any:
        """The actor of Ray Train's controller; None before it has started."""
        return self.controller


@dataclass(frozen=True)
class RayEventLog:
    """`EventLog` of any process of a run, over its `EventActor`."""

    actor: Any

    def put(self, one: Event) -> None:
        """See `EventLog.put`."""
        self.actor.put.remote(one)

    def set_step(self, step: int, steps: int) -> None:
        """See `EventLog.set_step`."""
        self.actor.set_step.remote(step, steps)

    def after(self, count: int) -> list[Event]:
        """See `EventLog.after`."""
        found: list[Event] = self._answer(self.actor.after.remote(count), [])
        return found

    def get_step(self) -> tuple[int, int]:
        """See `EventLog.get_step`."""
        step: tuple[int, int] = self._answer(self.actor.get_step.remote(), (0, 0))
        return step

    def _answer(self, reference: Any, lost: Any) -> Any:
        import ray

        try:
            return ray.get(reference, timeout=10)
        except (ray.exceptions.RayError, TimeoutError):
            return lost


def start_event_log() -> RayEventLog:
    """Start an event log on the node of the driver, with which it ends."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return RayEventLog(ray.remote(num_cpus=0)(EventActor).options(scheduling_strategy=here).remote())
