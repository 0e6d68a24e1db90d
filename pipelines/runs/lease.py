"""The lease: a file that allows one job at a time. Its holder renews it; without renewal it expires."""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.storage import Location

FILE = "_lease.json"
LEASE_S = 120.0
POLL_S = 2.0
_OWN: set[str] = set()  # tokens of this process: a lost process can have had the same number
SETTLE_S = 1.0  # time until a file that another process wrote at the same time is visible


class Lease:
    """A lease that one process holds at a time, on any machine with access to the file.

    The lease expires `timeout_s` after its last renewal. Another process can acquire it then. Times come from the
    clocks of the machines, which must differ by much less than the timeout. On storage without conditional writes
    two processes can acquire the lease at the same moment. One of them loses it, which `renew` and `check` detect.

    Args:
        file: File of the lease.
        timeout_s: Seconds without renewal after which the lease expires. Its holder renews it four times as often.
        job: Name of the job in messages.
    """

    def __init__(self, file: Location, timeout_s: float, job: str) -> None:
        self.file, self.timeout_s, self.job = file, timeout_s, job
        self.token = uuid.uuid4().hex
        self.lost_to = ""
        self.renewed = time.monotonic()
        self._stop = threading.Event()

    def _content(self) -> dict[str, Any]:
        return {"token": self.token, "host": _host(), "pid": os.getpid(), "renewed": time.time()}

    def _read(self) -> dict[str, Any] | None:
        try:
            held: dict[str, Any] = self.file.read_json()
        except FileNotFoundError:
            return None
        return held

    def try_acquire(self) -> dict[str, Any] | None:
        """Acquire the lease if it is free.

        Returns:
            None if it was acquired, else the content of its file.
        """
        _OWN.add(self.token)
        held = self._read()
        if held is None:
            if not self.file.create(_text(self._content())):
                return self._read() or self.try_acquire()
            if self.file.local is not None:  # creation is atomic there
                return None
        elif self._alive(held):
            return held
        else:
            self.file.write_json(self._content())
        time.sleep(SETTLE_S)
        held = self._read()
        return None if held is not None and held["token"] == self.token else held

    def _alive(self, held: dict[str, Any]) -> bool:
        if held["host"] == _host():  # on the same machine a lost process is known at once
            pid = int(held["pid"])
            if not _runs(pid) or (pid == os.getpid() and held["token"] not in _OWN):
                return False
        return time.time() - float(held["renewed"]) < self.timeout_s

    def renew(self) -> None:
        """Renew the lease, or note that another process holds it."""
        try:
            held = self._read()
            if held is None or held["token"] != self.token:
                self.lost_to = f"{held['host']}, process {held['pid']}" if held else "its file was deleted"
                return
            self.file.write_json(self._content())
            self.renewed = time.monotonic()
        except UserError:
            return  # the storage is unreachable, so no other process can acquire the lease either

    def check(self) -> None:
        """Renew the lease before a step that only its holder may do.

        Raises:
            UserError: If another process holds it.
        """
        self.renew()
        if self.lost_to or time.monotonic() - self.renewed > self.timeout_s:
            raise UserError(
                f"another {self.job} has taken over: {self.lost_to or 'this one could not renew its lease'}",
                where=str(self.file),
                remedy="wait until the other one has ended; the same command then resumes",
            )

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self.timeout_s / 4):
            self.renew()

    def here(self) -> bool:
        """Whether a process of this machine holds the lease: it is known to be alive then."""
        held = self._read()
        return held is not None and held["host"] == _host() and self._alive(held)

    @contextmanager
    def held(self, wait_s: float = 0.0, log: Callable[[str], None] = print) -> Iterator[Lease]:
        """Hold the lease during the block.

        Args:
            wait_s: Seconds to wait while another process holds it.
            log: Log callback.

        Raises:
            UserError: If it is not free in time.
        """
        self.acquire(wait_s, log)
        thread = threading.Thread(target=self._renew_until_stopped, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            _OWN.discard(self.token)
            with suppress(UserError):  # the storage is unreachable: the lease expires
                held = self._read()
                if held is not None and held["token"] == self.token:
                    self.file.delete()

    def acquire(self, wait_s: float = 0.0, log: Callable[[str], None] = print) -> None:
        """Acquire the lease; see `held`."""
        until, other = time.monotonic() + wait_s, self.try_acquire()
        if other is not None and wait_s > 0:
            log(f"waiting for another {self.job} ({_shown(other)})")
        while other is not None and time.monotonic() < until:
            time.sleep(min(POLL_S, max(until - time.monotonic(), 0.0)))
            other = self.try_acquire()
        if other is not None:
            raise UserError(
                f"another {self.job} is running: {_shown(other)}",
                where=str(self.file),
                remedy="wait until it has ended (dmtg regroup --wait SECONDS); "
                f"the lease of a lost job expires after {self.timeout_s:g} s",
            )


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _shown(held: dict[str, Any]) -> str:
    ago = max(time.time() - float(held["renewed"]), 0)
    return f"process {held['pid']} on {held['host']}, last seen {ago:.0f} s ago"


def _host() -> str:
    """The machine and its process namespace. Containers with one host name have their own process ids."""
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


@contextmanager
def only_one(folder: Location, job: str, log: Callable[[str], None], *, wait: bool = False) -> Iterator[Lease]:
    """Allow one job in a folder at a time.

    A job that another machine started may be lost: it is waited for until its lease expires.

    Args:
        folder: Folder of the job; the lease is a file in it.
        job: Name of the job in messages.
        log: Log callback.
        wait: Whether to wait for the other job to its end.

    Raises:
        UserError: If another job holds the lease. Nothing has been written then.
    """
    lease = Lease(folder.retrying(0) / FILE, LEASE_S, job)
    patience = 0.0 if lease.here() else LEASE_S + POLL_S
    with lease.held(math.inf if wait else patience, log):
        yield lease
