"""`dmtg sweep`: the settings of a sweep as trials, the best setting, and the Pareto front.

Trials run on Ray Tune, or in the processes of the embedded executor.

Samples are loaded once for all trials, before the first trial starts. From then on only trials need resources, and
each trial starts when its resources are available.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from dmtg_core.tasks import Task
from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.data.manifest import Manifest
from pipelines.errors import UserError
from pipelines.execution.choice import open_executor
from pipelines.execution.embedded import EmbeddedExecutor
from pipelines.execution.executor import Executor
from pipelines.execution.resources import processes, sweep_cpus, trials_at_once
from pipelines.registry.tracking import Tracker, connect, enabled, open_tracker
from pipelines.runs.files import CONFIG, GROUPING, RESULT
from pipelines.runs.identity import record_identity
from pipelines.runs.lease import only_one
from pipelines.runs.models import check_models
from pipelines.runs.warm_start import Held, keep_models, open_models
from pipelines.storage import Location
from pipelines.sweep.costs import Costs
from pipelines.sweep.embedded import run_trials
from pipelines.sweep.events import TrialEvents
from pipelines.sweep.plan import Plan, RandomSearch, Search
from pipelines.sweep.results import (
    BROKEN,
    DONE,
    RULE,
    best_setting,
    by_setting,
    knee_of,
    notes_of,
    pareto_front,
    rows_of,
)
from pipelines.sweep.trackers import Trackers
from pipelines.sweep.trials import STOPPED, Trial, best_config, sweep_name
from pipelines.training.checks import (
    Prepared,
    check_network,
    check_workers,
    folder_of_data,
    open_folder,
    prepare,
    write_config,
)
from pipelines.training.worker import Job

MANY = 10**6  # more trials than any machine trains at a time
# keys that change the outputs of a frozen stem, or whether it is frozen
OF_STEM = ("network.encoder", "network.stem", "network.options", "network.branch", "train.augment")
SWEEP, BEST, PAGE = "sweep.json", "best.yaml", "sweep.html"
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's handler ends an interrupted sweep as if it were finished
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the loggers write files that are not used
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints tables to stdout, even with verbose=0
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Args:
        folder: Folder of the sweep.
        run_id: MLflow run; empty without tracking.
        found: Content of `sweep.json`.
    """

    folder: Location
    run_id: str
    found: dict[str, Any]

    @property
    def best_config(self) -> Location:
        """The configuration of the best setting."""
        return self.folder / BEST

    @property
    def page(self) -> Location:
        """The report page."""
        return self.folder / PAGE


def sweep(config: Config, log: Callable[[str], None] = logger.info) -> SweepResult:
    """Run a sweep to its end. It resumes where an earlier call with the same configuration stopped.

    Finished and stopped trials do not run again. Failed trials run once more.

    Raises:
        UserError: For every problem, before the first trial if it can be known by then; and if no setting or no
            naive MTL finishes.
    """
    named, folder = open_folder(config, sweep_name(config))
    for trial in Plan(config, folder).checked:
        trial.config.check_options()
    check_search(config)
    if enabled(config.track):
        connect(config.track)  # before shards are written, which can take hours
    with (
        folder_of_data(config, named, folder, sweep_cpus(config.ray), log) as (named, own, manifest),
        only_one(own, f"job that trains {own.name}", log),
    ):
        return _sweep_once(config, named, own, manifest, log)


def _sweep_once(
    config: Config, named: Config, folder: Location, manifest: Manifest, log: Callable[[str], None]
) -> SweepResult:
    """Run a sweep of which this is the only job."""
    models, tasks = open_models(named, folder), manifest.tasks(config.data.tasks, config.data.shards)
    plan = Plan(config, folder)
    plan.resume(Costs(config, manifest, tasks) if config.sweep.budget is not None else None)
    for trial in plan.trials.values():
        check_models(trial.config, trial.run)
    work = bool(plan.todo) or plan.has_room
    with _executor(config) if work else nullcontext() as executor:
        check = partial(check_networks, plan.checked, models, log)
        data = prepare(_of_data(config, plan), executor, log, check, manifest) if executor else None
        record_identity(folder, named, manifest.digest())
        tracker = open_tracker(named, folder, manifest)
        trackers = Trackers(tracker.run_id, manifest, log)
        with trackers.failing(folder, tracker):
            if data and executor:
                write_config(named, folder)
                start = keep_models(models, folder)
                if len(start) > 1:
                    plan.start_alone()
                _train(config, data, executor, start, plan, TrialEvents(plan, trackers, log), log)
            found = _write_results(config, folder, plan, tasks)
            _publish(folder, list(plan.trials.values()), found, tracker, trackers)
    return SweepResult(folder, tracker.run_id, found)


