"""The events of the trials of a sweep: they are logged, tracked, and written to the run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.sweep.trackers import Trackers
from pipelines.sweep.trials import FAILED, STOPPED, Trial


class TrialEvents:
    """Logs the events of trials, and writes them to run folders and trackers.

    Args:
        trials: Trials of the sweep by name.
        trackers: Trackers of the sweep.
        log: Log callback.
    """

    def __init__(self, trials: Mapping[str, Trial], trackers: Trackers, log: Callable[[str], None]) -> None:
        self.trials, self.trackers, self.log = trials, trackers, log
        self.count = 0

    def started(self, name: str) -> None:
        """A trial starts, or starts again in another process."""
        (self.trials[name].run / FAILED).delete()
        self.trackers.open(self.trials[name])

    def epoch(self, name: str, epoch: int, record: Mapping[str, Any]) -> None:
        """A trial has finished an epoch."""
        shown = "not defined" if record["val_score"] is None else f"{record['val_score']:.4f}"
        self.log(f"{name}: epoch {epoch} of at most {self.trials[name].reports}, score {shown}")
        self.trackers.open(self.trials[name]).record(record)

    def ended(self, name: str, reason: str = "") -> None:
        """A trial has finished, was stopped, or has failed with a reason."""
        run = self.trials[name].run
        how = "finished"
        if reason:
            (run / FAILED).write_json({"reason": reason})
            how = f"failed: {reason}"
        elif (run / STOPPED).exists():
            how = f"stopped, {(run / STOPPED).read_json()['reason']}"
        self.count += 1
        self.log(f"{name}: {how} ({self.count} of {len(self.trials)} trials)")
