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
from ray.tune.search import Searcher

from pipelines.config.loading import Config
from pipelines.config.ray_section import RaySection
from pipelines.config.sweep_section import SweepSection
from pipelines.execution.ray_executor import RayExecutor
from pipelines.monitoring.ray_metrics import RayExporter
from pipelines.registry.tracking import NullTracker
from pipelines.runs.events import for_result
from pipelines.runs.files import EVENTS, METRICS, RESULT, read_jsonl
from pipelines.scratch import temporary_folder
from pipelines.sweep.embedded import job_of
from pipelines.sweep.events import TrialEvents
from pipelines.sweep.halving import (
    WORST,
    Record,
    grace_and_last,
    in_order_of_time,
    is_never_stopped,
    score,
    stop_with_setting,
    write_stopped,
)
from pipelines.sweep.plan import Plan
from pipelines.sweep.trials import Trial
from pipelines.training.driver import train_job
from pipelines.training.monitor import monitoring
from pipelines.training.ray.controller import end_workers
from pipelines.training.ray.events import start_event_log
from pipelines.training.ray.failures import describe_failure, training_failed
from pipelines.training.worker import Job

NAME, CONFIG, EPOCH, SCORE, RECORD, REASON = "trial", "config", "epoch", "val_score", "record", "reason"


class TrialRun(tune.Trainable):
    """A trial: it trains as `dmtg train` does, and reports the validation score of each epoch to Ray Tune.

    It is a class and no function, so that Ray Tune asks for each epoch. The epochs of an earlier session come
    first. If the scheduler stops the trial because of them, no workers are started.
    """

    def setup(self, config: dict[str, Any], template: Job | None = None) -> None:
        """See `tune.Trainable`.

        Args:
            config: Name and configuration of the trial.
            template: Job of the workers, with the configuration of the sweep.
        """
        assert template is not None
        self.job = job_of(Config.model_validate_json(config[CONFIG]), template)
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
            with monitoring(self.job.run, executor, log, tracker, _silent, earlier, exporters=[RayExporter()]):
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
    """Ray Tune's asynchronous successive halving over all settings except naive MTL, which is never stopped.

    For the scheduler, all seeds of a setting are one trial: the first one that reaches a rung decides for all.

    Args:
        section: Grace epochs and reduction factor.
        plan: The trials of the sweep.
    """

    def __init__(self, section: SweepSection, plan: Plan) -> None:
        self.plan, self.section = plan, section
        self.stopped: set[str] = set()
        grace, last = grace_and_last(section, plan.checked)
        super().__init__(
            time_attr=EPOCH, metric=SCORE, mode="min", max_t=last, grace_period=grace,
            reduction_factor=section.reduction, stop_last_trials=False,
        )  # fmt: skip

    def replay(self, records: Mapping[str, Sequence[Record]]) -> None:
        """Add the epochs of trials that ended in an earlier session, in their order in time."""
        for name, epoch, record in in_order_of_time(records):
            self._decide(self.plan.trials[name], {EPOCH: epoch, SCORE: score(record)})

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: a setting is added with its first result."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002 - Ray's
        """Continue or stop a trial. The reason of a stop is written into its run folder first."""
        own = self.plan.trials[trial.config[NAME]]
        if own.label in self.stopped:
            stop_with_setting(own, self.plan)
            return str(TrialScheduler.STOP)
        decision = self._decide(own, result)
        if decision == TrialScheduler.STOP and self.plan.has_finished(own):
            return str(TrialScheduler.CONTINUE)
        if decision == TrialScheduler.STOP:
            write_stopped(own, self.section, result[EPOCH], result[SCORE])
            self.stopped.add(own.label)
        return decision

    def _decide(self, own: Trial, result: Mapping[str, Any]) -> str:
        if is_never_stopped(own, result[EPOCH]):
            return str(TrialScheduler.CONTINUE)
        setting = SimpleNamespace(trial_id=own.label)
        super().on_trial_add(None, setting)
        return str(super().on_trial_result(None, setting, dict(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Do nothing: the epochs of the trial have been evaluated."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Do nothing: the setting of the trial keeps its results."""


class TuneTrials(Searcher):
    """The trials of a sweep, in their order, as Ray Tune asks for them.

    Args:
        events: Starts the trials.
    """

    def __init__(self, events: TrialEvents) -> None:
        super().__init__(metric=SCORE, mode="min")
        self.events = events

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; None if there is none at present."""
        del trial_id  # trials have names of their own
        trial = self.events.next()
        if trial is None:
            return None if self.events.plan.running else str(Searcher.FINISHED)
        return {NAME: trial.name, CONFIG: trial.config.model_dump_json()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `TuneEvents` notes the end."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Store nothing: the run folders have the state of a sweep."""


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
    plan: Plan, template: Job, events: TrialEvents, section: SweepSection, ray: RaySection, at_once: int
) -> None:
    """Run trials on Ray Tune to their end.

    Args:
        plan: The trials of the sweep.
        template: Job of their workers, with the configuration of the sweep.
        events: Starts the trials and receives their events.
        section: Sweep section with the rule for early stops.
        ray: Ray section with the resources of a trial.
        at_once: Largest number of trials at a time.

    Raises:
        UserError: If Ray Tune itself fails.
    """
    scheduler = FIFOScheduler()
    if section.stop_early:
        scheduler = TuneHalving(section, plan)
        scheduler.replay(plan.ended_records())
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the callback logs failed trials
    with temporary_folder() as scratch:
        trainable = tune.with_resources(tune.with_parameters(TrialRun, template=template), {"cpu": ray.tune_cpus})
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=TuneTrials(events), num_samples=-1, scheduler=scheduler, max_concurrent_trials=at_once
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=str(scratch), verbose=0, callbacks=[TuneEvents(events)],
                failure_config=tune.FailureConfig(max_failures=ray.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has them
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        except Exception as error:
            raise training_failed(error, str(plan.folder)) from error
