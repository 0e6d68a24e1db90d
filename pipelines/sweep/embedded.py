"""The trials of a sweep in the processes of the embedded executor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.config.loading import Config
from pipelines.config.sweep_section import SweepSection
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.execution.pool import ask
from pipelines.runs.events import EventWriter, LocalEventLog, for_result
from pipelines.runs.files import EVENTS, METRICS, RESULT, read_jsonl
from pipelines.storage import locate
from pipelines.sweep.events import TrialEvents
from pipelines.sweep.halving import Halving, Record
from pipelines.sweep.plan import Plan
from pipelines.training.driver import train_job
from pipelines.training.failures import describe
from pipelines.training.worker import Job

START = None  # sent by a trial when it starts, instead of a record


class StoppedTrialError(Exception):
    """Ends the training of a trial that is stopped."""


def run_trials(
    plan: Plan, template: Job, events: TrialEvents, section: SweepSection, executor: EmbeddedExecutor
) -> None:
    """Run trials in the processes of an executor to their end.

    Args:
        plan: The trials of the sweep.
        template: Their job, with the configuration of the sweep.
        events: Starts the trials and receives their events.
        section: Sweep section with the rule for early stops.
        executor: The executor of the sweep.
    """
    assert executor.pool is not None
    halving = Halving(section, plan, plan.ended_records()) if section.stop_early else None
    names: list[str] = []
    epochs: dict[str, int] = {}

    def more() -> Job | None:
        """The job of the next trial."""
        trial = events.next()
        if trial is None:
            return None
        names.append(trial.name)
        return job_of(trial.config, template)

    def answer(index: int, message: tuple[bool, Record] | None) -> bool:
        """Whether a trial stops."""
        name = names[index]
        if message is START:
            epochs[name] = 0
            events.started(name)
            return False
        is_new, record = message
        epochs[name] += 1
        if is_new:
            events.epoch(name, epochs[name], record)
        return halving is not None and halving.stops(name, epochs[name], record)

    for done in executor.pool.run(train_trial, (), answer, more):
        events.ended(names[done.index], str(done.error) if done.error is not None else done.value)


def job_of(config: Config, template: Job) -> Job:
    """The job of a trial.

    Args:
        config: Configuration of the trial.
        template: Job of the sweep, with the models from which its trials start.
    """
    start = template.start if config.network.start_from else ()
    run = (locate(config.run.root) / config.run.name).retrying()
    return replace(template, config=config, run=run, start=start)


def train_trial(job: Job) -> str:
    """Train a trial in a process of the pool, as `dmtg train` does. It reports every epoch to the driver.

    The epochs of an earlier session come first. If the trial is stopped because of them, nothing is trained.

    Returns:
        Why the trial failed; empty if it finished or was stopped.
    """
    log = LocalEventLog()
    earlier = read_jsonl(job.run / EVENTS)
    writer = EventWriter(job.run / EVENTS, log, earlier)
    ask(START)
    report = _Reporter()
    try:
        for record in read_jsonl(job.run / METRICS):
            report(record, is_new=False)
        if not (job.run / RESULT).exists():
            notes = (*job.notes, *for_result(earlier))
            with EmbeddedExecutor(job.config.ray) as executor:
                train_job(replace(job, event_log=log, notes=notes), executor, _silent, report)
    except StoppedTrialError:
        return ""
    except Exception as error:  # noqa: BLE001 - the other trials continue after any error
        return describe(error)
    finally:
        writer.new()
    return ""


class _Reporter:
    """Reports each epoch of a trial once: an epoch after the last checkpoint is trained again."""

    def __init__(self) -> None:
        self.reported: set[tuple[str, int]] = set()

    def __call__(self, record: Mapping[str, Any], *, is_new: bool = True) -> None:
        """Report an epoch.

        Raises:
            StoppedTrialError: If the driver stops the trial.
        """
        key = (record["stage"], record["epoch"])
        if key in self.reported:
            return
        self.reported.add(key)
        if ask((is_new, record)):
            raise StoppedTrialError


def _silent(_: str) -> None:
    """Log nothing: the driver of the sweep logs."""