def _of_data(config: Config, plan: Plan) -> Config:
    """The configuration with which the data is prepared: that of naive MTL.

    Outputs of a frozen stem are used only if all settings have the same one.

    Raises:
        UserError: If `data.stem_outputs=on` is impossible.
    """
    first = next(iter(plan.trials.values())).config
    varied = next((key for key in plan.space.values if key.startswith(OF_STEM)), None)
    if varied is None or config.data.stem_outputs == "off":
        return first
    if config.data.stem_outputs == "on":
        raise UserError(
            f"the outputs of the stem cannot be shared, because the sweep varies {varied}",
            where="data.stem_outputs=on", remedy="set it to auto", wrong_use=True,
        )  # fmt: skip
    return first.model_copy(update={"data": first.data.model_copy(update={"stem_outputs": "off"})})


def check_networks(
    planned: Sequence[Trial],
    models: WarmStart | None,
    log: Callable[[str], None],
    manifest: Manifest,
    tasks: Sequence[Task],
) -> None:
    """Check the networks of all settings before the first trial, equal ones once.

    Raises:
        UserError: With the setting that cannot be trained.
    """
    checked = set()
    for trial in planned:
        own = None if trial.naive and models is not None and not models.single else models
        parts = (trial.config.network, trial.config.gate.sampling, trial.config.train, own is None)
        described = repr((*parts[:2], parts[2].aggregator, parts[2].task_weighting, parts[2].batch_size, parts[3]))
        if described in checked:
            continue
        checked.add(described)
        try:
            check_network(trial.config, manifest, tasks, own, log)
            check_workers(trial.config, manifest)
        except UserError as error:
            raise UserError(
                f"setting {trial.label}: {error.what}", where=error.where, remedy=error.remedy, wrong_use=True
            ) from error


def check_search(config: Config) -> None:
    """Check that the library of the search is installed.

    Raises:
        UserError: With the extra that has it.
    """
    if config.sweep.search == "tpe" and not importlib.util.find_spec("optuna"):
        raise UserError(
            "sweep.search=tpe needs the package optuna", where="sweep.search",
            remedy="pip install 'dmtg[optuna]'",
        )  # fmt: skip


def _search(config: Config, plan: Plan, *, embedded: bool) -> Search:
    """The search that proposes the settings of a plan."""
    if config.sweep.search == "random":
        return RandomSearch(plan.space, plan.settings)
    from pipelines.sweep.tpe import OptunaStudy, TPESearch

    if embedded:
        return TPESearch(plan.space, plan.settings, plan.most_settings, OptunaStudy)
    from pipelines.sweep.tune_study import TuneStudy

    return TPESearch(plan.space, plan.settings, plan.most_settings, TuneStudy)


def _train(
    config: Config,
    data: Prepared,
    executor: Executor,
    start: Held,
    plan: Plan,
    events: TrialEvents,
    log: Callable[[str], None],
) -> None:
    """Train the unfinished trials.

    Args:
        config: Configuration of the sweep.
        data: Its data set.
        executor: Its executor.
        start: Models from which trials start.
        plan: The trials.
        events: Starts the trials and receives their events.
        log: Log callback.
    """
    left = plan.total - len(plan.trials) + len(plan.todo)
    at_once, how = _trials_at_once(config, executor, max(left, 1) if plan.most_settings is not None else None)
    held = data.samples(executor)
    log(f"{_left(plan, left)}, {at_once} at a time {how}, samples {'streamed' if held is None else 'in memory'}")
    for note in data.notes:
        log(f"note: {note}")
    if plan.is_open:
        plan.begin(_search(config, plan, embedded=executor.embedded))
    template = Job(config, data.reader, held, plan.folder, data.notes, start, outputs=data.outputs)
    if isinstance(executor, EmbeddedExecutor):
        run_trials(plan, template, events, config.sweep, executor)
    else:
        from pipelines.sweep.ray_tune import run_trials as run_on_tune

        run_on_tune(plan, template, events, config.sweep, config.ray, at_once)


