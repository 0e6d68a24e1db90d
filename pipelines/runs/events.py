"""Events of a run: lost workers, damaged checkpoints, failed writes. They are stored in `events.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

DAMAGED, RESIZED, LOST = "damaged", "resized", "lost"
RESUMED, UNWRITTEN, HUNG, WAITING = "resumed", "unwritten", "hung", "waiting"
FOR_RESULT = (DAMAGED, RESIZED, LOST, HUNG)  # kinds that are stored with the result

Emit = Callable[[str, str], None]  # kind and message
Event = dict[str, Any]


def event(kind: str, message: str) -> Event:
    """A line of `events.jsonl`."""
    return {"time": time.time(), "kind": kind, "message": message}


def for_result(events: Sequence[Event]) -> list[str]:
    """The messages that are stored with the result, each once."""
    return list(dict.fromkeys(one["message"] for one in events if one["kind"] in FOR_RESULT))
