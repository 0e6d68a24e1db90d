"""The part of a sweep on Ray Tune: the trainable of a trial, the scheduler that stops poor trials, and the events.

Ray Tune stores nothing that a sweep needs. All state is in the run folders of the trials, so that a sweep resumes
after it was killed at any moment: the scheduler gets the epochs of finished trials, and the other trials resume
from their run folders.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.result import DONE
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.config.ray_section import RaySection
from pipelines.config.sections import SweepSection
from pipelines.execution.ray_executor import RayExecutor
from pipelines.registry.tracking import NullTracker
from pipelines.runs.events import for_result
from pipelines.runs.files import EVENTS, METRICS, RESULT, read_jsonl
from pipelines.scratch import temporary_folder
from pipelines.sweep.events import TrialEvents
from pipelines.sweep.halving import (
    WORST,
    Record,
    grace_and_last,
    in_order_of_time,
    is_never_stopped,
    score,
    write_stopped,
)
from pipelines.sweep.trials import Trial
from pipelines.training.driver import train_job
from pipelines.training.monitor import monitoring
from pipelines.training.ray.controller import end_workers
from pipelines.training.ray.events import start_event_log
from pipelines.training.ray.failures import describe_failure, training_failed
from pipelines.training.worker import Job

NAME, EPOCH, SCORE, RECORD, REASON = "trial", "epoch", "val_score", "record", "reason"


class TrialRun(tune.Trainable):
    """A trial: it trains as `dmtg train` does, and reports the validation score of each epoch to Ray Tune.

    It is a class and no function, so that Ray Tune asks for each epoch. The epochs of an earlier session come
    first. If the scheduler stops the trial because of them, no workers are started.
    """

    def setup(self, config: dict[str, Any], jobs: Mapping[str, Job] | None = None) -> None:
        """See `tune.Trainable`.

        Args:
            config: Name of the trial.
            jobs: Jobs of the workers, by name of the trial.
        """
        assert jobs is not None
        self.job = jobs[config[NAME]]
        self.records: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        for record in read_jsonl(self.job.run / METRICS):
            self.records.put(record)
        self.thread: threading.Thread | None = None
        self.last: dict[str, Any] = {EPOCH: 0, SCORE: WORST}
        self.reason = ""
        self.event_log: Any = None

    def cleanup(self) -> None:
        """End the workers of a trial that is stopped."""
        if self.thread is not None and self.thread.is_alive() and self.event_log is not None:
            end_workers(self.event_log)

    def step(self) -> dict[str, Any]:
        """Wait for the next epoch or the end of the trial, and report it."""
        if self.thread is None and self.records.empty():
            self.thread = threading.Thread(target=self._train, daemon=True)
            self.thread.start()
        record = self.records.get()
        if record is None:
            return self.last | {DONE: True, REASON: self.reason}
        self.last = {EPOCH: self.last[EPOCH] + 1, SCORE: score(record)}
        return self.last | {RECORD: json.dumps(record)}

    def _train(self) -> None:
        try:
            earlier = read_jsonl(self.job.run / EVENTS)
            executor, log = RayExecutor(self.job.config.ray), start_event_log()
            tracker = _QueueTracker(self.records)
            with monitoring(self.job.run, executor, log, tracker, _silent, earlier):
                self.event_log = log
                if not (self.job.run / RESULT).exists():
                    notes = (*self.job.notes, *for_result(earlier))
                    train_job(replace(self.job, event_log=log, notes=notes), executor, _silent)
        except Exception as error:  # noqa: BLE001 - the other trials continue after any error
            self.reason = describe_failure(error)
        finally:
            self.records.put(None)


class _QueueTracker(NullTracker):
    """A tracker that puts the records of epochs into a queue."""

    def __init__(self, records: queue.Queue[Mapping[str, Any] | None]) -> None:
        self.records = records

    def record(self, record: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self.records.put(record)


def _silent(_: str) -> None:
    """Log nothing: the driver of the sweep logs."""


class TuneHalving(ASHAScheduler):
    """Ray Tune's asynchronous successive halving over all trials except naive MTL, which is never stopped.

    Args:
        section: Grace epochs and reduction factor.
        trials: All trials of the sweep by name.
    """

    def __init__(self, section: SweepSection, trials: Mapping[str, Trial]) -> None:
        self.trials, self.section = trials, section
        grace, last = grace_and_last(section, trials)
        super().__init__(
            time_attr=EPOCH, metric=SCORE, mode="min", max_t=last, grace_period=grace,
            reduction_factor=section.reduction, stop_last_trials=False,
        )  # fmt: skip

    def replay(self, records: Mapping[str, Sequence[Record]]) -> None:
        """Add the epochs of trials that ended in an earlier session, in their order in time."""
        for name in records:
            self.on_trial_add(None, _named(name))
        for name, epoch, record in in_order_of_time(records):
            self._decide(_named(name), {EPOCH: epoch, SCORE: score(record)})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002 - Ray's
        """Continue or stop a trial. The reason of a stop is written into its run folder first."""
        decision = self._decide(trial, result)
        if decision == TrialScheduler.STOP:
            write_stopped(self.trials[trial.config[NAME]], self.section, result[EPOCH], result[SCORE])
        return decision

    def _decide(self, trial: Any, result: Mapping[str, Any]) -> str:
        if is_never_stopped(self.trials[trial.config[NAME]], result[EPOCH]):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(None, trial, dict(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Do nothing: the epochs of the trial have been evaluated."""