def _left(plan: Plan, left: int) -> str:
    """The trials that are left, as text."""
    if plan.costs is not None:
        return (
            f"trials for {plan.config.sweep.budget:g} runs of naive MTL, {sum(plan.spent.values()):.1f} are used"
        )
    return f"{left} of {plan.total} trials to train"


def _executor(config: Config) -> AbstractContextManager[Executor]:
    """The executor of a sweep, with a process for each core or a cluster for as many trials."""
    section, imports = config.ray, [run_trials.__module__]
    return open_executor(section, processes=processes(section), imports=imports, cpus=sweep_cpus(section))


def _trials_at_once(config: Config, executor: Executor, most: int | None) -> tuple[int, str]:
    """Number of trials that run at the same time, and how they run."""
    if executor.embedded:
        return min(processes(config.ray), most or MANY), "in processes of their own (embedded)"
    import ray

    for name, value in TUNE_ENVIRONMENT.items():  # before ray.tune is imported
        os.environ.setdefault(name, value)
    count = min(trials_at_once(config.ray, ray.cluster_resources()), most or MANY)
    return count, f"on Ray Tune with {config.ray.fewest} workers each"


def _write_results(config: Config, folder: Location, plan: Plan, tasks: Sequence[Task]) -> dict[str, Any]:
    """Write report, best configuration and `sweep.json`, which comes last, and return its content.

    Raises:
        UserError: If no setting or no naive MTL has finished.
    """
    from pipelines.sweep.page import write_page

    rows = rows_of(list(plan.trials.values()), tasks)
    settings = by_setting(rows)
    best = best_setting(settings)
    front = pareto_front(settings)
    knee = knee_of(front)
    found = {
        "name": folder.name, "rule": RULE, "rows": rows, "settings": settings, "best": best,
        "pareto": front, "knee": knee and knee["label"], "keys": list(plan.space.values),
        "notes": [*notes_of(rows, best), *(f"{name} was left out: {why}" for name, why in plan.refused.items())],
        "split": next((row["split"] for row in rows if row["split"]), None),
    }  # fmt: skip
    if best is not None:
        text = yaml.safe_dump(best_config(config, best["setting"]), sort_keys=False)
        (folder / BEST).write_text(f"# {best['label']}, the best setting of {folder.name}\n{text}")
    write_page(folder / PAGE, found, config)
    (folder / SWEEP).write_json(found)
    if best is None:
        reasons = [f"{row['trial']}: {row['reason']}" for row in rows if row["status"] == BROKEN]
        raise UserError(
            f"no setting has a gain; {reasons[0] if reasons else 'all trials were stopped'}",
            where=str(folder),
            remedy="correct the failure; the same command then runs the failed trials again",
        )
    return found


def _publish(
    folder: Location, planned: Sequence[Trial], found: Mapping[str, Any], tracker: Tracker, trackers: Trackers
) -> None:
    """Publish results and artifacts to MLflow. What has been published stays as it is."""
    for trial, row in zip(planned, found["rows"], strict=True):
        own = trackers.reopen(trial)
        names = [name for name in (CONFIG, RESULT, GROUPING, STOPPED) if (trial.run / name).exists()]
        result = {"split": row["split"] or "val", "metrics": row["metrics"], "normalized_gain": row["gain"],
                  "grouping_name": row["grouping_name"]}  # fmt: skip
        if row["status"] == BROKEN:
            own.fail()
        else:
            own.finish(result, {name: (trial.run / name).read_text() for name in names})
    best = next(row for row in found["rows"] if row["label"] == found["best"]["label"] and row["status"] == DONE)
    result = {"split": best["split"], "metrics": {}, "normalized_gain": found["best"]["gain"],
              "grouping_name": best["grouping_name"]}  # fmt: skip
    tracker.finish(result, {name: (folder / name).read_text() for name in (PAGE, BEST, SWEEP, CONFIG)})
