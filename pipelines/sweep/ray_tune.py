"""What of a sweep Ray Tune runs: the process that drives a trial, the rule that stops poor ones, and what is told.

Ray Tune keeps nothing that a sweep needs. All of it is in the run folders of the trials, so that a sweep can be
killed at any moment and go on: trials that have ended are only told to the rule, the others start where their run
folders are.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.result import DONE
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.cluster import user_error
from pipelines.config.ray_section import RaySection
from pipelines.config.sections import SweepSection
from pipelines.registry.tracking import NullTracker
from pipelines.runs.events import for_result
from pipelines.runs.files import EVENTS, METRICS, RESULT, read_jsonl
from pipelines.sweep.trials import FAILED, STOPPED, Trial
from pipelines.training.driver import train_job
from pipelines.training.monitor import monitoring
from pipelines.training.ray.controller import end_workers
from pipelines.training.ray.failures import explained, training_failed
from pipelines.training.worker import Job

NAME, EPOCH, SCORE, RECORD, REASON = "trial", "epoch", "val_score", "record", "reason"
WORST = 1e9  # of a score that is not defined

os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it ends the sweep as if it were done
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # files that nobody reads
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints tables to stdout, asked to be silent or not


class Driven(tune.Trainable):
    """A trial of its own: what `dmtg train` does, and every epoch's validation score as a result.

    It is a class, and no function, so that Ray Tune asks for one epoch after the other: the epochs of an earlier
    session come first, and a trial that is found poor by them starts no workers.
    """

    def setup(self, config: dict[str, Any], jobs: Mapping[str, Job] | None = None) -> None:
        """See `tune.Trainable`.

        Args:
            config: Has the trial's name.
            jobs: What each trial's workers need, by name.
        """
        assert jobs is not None
        self.job = jobs[config[NAME]]
        self.records: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        for record in read_jsonl(self.job.run / METRICS):
            self.records.put(record)
        self.thread: threading.Thread | None = None
        self.told: dict[str, Any] = {EPOCH: 0, SCORE: WORST}
        self.reason = ""
        self.event_log: Any = None

    def cleanup(self) -> None:
        """Stopped on the way, nothing of the trial stays behind."""
        if self.thread is not None and self.thread.is_alive() and self.event_log is not None:
            end_workers(self.event_log)

    def step(self) -> dict[str, Any]:
        """Wait for an epoch, or for the end."""
        if self.thread is None and self.records.empty():
            self.thread = threading.Thread(target=self._train, daemon=True)
            self.thread.start()
        record = self.records.get()
        if record is None:
            return self.told | {DONE: True, REASON: self.reason}
        self.told = {EPOCH: self.told[EPOCH] + 1, SCORE: score(record)}
        return self.told | {RECORD: json.dumps(record)}

    def _train(self) -> None:
        try:
            earlier = read_jsonl(self.job.run / EVENTS)
            with monitoring(
                self.job.run, self.job.config.ray, _Queued(self.records), _silent, earlier
            ) as event_log:
                self.event_log = event_log
                if not (self.job.run / RESULT).exists():
                    notes = (*self.job.notes, *for_result(earlier))
                    train_job(replace(self.job, event_log=event_log, notes=notes), _silent)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other trials go on
            self.reason = explained(error)
        finally:
            self.records.put(None)


class _Queued(NullTracker):
    """Passes on what a tracker is given."""

    def __init__(self, records: queue.Queue[Mapping[str, Any] | None]) -> None:
        self.records = records

    def record(self, record: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self.records.put(record)


def _silent(_: str) -> None:
    """The driver of the sweep prints."""


def score(record: Mapping[str, Any]) -> float:
    """The validation score of an epoch, as a number in any case."""
    found = record["val_score"]
    return WORST if found is None else float(found)


class Halving(ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020) over the trials but naive MTL, which is never stopped.

    Args:
        section: Grace and reduction.
        trials: All trials of the sweep by name.
    """

    def __init__(self, section: SweepSection, trials: Mapping[str, Trial]) -> None:
        self.trials, self.section = trials, section
        last = max(trial.reports for trial in trials.values())
        grace = section.grace_epochs + max(trial.prelude for trial in trials.values())
        super().__init__(
            time_attr=EPOCH, metric=SCORE, mode="min", max_t=last, grace_period=min(grace, last),
            reduction_factor=section.reduction, stop_last_trials=False,
        )  # fmt: skip

    def replay(self, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Give trials that ended in an earlier session their places among the others, in the order of then."""
        for name in records:
            self.on_trial_add(None, _named(name))
        ended = [(one["time"], name, i, one) for name, held in records.items() for i, one in enumerate(held, 1)]
        for _, name, epoch, record in sorted(ended, key=lambda entry: entry[:3]):
            self._judge(_named(name), {EPOCH: epoch, SCORE: score(record)})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002 - Ray's
        """Whether a trial goes on. A stop is noted in its run folder before it happens."""
        decision = self._judge(trial, result)
        if decision == TrialScheduler.STOP:
            why = f"not among the best 1/{self.section.reduction} of the trials at epoch {result[EPOCH]}"
            found = {"epoch": result[EPOCH], "val_score": result[SCORE], "reason": why}
            (self.trials[trial.config[NAME]].run / STOPPED).write_json(found)
        return decision

    def _judge(self, trial: Any, result: Mapping[str, Any]) -> str:
        planned = self.trials[trial.config[NAME]]
        if planned.naive or result[EPOCH] >= planned.reports:  # there is nothing to save any more
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(None, trial, dict(result)))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Its epochs have been judged."""


def _named(name: str) -> SimpleNamespace:
    """What the rule sees of a trial."""
    return SimpleNamespace(trial_id=name, config={NAME: name})


class Told(tune.Callback):
    """What happens to the trials: said, noted in their run folders, and given to their trackers.

    Args:
        trials: By name.
        trackers: Opened here as trials begin, by name.
        open_one: Opens the tracker of a trial.
        say: Takes a line.
    """

    def __init__(
        self,
        trials: Mapping[str, Trial],
        trackers: dict[str, Any],
        open_one: Callable[[Trial], Any],
        log: Callable[[str], None],
    ) -> None:
        self.trials, self.trackers, self.open_one, self.log = trials, trackers, open_one, log
        self.ended = 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """A trial begins, or begins again in another process."""
        name = trial.config[NAME]
        (self.trials[name].run / FAILED).delete()
        if name not in self.trackers:
            self.trackers[name] = self.open_one(self.trials[name])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        """An epoch."""
        if RECORD in result:
            name, record = trial.config[NAME], json.loads(result[RECORD])
            shown = "not defined" if record["val_score"] is None else f"{record['val_score']:.4f}"
            self.log(f"{name}: epoch {result[EPOCH]} of {self.trials[name].reports}, score {shown}")
            self.trackers[name].record(record)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """A trial is done, stopped, or has failed with a reason."""
        name = trial.config[NAME]
        run, reason = self.trials[name].run, trial.last_result.get(REASON, "")
        if reason:
            self._failed(name, reason)
        elif (run / STOPPED).exists():
            self._end(name, f"stopped, {(run / STOPPED).read_json()['reason']}")
        else:
            self._end(name, "finished")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """The process of a trial was lost too often."""
        error = trial.get_pickled_error()
        self._failed(trial.config[NAME], explained(error) if error is not None else "its process was lost")

    def _failed(self, name: str, reason: str) -> None:
        (self.trials[name].run / FAILED).write_json({"reason": reason})
        self._end(name, f"failed: {reason}")

    def _end(self, name: str, how: str) -> None:
        self.ended += 1
        self.log(f"{name}: {how} ({self.ended} of {len(self.trials)} trials)")


def drive(
    left: Sequence[Trial], jobs: Mapping[str, Job], told: Told, section: SweepSection, ray: RaySection, most: int
) -> None:
    """Have Ray Tune bring trials to their end.

    Args:
        left: Those that have not ended.
        jobs: What their workers need, by name.
        told: Hears of them.
        section: When they are stopped.
        ray: What they need.
        most: How many run at a time.

    Raises:
        UserError: When Ray Tune itself fails.
    """
    names = [trial.name for trial in left]
    rule = FIFOScheduler()
    if section.stop_early:
        rule = Halving(section, told.trials)
        ended = [one for name, one in told.trials.items() if name not in names]
        rule.replay({one.name: read_jsonl(one.run / METRICS) for one in ended})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are told by us
    with tempfile.TemporaryDirectory(prefix="dmtg-") as scratch:
        trainable = tune.with_resources(tune.with_parameters(Driven, jobs=dict(jobs)), {"cpu": ray.tune_cpus})
        tuner = tune.Tuner(
            trainable,
            param_space={NAME: tune.grid_search(names)},
            tune_config=tune.TuneConfig(scheduler=rule, max_concurrent_trials=most),
            run_config=tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, callbacks=[told],
                failure_config=tune.FailureConfig(max_failures=ray.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run folder has them
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        except Exception as error:
            raise user_error(error) or training_failed(error, str(left[0].run.parent)) from error
