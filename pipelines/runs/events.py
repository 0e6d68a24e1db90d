"""What happened to a run: workers lost, checkpoints damaged, writes that failed. Kept in `events.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

DAMAGED, RESIZED, LOST = "damaged", "resized", "lost"
RESUMED, UNWRITTEN, HUNG, WAITING = "resumed", "unwritten", "hung", "waiting"
FOR_RESULT = (DAMAGED, RESIZED, LOST, HUNG)  # kinds that are still worth knowing when the run is done

Emit = Callable[[str, str], None]  # kind and message
Event = dict[str, Any]


def event(kind: str, message: str) -> Event:
    """A line of `events.jsonl`."""
    return {"time": time.time(), "kind": kind, "message": message}


def for_result(events: Sequence[Event]) -> list[str]:
    """The messages that belong beside a result, each once."""
    return list(dict.fromkeys(told["message"] for told in events if told["kind"] in FOR_RESULT))
