"""One job at a time: a file that its holder renews, and that counts as left behind when it no longer does."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.storage import Location

POLL_S = 2.0
SETTLE_S = 1.0  # until what another has written at the same time can be seen


class Lease:
    """The right to do a job, held by one process at a time, on any machine that reaches the file.

    A lease that was left behind is taken over after `silence_s` without a sign of life; times are those of the
    machines' clocks, which must agree to much less than that. Storage that cannot create a file on a condition
    leaves a moment in which two could both believe to have it: the one that lost finds out at its next renewal,
    and at `check` before anything that matters.

    Args:
        file: Where it lies.
        silence_s: How long a holder may be silent; it renews four times as often.
        job: What messages call it.
    """

    def __init__(self, file: Location, silence_s: float, job: str) -> None:
        self.file, self.silence_s, self.job = file, silence_s, job
        self.token = uuid.uuid4().hex
        self.lost = ""
        self.renewed = time.monotonic()
        self._stop = threading.Event()

    def _mine(self) -> dict[str, Any]:
        return {"token": self.token, "host": _host(), "pid": os.getpid(), "renewed": time.time()}

    def _held(self) -> dict[str, Any] | None:
        try:
            held: dict[str, Any] = self.file.read_json()
        except FileNotFoundError:
            return None
        return held

    def take(self) -> dict[str, Any] | None:
        """Take it where it is free; None, or who has it."""
        held = self._held()
        if held is None:
            if not self.file.create(_text(self._mine())):
                return self._held() or self.take()
        elif self._alive(held):
            return held
        else:
            self.file.write_json(self._mine())
        time.sleep(SETTLE_S)
        held = self._held()
        return None if held is not None and held["token"] == self.token else held

    def _alive(self, held: dict[str, Any]) -> bool:
        if held["host"] == _host() and not _runs(int(held["pid"])):
            return False  # here it can be known at once
        return time.time() - float(held["renewed"]) < self.silence_s

    def renew(self) -> None:
        """Say that this holder lives."""
        try:
            held = self._held()
            if held is None or held["token"] != self.token:
                self.lost = f"{held['host']}, process {held['pid']}" if held else "somebody who removed it"
                return
            self.file.write_json(self._mine())
            self.renewed = time.monotonic()
        except UserError:
            return  # the storage is away: what cannot be written by us cannot be taken by others either

    def check(self) -> None:
        """Before what only the holder may do.

        Raises:
            UserError: When another has taken it over.
        """
        self.renew()
        if self.lost or time.monotonic() - self.renewed > self.silence_s:
            raise UserError(
                f"another {self.job} has taken over: {self.lost or 'this one could not log that it lives'}",
                where=str(self.file),
                remedy="let the other one end; the same words then go on with what it left",
            )

    def _keep(self) -> None:
        while not self._stop.wait(self.silence_s / 4):
            self.renew()

    @contextmanager
    def held(self, wait_s: float = 0.0, log: Callable[[str], None] = print) -> Iterator[Lease]:
        """Hold it for the time of the block.

        Args:
            wait_s: How long to wait while another has it.
            say: Told when there is a wait.

        Raises:
            UserError: When it is not free in time, with who has it.
        """
        self.take_or_refuse(wait_s, log)
        thread = threading.Thread(target=self._keep, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            held = self._held()
            if held is not None and held["token"] == self.token:
                self.file.delete()

    def take_or_refuse(self, wait_s: float = 0.0, log: Callable[[str], None] = print) -> None:
        """Take it, as `held` says."""
        until, other = time.monotonic() + wait_s, self.take()
        if other is not None and wait_s > 0:
            log(f"waiting for another {self.job} ({_shown(other)})")
        while other is not None and time.monotonic() < until:
            time.sleep(min(POLL_S, max(until - time.monotonic(), 0.0)))
            other = self.take()
        if other is not None:
            raise UserError(
                f"another {self.job} is running: {_shown(other)}",
                where=str(self.file),
                remedy="wait for it with --wait SECONDS; one that was lost counts as dead after "
                f"{self.silence_s:g} s of silence",
            )


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _shown(held: dict[str, Any]) -> str:
    ago = max(time.time() - float(held["renewed"]), 0)
    return f"process {held['pid']} on {held['host']}, last seen {ago:.0f} s ago"


def _host() -> str:
    """Where a process number means the same process: containers of one name number their own."""
    space = Path("/proc/self/ns/pid")
    return socket.gethostname() + (f"/{space.stat().st_ino}" if space.exists() else "")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
