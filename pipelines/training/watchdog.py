"""A worker's local folder, its watchdog against hanging, and its progress reports."""

from __future__ import annotations

import faulthandler
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmtg_core.training.data import Batch, Data
from pipelines.errors import UserError
from pipelines.runs.events import HUNG, Emit, EventLog
from pipelines.storage import Location

STACKS = "stacks.txt"
REARM_S = 1.0  # least seconds between two timers, which are threads, and between two progress reports


class Scratch:
    """A worker's temporary folder. Creating it removes the folders of workers that were killed.

    The process holds a lock on its folder. A folder that can be locked therefore has no owner.

    Args:
        run: The run folder. Workers of other runs on this machine are left alone.
        emit: Called for a worker that hung.

    Raises:
        UserError: When no folder can be created.
    """

    def __init__(self, run: Location, emit: Emit) -> None:
        temporary = Path(tempfile.gettempdir())
        prefix = f"dmtg-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}-"
        try:
            with _locked(temporary):  # or another worker could remove the folder before it is locked
                for left in temporary.glob(f"{prefix}*"):
                    _clear(left, run, emit)
                self.path = Path(tempfile.mkdtemp(prefix=prefix))
                self.lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self.lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"cannot create a folder for temporary files: {error}",
                where=str(temporary),
                remedy="free disk space there, or set TMPDIR to another folder",
            ) from error

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


@contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Hold a lock on a folder; `fcntl.LOCK_NB` in `flags` raises BlockingIOError instead of waiting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


def _clear(left: Path, run: Location, emit: Emit) -> None:
    """Remove the folder of a worker that has ended; keep its stacks if it hung."""
    try:
        with _locked(left, fcntl.LOCK_NB):
            stacks = left / STACKS
            if stacks.exists() and stacks.stat().st_size:
                kept = run / f"hung_{stacks.stat().st_mtime_ns}.txt"
                kept.write_file(stacks)
                emit(
                    HUNG, f"a worker made no progress for ray.hung_after_s and was ended; its stacks are in {kept}"
                )
            shutil.rmtree(left, ignore_errors=True)
    except (OSError, UserError):
        return  # it has an owner, or is removed next time


class Watchdog:
    """Ends this process if it makes no progress for too long, so that it is replaced or the command can resume.

    The stacks of all threads are written to a file first. The timer does not need Python: it also works if a
    thread holds the interpreter's lock for ever.

    Args:
        hung_after_s: Seconds without progress; 0 for no limit.
        stacks: The file for the stacks.
    """

    def __init__(self, hung_after_s: float, stacks: Path) -> None:
        self.hung_after_s = hung_after_s
        self.armed = -REARM_S
        self.file = stacks.open("w")
        self.progress()

    def progress(self) -> None:
        """Restart the timer."""
        now = time.monotonic()
        if self.hung_after_s and now - self.armed >= REARM_S:
            faulthandler.dump_traceback_later(self.hung_after_s, exit=True, file=self.file)
            self.armed = now

    def close(self) -> None:
        """Stop the timer."""
        if self.hung_after_s:
            faulthandler.cancel_dump_traceback_later()
        self.file.close()


class StepReporter:
    """Reports the step of an epoch to the event log, at most once a second, and does not wait."""

    def __init__(self, event_log: EventLog) -> None:
        self.event_log, self.reported = event_log, -REARM_S

    def __call__(self, step: int, steps: int) -> None:
        """Report that a step has begun."""
        now = time.monotonic()
        if now - self.reported >= REARM_S:
            self.event_log.set_step(step, steps)
            self.reported = now


class MonitoredData:
    """Data that reports every batch as progress; see `dmtg_core.training.data.Data`.

    Args:
        data: The data.
        watchdog: Its timer restarts at every batch.
        step_reporter: Called for every training step; None for no reports.
    """

    def __init__(self, data: Data, watchdog: Watchdog, step_reporter: StepReporter | None = None) -> None:
        self.data, self.watchdog, self.step_reporter = data, watchdog, step_reporter

    def steps(self, batch_size: int) -> int:
        """See `Data.steps`."""
        return self.data.steps(batch_size)

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Data.train`."""
        steps = self.data.steps(batch_size)
        for step, batch in enumerate(self._watched(self.data.train(epoch, batch_size, start)), start + 1):
            if self.step_reporter is not None:
                self.step_reporter(step, steps)
            yield batch

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`."""
        return self._watched(self.data.evaluate(split, batch_size))

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.watchdog.progress()
            yield batch
