"""A disk that is full from the n-th write on."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest

from pipelines.storage import Location


class FullDisk:
    """Counts the writes to storage, and fails them from one of them on.

    Args:
        patch: Restores the methods after the test.
        room: Number of writes that succeed; None for all.
    """

    def __init__(self, patch: pytest.MonkeyPatch, room: int | None = None) -> None:
        self.room, self.writes, self.lock = room, 0, threading.Lock()
        for name in ("_write", "_create_local"):
            patch.setattr(Location, name, self._counted(getattr(Location, name)))
        patch.setattr(Location, "retrying", lambda place, *_: place)  # a full disk is waited for otherwise
        patch.setattr("pipelines.training.context.PATIENCE_S", 0.0)

    def _counted(self, write: Any) -> Any:
        def counted(place: Location, *arguments: Any, **options: Any) -> Any:
            with self.lock:
                self.writes += 1
                full = self.room is not None and self.writes > self.room
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(place, *arguments, **options)

        return counted
