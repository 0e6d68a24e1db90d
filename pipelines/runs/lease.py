"""The lease: a file that allows one job at a time. Its holder renews it; without renewal it is left behind."""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pipelines.errors import UserError
from pipelines.runs.processes import has_ended, host, this_process
from pipelines.storage import Location
from pipelines.stores import STORES

FILE = "_lease.json"
LEASE_S = 120.0
POLL_S = 2.0
_OWN: set[str] = set()  # tokens that this process holds: one that an error left behind is not among them
KINDS = {"token": str, "host": str, "pid": int}
SETTLE_S = 1.0  # time until a file that another process wrote at the same time is visible


class Lease:
    """A lease that one process holds at a time, on any machine with access to the file.

    Its holder counts its renewals in the file. A process that sees no renewal for `timeout_s` of its own time can
    acquire the lease, and at once if the holder was a process of the same machine that has ended. Clocks of
    machines are not compared: the time in the file only decides whether a job without patience watches a lease
    that looks old, or gives up at once. On storage without conditional writes two processes can acquire the lease
    at the same moment. One of them loses it, which `renew` and `check` detect.

    Args:
        file: File of the lease.
        timeout_s: Seconds without renewal after which the lease is left behind. Its holder renews it four times as
            often.
        job: Name of the job in messages.
    """

    def __init__(self, file: Location, timeout_s: float, job: str) -> None:
        self.file, self.timeout_s, self.job = file, timeout_s, job
        self.token = uuid.uuid4().hex
        self.lost_to = ""
        self.renewed = time.monotonic()
        self.count = 0
        self.first: dict[str, Any] | None = None  # the lease of another process as it was seen first
        self.seen: tuple[dict[str, Any] | None, float] = (None, 0.0)  # as it was seen last, and since when
        self._stop = threading.Event()
        self._renewing = threading.Lock()

    def _content(self) -> dict[str, Any]:
        self.count += 1
        return {"token": self.token, **this_process(), "renewed": time.time(), "count": self.count}

    def _read(self) -> dict[str, Any] | None:
        """The content of the file; a token that nobody has if it is damaged; None without a file."""
        try:
            text = self._bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        try:
            held = json.loads(text)
            known = (
                isinstance(held["token"], str) and isinstance(held["host"], str) and isinstance(held["pid"], int)
            )
            if known and math.isfinite(held["renewed"]):
                return dict(held)
        except (ValueError, TypeError, KeyError):
            pass
        return {"token": "", "damaged": text}

    def _bytes(self) -> bytes:
        """The bytes of the file. HDFS has none for a moment while its holder replaces it, so it is read twice."""
        store = STORES.get(self.file.scheme)
        if store is not None and not store.replaces:
            with suppress(FileNotFoundError):
                return self.file.read_bytes()
            time.sleep(SETTLE_S)
        return self.file.read_bytes()

    def try_acquire(self) -> dict[str, Any] | None:
        """Acquire the lease if it is free or left behind.

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
        elif not self._left_behind(held):
            return held
        else:
            self.file.write_json(self._content())
        time.sleep(SETTLE_S)
        held = self._read()
        return None if held is not None and held["token"] == self.token else held

    def _left_behind(self, held: dict[str, Any]) -> bool:
        if _ended(held):
            return True  # on the same machine a lost process is known at once
        now = time.monotonic()
        self.first = self.first or held
        if held != self.seen[0]:
            self.seen = held, now
        return now - self.seen[1] >= self.timeout_s

    def _watched(self, held: dict[str, Any]) -> bool:
        """Whether a lease may be left behind.

        It looks old, damaged or of the future, and has not been renewed since it was seen first.
        """
        fresh = "damaged" not in held and 0 <= time.time() - held["renewed"] < self.timeout_s
        return not fresh and held == self.first

    def renew(self) -> None:
        """Renew the lease, or note that another process holds it."""
        with self._renewing, suppress(UserError):  # no other process can acquire it on unreachable storage either
            held = self._read()
            if held is None or held["token"] != self.token:
                self.lost_to = _holder(held) if held else "its file was deleted"
                return
            self.file.write_json(self._content())
            self.renewed = time.monotonic()

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
        return held is not None and held.get("host") == host() and not _ended(held)

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
            with suppress(UserError):  # the storage is unreachable: the lease is left behind
                held = self._read()
                if held is not None and held["token"] == self.token:
                    self.file.delete()

    def acquire(self, wait_s: float = 0.0, log: Callable[[str], None] = print) -> None:
        """Acquire the lease; see `held`. A lease that looks left behind is watched for `timeout_s`."""
        until, other, logged = time.monotonic() + wait_s, self.try_acquire(), False
        while other is not None and (time.monotonic() < until or self._watched(other)):
            if not logged:
                log(f"waiting for another {self.job} ({_shown(other)})")
            logged = True
            time.sleep(POLL_S)
            other = self.try_acquire()
        if other is not None:
            _OWN.discard(self.token)
            raise UserError(
                f"another {self.job} is running: {_shown(other)}",
                where=str(self.file),
                remedy="wait until it has ended (dmtg regroup --wait SECONDS); "
                f"the lease of a lost job is free after {self.timeout_s:g} s without renewal",
            )


def _ended(held: dict[str, Any]) -> bool:
    """Whether the holder has ended, or is this process and does not hold it any more."""
    return has_ended(held) or (this_process().items() <= held.items() and held["token"] not in _OWN)


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _holder(held: dict[str, Any]) -> str:
    return "unknown, its file is damaged" if "damaged" in held else f"{held['host']}, process {held['pid']}"


def _shown(held: dict[str, Any]) -> str:
    if "damaged" in held:
        return "its lease is damaged"
    ago = time.time() - held["renewed"]
    seen = f"last seen {ago:.0f} s ago" if ago >= 0 else f"its clock is {-ago:.0f} s ahead of this one"
    return f"process {held['pid']} on {held['host']}, {seen}"


@contextmanager
def only_one(folder: Location, job: str, log: Callable[[str], None], *, wait: bool = False) -> Iterator[Lease]:
    """Allow one job in a folder at a time.

    A job that another machine started may be lost: it is waited for until its lease is left behind.

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
