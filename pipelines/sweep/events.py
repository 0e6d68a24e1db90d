"""The events of the trials of a sweep: they are logged, tracked, and written to the run folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.sweep.halving import stop_with_setting
from pipelines.sweep.plan import Plan
from pipelines.sweep.trackers import Trackers
from pipelines.sweep.trials import FAILED, STOPPED, Trial
from pipelines.training.checks import write_config


class TrialEvents:
    """Starts trials, logs their events, and writes them to run folders and trackers.

    Args:
        plan: The trials of the sweep.
        trackers: Trackers of the sweep.
        log: Log callback.
    """

    def __init__(self, plan: Plan, trackers: Trackers, log: Callable[[str], None]) -> None:
        self.plan, self.trackers, self.log = plan, trackers, log

    def next(self) -> Trial | None:
        """The next trial to start; None if there is none at present. A stopped setting has no further trial."""
        while (trial := self.plan.next()) is not None:
            if not self.plan.is_stopped(trial):
                write_config(trial.config, trial.run)
                return trial
            stop_with_setting(trial, self.plan)
            self.ended(trial.name)
        return None

    def started(self, name: str) -> None:
        """A trial starts, or starts again in another process."""
        trial = self.plan.trials[name]
        (trial.run / FAILED).delete()
        self.trackers.open(trial)

    def epoch(self, name: str, epoch: int, record: Mapping[str, Any]) -> None:
        """A trial has finished an epoch."""
        trial = self.plan.trials[name]
        shown = "not defined" if record["val_score"] is None else f"{record['val_score']:.4f}"
        self.log(f"{name}: {done_text(trial, epoch, record)}, score {shown}")
        self.trackers.open(trial).record(record)

    def ended(self, name: str, reason: str = "") -> None:
        """A trial has finished, was stopped, or has failed with a reason."""
        run = self.plan.trials[name].run
        how = "finished"
        if reason:
            (run / FAILED).write_json({"reason": reason})
            how = f"failed: {reason}"
        elif (run / STOPPED).exists():
            how = f"stopped, {(run / STOPPED).read_json()['reason']}"
        self.plan.end(name)
        self.log(f"{name}: {how} ({self.plan.progress})")


def done_text(trial: Trial, epoch: int, record: Mapping[str, Any]) -> str:
    """What is done of a trial: epochs of a search of fixed length, or training of a search with a budget."""
    if trial.budget is None:
        return f"epoch {epoch} of at most {max(trial.reports, epoch)}"
    done = min(record["spent"], trial.budget)  # the first epoch can cost more
    return f"epoch {epoch}, {done:.1f} of at most {trial.budget:g} runs of naive MTL"
