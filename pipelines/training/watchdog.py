"""A worker's local folder, its watchdog against hanging, and its progress reports."""

from __future__ import annotations

import faulthandler
import hashlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dmtg_core.training.data import Batch, Data
from pipelines.errors import UserError
from pipelines.runs.events import HUNG, Emit, EventLog
from pipelines.scratch import STACKS, Scratch, abandoned, new_scratch
from pipelines.storage import Location

REARM_S = 1.0  # least seconds between two timers, which are threads, and between two progress reports


def worker_scratch(run: Location, emit: Emit) -> Scratch:
    """A worker's temporary folder. The folders of workers of the same run that have ended are removed.

    Args:
        run: The run folder. Workers of other runs on this machine are left alone.
        emit: Called for a worker that hung.

    Raises:
        UserError: When no folder can be created.
    """
    purpose = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    for left in abandoned(purpose):
        _clear(left, run, emit)
    return new_scratch(purpose)


def _clear(left: Path, run: Location, emit: Emit) -> None:
    """Remove the folder of a worker that has ended; keep its stacks if it hung."""
    try:
        stacks = left / STACKS
        if stacks.exists() and stacks.stat().st_size:
            kept = run / f"hung_{stacks.stat().st_mtime_ns}.txt"
            kept.write_file(stacks)
            emit(HUNG, f"a worker made no progress for ray.hung_after_s and was ended; its stacks are in {kept}")
        shutil.rmtree(left, ignore_errors=True)
    except (OSError, UserError):
        return  # it is removed next time


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
