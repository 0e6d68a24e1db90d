"""Monitoring of a run: its new metrics and events are printed and tracked while the workers train."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dmtg_core.names import quoted
from dmtg_core.training.profile import SHARES
from pipelines.errors import UserError
from pipelines.execution.executor import Executor
from pipelines.monitoring.exporter import Exporter, Series
from pipelines.monitoring.values import run_values, step_values
from pipelines.registry.tracking import Tracker
from pipelines.runs.events import LOST, RESIZED, RESUMED, WAITING, Event, EventLog, EventWriter, emitter
from pipelines.runs.files import ESTIMATE, EVENTS, GATE, METRICS, PROFILE, read_jsonl
from pipelines.storage import Location
from pipelines.training.progress import Display, NoDisplay

POLL_S = 1.0
NO_DISPLAY = NoDisplay()
WAIT_S = 30.0  # after a loss of workers, before missing resources are reported


class Monitor:
    """Prints and tracks the new metrics and events of a run.

    Args:
        run: The run folder.
        executor: The executor of the workers.
        event_log: Their event log.
        tracker: Receives the metrics.
        log: Called with each line.
        earlier: The events of earlier calls.
        display: The progress display below the lines.
        exporters: Receive the metrics for monitoring systems.
    """

    def __init__(
        self,
        run: Location,
        executor: Executor,
        event_log: EventLog,
        tracker: Tracker,
        log: Callable[[str], None],
        earlier: Sequence[Event],
        display: Display,
        exporters: Sequence[Exporter] = (),
    ) -> None:
        self.run, self.executor, self.tracker, self.log = run.retrying(0), executor, tracker, log
        self.logged = {(r["stage"], r["epoch"]) for r in read_jsonl(run / METRICS)}
        if self.logged:
            log(f"resuming from the last checkpoint; {len(self.logged)} epochs were trained before")
        self.display, self.exporters = display, exporters
        self.values: dict[Series, float] = {}
        if exporters and (run / PROFILE / SHARES).exists():
            self.values |= step_values(run.name, (run / PROFILE / SHARES).read_json())
        self.event_log = event_log
        self.event_writer = EventWriter(run / EVENTS, self.event_log, earlier)
        self.lost_at: float | None = None
        self.estimated = False

    def poll(self) -> None:
        """Print and track what is new."""
        for found in self.event_writer.new():
            self.log(f"note: {found['message']}")
            if found["kind"] == LOST:
                self.lost_at = time.monotonic()
            elif found["kind"] in (RESUMED, RESIZED):
                self.lost_at = None
        self._report_missing_resources()
        try:
            self._estimate()
            self._epochs()
        except UserError:
            pass  # the storage is unreachable, which its writers report; the next poll tries again
        for exporter in self.exporters:
            exporter.export(self.values)

    def _estimate(self) -> None:
        """Log the estimate of a worker, once."""
        if not self.estimated and (self.run / ESTIMATE).exists():
            self.estimated = True
            for line in (self.run / ESTIMATE).read_json()["text"]:
                self.log(line)

    def _epochs(self) -> None:
        gate = {(g["stage"], g["epoch"]): g for g in read_jsonl(self.run / GATE)}
        records = read_jsonl(self.run / METRICS)
        for record in records:
            key = (record["stage"], record["epoch"])
            if key not in self.logged and key in gate:
                self.logged.add(key)
                self.log(epoch_line(record, gate[key]["probabilities"]))
                for warning in record.get("warnings", ()):
                    self.log(f"note: {warning}")
                self.tracker.record(record)
        self.values |= run_values(self.run.name, records, self.event_writer.events)
        if self.display.live:
            self.display.show(records, list(gate.values()), self.event_log.get_step())

    def _report_missing_resources(self) -> None:
        """Emit an event if lost workers wait for resources: Ray itself does not report it."""
        if self.lost_at is None or time.monotonic() - self.lost_at < WAIT_S:
            return
        short = self.executor.missing_resources()
        if short:
            emitter(self.event_log)(WAITING, f"waiting for resources: {short}")
            self.lost_at = None


@contextmanager
def monitoring(
    run: Location,
    executor: Executor,
    event_log: EventLog,
    tracker: Tracker,
    log: Callable[[str], None],
    earlier: Sequence[Event],
    display: Display = NO_DISPLAY,
    exporters: Sequence[Exporter] = (),
) -> Iterator[None]:
    """Monitor a run for the time of the block. See `Monitor`."""
    monitor = Monitor(run, executor, event_log, tracker, log, earlier, display, exporters)
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(POLL_S):
            monitor.poll()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt as error:
        tracker.fail()
        raise KeyboardInterrupt(str(run)) from error  # the folder from which the same command resumes
    except BaseException:
        tracker.fail()
        raise
    finally:
        stop.set()
        thread.join()
        monitor.poll()


def epoch_line(record: dict[str, Any], probabilities: list[list[float]]) -> str:
    """An epoch in one line: stage, score, speed, and the current groups with the lowest gate probability."""
    tasks = list(record["val"])
    line = f"{record['stage']:>10} epoch {record['epoch']:>3}  score {_short(record['val_score'])}"
    line += f"  {record['samples_per_second']:.0f} samples/s, {record['data_share']:.0%} waiting for data"
    if len(probabilities[0]) == 1:
        return line
    groups: dict[int, list[str]] = {}
    for task, row in zip(tasks, probabilities, strict=True):
        groups.setdefault(int(np.argmax(row)), []).append(task)
    least = min(max(row) for row in probabilities)
    shown = " | ".join(", ".join(map(quoted, members)) for members in groups.values())
    return f"{line}  {record['heads']} heads  least sure {least:.0%}  {_clip(shown, 100)}"


def _short(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
