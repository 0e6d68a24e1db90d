"""The driver's view of a run: what its workers write and tell, printed and tracked while they train."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipelines.cluster import missing_resources
from pipelines.config.ray_section import RaySection
from pipelines.errors import UserError
from pipelines.registry.tracking import Tracker
from pipelines.runs.events import LOST, RESIZED, RESUMED, WAITING, Event
from pipelines.runs.files import EVENTS, GATE, METRICS, read_jsonl
from pipelines.storage import Location
from pipelines.training.progress import Display, NoDisplay
from pipelines.training.ray.events import EventWriter, emitter, moved_on, start_event_log

POLL_S = 1.0
NO_DISPLAY = NoDisplay()
WAIT_S = 30.0  # until workers that do not come back are a reason to look for room


class Monitor:
    """Prints and tracks what is new in a run.

    Args:
        run: The run folder.
        section: What the workers need.
        tracker, say: Where it goes.
        earlier: The events of earlier sessions.
        display: What is shown between the lines.
    """

    def __init__(
        self,
        run: Location,
        section: RaySection,
        tracker: Tracker,
        log: Callable[[str], None],
        earlier: Sequence[Event],
        display: Display,
    ) -> None:
        self.run, self.section, self.tracker, self.log = run.retrying(0), section, tracker, log
        self.told = {(r["stage"], r["epoch"]) for r in read_jsonl(run / METRICS)}
        if self.told:
            log(f"going on from the last checkpoint; {len(self.told)} epochs were done before")
        self.display = display
        self.event_log = start_event_log()
        self.event_writer = EventWriter(run / EVENTS, self.event_log, earlier)
        self.lost_at: float | None = None

    def look(self) -> None:
        """All that is new."""
        for found in self.event_writer.new():
            self.log(f"note: {found['message']}")
            if found["kind"] == LOST:
                self.lost_at = time.monotonic()
            elif found["kind"] in (RESUMED, RESIZED):
                self.lost_at = None
        self._waiting()
        try:
            self._epochs()
        except UserError:
            return  # the storage is away, which its writers tell; with the next look

    def _epochs(self) -> None:
        gate = {(g["stage"], g["epoch"]): g for g in read_jsonl(self.run / GATE)}
        records = read_jsonl(self.run / METRICS)
        for record in records:
            key = (record["stage"], record["epoch"])
            if key not in self.told and key in gate:
                self.told.add(key)
                self.log(epoch_line(record, gate[key]["probabilities"]))
                for warning in record.get("warnings", ()):
                    self.log(f"note: {warning}")
                self.tracker.record(record)
        if self.display.live:
            self.display.show(records, list(gate.values()), moved_on(self.event_log))

    def _waiting(self) -> None:
        """Workers that were lost need room, and Ray waits for it without a word."""
        import ray

        if self.lost_at is None or time.monotonic() - self.lost_at < WAIT_S:
            return
        short = missing_resources(self.section, ray.cluster_resources())
        if short:
            emitter(self.event_log)(WAITING, f"waiting for room: {short}")
            self.lost_at = None


@contextmanager
def monitoring(
    run: Location,
    section: RaySection,
    tracker: Tracker,
    log: Callable[[str], None],
    earlier: Sequence[Event],
    display: Display = NO_DISPLAY,
) -> Iterator[Any]:
    """Follow a run for the time of the block, which is given the board; see `Monitor`."""
    monitor = Monitor(run, section, tracker, log, earlier, display)
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(POLL_S):
            monitor.look()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield monitor.event_log
    except KeyboardInterrupt as error:
        tracker.fail()
        raise KeyboardInterrupt(str(run)) from error  # where the same command goes on
    except BaseException:
        tracker.fail()
        raise
    finally:
        stop.set()
        thread.join()
        monitor.look()


def epoch_line(record: dict[str, Any], probabilities: list[list[float]]) -> str:
    """One epoch in one line: stage, losses, and the groups as they stand with the least certain task's share."""
    tasks = list(record["val"])
    line = f"{record['stage']:>10} epoch {record['epoch']:>3}  score {_short(record['val_score'])}"
    line += f"  {record['samples_per_second']:.0f} samples/s, {record['data_share']:.0%} waiting for data"
    if len(probabilities[0]) == 1:
        return line
    groups: dict[int, list[str]] = {}
    for task, row in zip(tasks, probabilities, strict=True):
        groups.setdefault(int(np.argmax(row)), []).append(task)
    sure = min(max(row) for row in probabilities)
    shown = " | ".join(", ".join(members) for members in groups.values())
    return f"{line}  {record['heads']} heads  least sure {sure:.0%}  {_clip(shown, 100)}"


def _short(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
