"""A worker's own eyes on itself: its local folder, which goes with it, and a clock that ends it when it hangs."""

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
from typing import Any

from dmtg_core.training.data import Batch, Data
from pipelines.errors import UserError
from pipelines.runs.events import HUNG, Emit
from pipelines.storage import Location

STACKS = "stacks.txt"
REARM_S = 1.0  # no more often: a timer is a thread, and what is told is a message


class Scratch:
    """A worker's folder for files on their way, and those of workers that were killed before they could remove it.

    The folder is locked for as long as its process lives, however it ends: one that can be locked has no owner.

    Args:
        run: The run folder. Workers of other runs on this machine are left alone.
        tell: Hears of a worker that hung.

    Raises:
        UserError: When no folder can be made.
    """

    def __init__(self, run: Location, emit: Emit) -> None:
        temporary = Path(tempfile.gettempdir())
        prefix = f"dmtg-{hashlib.sha256(str(run).encode()).hexdigest()[:8]}-"
        try:
            with _locked(temporary):  # or another worker would take a folder that is not locked yet for a left one
                for left in temporary.glob(f"{prefix}*"):
                    _clear(left, run, emit)
                self.path = Path(tempfile.mkdtemp(prefix=prefix))
                self.lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self.lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"cannot make a folder for temporary files: {error}",
                where=str(temporary),
                remedy="make room there, or set TMPDIR to another folder",
            ) from error

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


@contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """Raises BlockingIOError where `flags` say not to wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


def _clear(left: Path, run: Location, emit: Emit) -> None:
    """Remove the folder of a worker that is gone; where it left because it hung, keep where it stood."""
    try:
        with _locked(left, fcntl.LOCK_NB):
            stacks = left / STACKS
            if stacks.exists() and stacks.stat().st_size:
                kept = run / f"hung_{stacks.stat().st_mtime_ns}.txt"
                kept.write_file(stacks)
                emit(HUNG, f"a worker made no progress for ray.hung_after_s and was given up; it stood at {kept}")
            shutil.rmtree(left, ignore_errors=True)
    except (OSError, UserError):
        return  # it has an owner, or goes next time


class Watchdog:
    """Ends this process when nothing moves for too long, so that Ray Train starts the workers anew.

    The stacks of all threads go to a file first. It works without Python: a thread that holds the interpreter's
    lock for ever cannot stop it.

    Args:
        hung_after_s: Seconds without progress; 0 to wait for ever.
        stacks: The file.
    """

    def __init__(self, hung_after_s: float, stacks: Path) -> None:
        self.hung_after_s = hung_after_s
        self.armed = -REARM_S
        self.file = stacks.open("w")
        self.progress()

    def progress(self) -> None:
        """Something has moved."""
        now = time.monotonic()
        if self.hung_after_s and now - self.armed >= REARM_S:
            faulthandler.dump_traceback_later(self.hung_after_s, exit=True, file=self.file)
            self.armed = now

    def close(self) -> None:
        """Let the process be."""
        if self.hung_after_s:
            faulthandler.cancel_dump_traceback_later()
        self.file.close()


class StepReporter:
    """Tells a board how far an epoch is, at most once a second, and waits for nothing."""

    def __init__(self, event_log: Any) -> None:
        self.event_log, self.told = event_log, -REARM_S

    def __call__(self, step: int, steps: int) -> None:
        """A step has begun."""
        now = time.monotonic()
        if now - self.told >= REARM_S:
            self.event_log.move.remote(step, steps)
            self.told = now


class MonitoredData:
    """Data whose every batch is progress; see `dmtg_core.training.data.Data`.

    Args:
        data: What is read.
        watchdog: Is told of every batch.
        pulse: Is told of every training step; None to tell nobody.
    """

    def __init__(self, data: Data, watchdog: Watchdog, step_reporter: StepReporter | None = None) -> None:
        self.data, self.watchdog, self.step_reporter = data, watchdog, step_reporter

    def steps(self, batch_size: int) -> int:
        """See `Data.steps`."""
        return self.data.steps(batch_size)

    def train(self, epoch: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """See `Data.train`."""
        steps = self.data.steps(batch_size)
        for step, batch in enumerate(self._seen(self.data.train(epoch, batch_size, start)), start + 1):
            if self.step_reporter is not None:
                self.step_reporter(step, steps)
            yield batch

    def evaluate(self, split: str, batch_size: int) -> Iterator[Batch]:
        """See `Data.evaluate`."""
        return self._seen(self.data.evaluate(split, batch_size))

    def _seen(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.watchdog.progress()
            yield batch