def _named(name: str) -> SimpleNamespace:
    """A trial as the scheduler reads it."""
    return SimpleNamespace(trial_id=name, config={NAME: name})


class TuneEvents(tune.Callback):
    """Passes the events of Ray Tune on to `TrialEvents`."""

    def __init__(self, events: TrialEvents) -> None:
        self.events = events

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """A trial starts, or starts again in another process."""
        self.events.started(trial.config[NAME])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        """A trial has finished an epoch."""
        if RECORD in result:
            self.events.epoch(trial.config[NAME], result[EPOCH], json.loads(result[RECORD]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """A trial has finished, was stopped, or has failed with a reason."""
        self.events.ended(trial.config[NAME], trial.last_result.get(REASON, ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """The process of a trial was lost more often than Ray Tune restarts it."""
        error = trial.get_pickled_error()
        reason = describe_failure(error) if error is not None else "its process was lost"
        self.events.ended(trial.config[NAME], reason)


def run_trials(
    left: Sequence[Trial],
    jobs: Mapping[str, Job],
    events: TrialEvents,
    section: SweepSection,
    ray: RaySection,
    at_once: int,
) -> None:
    """Run trials on Ray Tune to their end.

    Args:
        left: Trials that have not ended.
        jobs: Jobs of their workers, by name of the trial.
        events: Callback for the events of the trials.
        section: Sweep section with the rule for early stops.
        ray: Ray section with the resources of a trial.
        at_once: Largest number of trials at a time.

    Raises:
        UserError: If Ray Tune itself fails.
    """
    names = [trial.name for trial in left]
    scheduler = FIFOScheduler()
    if section.stop_early:
        scheduler = TuneHalving(section, events.trials)
        ended = [one for name, one in events.trials.items() if name not in names]
        scheduler.replay({one.name: read_jsonl(one.run / METRICS) for one in ended})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the callback logs failed trials
    with temporary_folder() as scratch:
        trainable = tune.with_resources(tune.with_parameters(TrialRun, jobs=dict(jobs)), {"cpu": ray.tune_cpus})
        tuner = tune.Tuner(
            trainable,
            param_space={NAME: tune.grid_search(names)},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name="sweep", storage_path=str(scratch), verbose=0, callbacks=[TuneEvents(events)],
                failure_config=tune.FailureConfig(max_failures=ray.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has them
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        except Exception as error:
            raise training_failed(error, str(left[0].run.parent)) from error
