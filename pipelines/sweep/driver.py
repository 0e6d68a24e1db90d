"""`dmtg sweep`: many settings trained side by side, which of them is best, and which are worth their cost.

Samples are read once, for all trials, before the first one starts: then only trials need room, and each one's is
there before it begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from dmtg_core.tasks import Task
from dmtg_core.training.warm_start import WarmStart
from pipelines.cluster import session, sweep_cpus, trials_at_once
from pipelines.config.loading import Config
from pipelines.data.ingest import keeps_in_memory, load_splits
from pipelines.data.manifest import Manifest, support_notes
from pipelines.data.reader import Reader
from pipelines.data.shards import ensure_shards
from pipelines.errors import UserError
from pipelines.registry.tracking import NullTracker, Tracker, connect, enabled, open_tracker, shown
from pipelines.runs.files import CONFIG, GROUPING, RESULT
from pipelines.runs.identity import open_run
from pipelines.runs.models import check_models
from pipelines.storage import Location, locate
from pipelines.sweep.results import (
    BROKEN,
    DONE,
    OPEN,
    RULE,
    best_setting,
    by_setting,
    knee_of,
    notes_of,
    pareto_front,
    rows_of,
    status,
)
from pipelines.sweep.trials import STOPPED, Trial, best_config, sweep_name, trials
from pipelines.training.checks import check_data, check_network
from pipelines.training.warm_start import keep_models, open_models
from pipelines.training.worker import Job

SWEEP, BEST, PAGE = "sweep.json", "best.yaml", "sweep.html"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Swept:
    """What a sweep gave.

    Args:
        folder: Its folder.
        run_id: Its MLflow run; empty without tracking.
        found: The content of `sweep.json`.
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


def sweep(config: Config, log: Callable[[str], None] = logger.info) -> Swept:
    """Run a sweep to its end, from wherever an earlier call with the same words got to.

    Trials that finished or were stopped are not run again, those that failed are tried once more.

    Raises:
        UserError: For anything that stands in the way, before the first trial starts where that can be known; and
            when no setting, or no naive MTL, could be trained to its end.
    """
    described = config.model_copy(update={"run": config.run.model_copy(update={"name": sweep_name(config)})})
    folder = open_run(described)
    models = open_models(described, folder)
    planned = trials(config)
    for trial in planned:
        trial.config.check_options()
        check_models(trial.config, trial.run)
    left = [trial for trial in planned if status(trial) in (OPEN, BROKEN)]
    if left and enabled(config.track):
        connect(config.track)  # before shards are made, which can take hours
    with _session_for(config, left):
        manifest = ensure_shards(config, log)
        tasks = manifest.tasks(config.data.tasks, config.data.shards)
        if left:
            check(planned, manifest, models, log)
        tracker = open_tracker(described, folder, manifest)
        trackers: dict[str, Tracker] = {}
        open_one = partial(_open_one, manifest, tracker.run_id, log)
        with _failing(folder, tracker, trackers):
            if left:
                (folder / CONFIG).write_text(yaml.safe_dump(shown(described), sort_keys=False))
                start = keep_models(models, folder)
                planned = trials(config, shared_start=len(start) < 2)
                _run(config, planned, left, Job(config, _reader(config, manifest), None, folder, start=start),
                     trackers, open_one, log)  # fmt: skip
            found = _conclude(config, folder, planned, tasks)
            _deliver(folder, planned, found, tracker, trackers, open_one)
    return Swept(folder, tracker.run_id, found)


@contextmanager
def _session_for(config: Config, left: Sequence[Trial]) -> Iterator[None]:
    """No cluster for a sweep that is finished."""
    if not left:
        yield
        return
    with session(config.ray, sweep_cpus(config.ray)):
        yield


@contextmanager
def _failing(folder: Location, tracker: Tracker, trackers: Mapping[str, Tracker]) -> Iterator[None]:
    """What ends the sweep ends its MLflow runs; an interruption names the folder."""
    try:
        yield
    except BaseException as error:
        for one in (*trackers.values(), tracker):
            one.fail()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(str(folder)) from error
        raise


def check(
    planned: Sequence[Trial], manifest: Manifest, models: WarmStart | None, log: Callable[[str], None]
) -> None:
    """All that can be known of data and networks of all trials, before the first one starts.

    Raises:
        UserError: Naming the setting that cannot be trained.
    """
    tasks = check_data(planned[0].config, manifest, locate(planned[0].config.data.shards))
    for trial in {trial.label: trial for trial in planned}.values():
        own = None if trial.naive and models is not None and not models.single else models
        try:
            check_network(trial.config, manifest, tasks, own, log)
        except UserError as error:
            raise UserError(
                f"setting {trial.label}: {error.what}", where=error.where, remedy=error.remedy, wrong_use=True
            ) from error


def _reader(config: Config, manifest: Manifest) -> Reader:
    folder = locate(config.data.shards)
    return Reader(folder, manifest, manifest.tasks(config.data.tasks, str(folder)))


def _open_one(manifest: Manifest, parent: str, log: Callable[[str], None], trial: Trial) -> Tracker:
    """The tracker of a trial, below that of the sweep; a server that is away costs no trial."""
    try:
        return open_tracker(trial.config, trial.run, manifest, parent)
    except UserError as error:
        log(f"note: {trial.name} has no MLflow run yet: {error.what}")
        return NullTracker()


def _run(
    config: Config,
    planned: Sequence[Trial],
    left: Sequence[Trial],
    common: Job,
    trackers: dict[str, Tracker],
    open_one: Callable[[Trial], Tracker],
    log: Callable[[str], None],
) -> None:
    """Bring the trials that are left to their ends."""
    import ray

    from pipelines.sweep.ray_tune import Told, drive

    reader = common.reader
    most = min(trials_at_once(config.ray, ray.cluster_resources()), len(left))
    held = load_splits(reader) if keeps_in_memory(reader, config.data) else None
    log(
        f"{len(left)} of {len(planned)} trials to train, {most} at a time with {config.ray.fewest} workers each, "
        f"samples {'streamed' if held is None else 'in shared memory'}"
    )
    names = {trial.name for trial in left}
    notes = tuple(support_notes(reader.manifest, reader.tasks, config.data.min_support))
    for note in notes:
        log(f"note: {note}")
    jobs = {}
    for trial in planned:
        if trial.name in names:
            (trial.run / CONFIG).write_text(yaml.safe_dump(shown(trial.config), sort_keys=False))
            start = common.start if trial.config.network.start_from else ()
            jobs[trial.name] = Job(trial.config, reader, held, trial.run, notes, start)
    told = Told({trial.name: trial for trial in planned}, trackers, open_one, log)
    told.ended = len(planned) - len(left)
    drive(left, jobs, told, config.sweep, config.ray, most)


def _conclude(config: Config, folder: Location, planned: Sequence[Trial], tasks: Sequence[Task]) -> dict[str, Any]:
    """Rows, best setting and page, into the sweep's folder; `sweep.json` comes last.

    Raises:
        UserError: When no setting, or no naive MTL, has finished.
    """
    from pipelines.sweep.page import write_page

    rows = rows_of(planned, tasks)
    settings = by_setting(rows)
    best = best_setting(settings)
    front = pareto_front(settings)
    knee = knee_of(front)
    found = {
        "name": folder.name, "rule": RULE, "rows": rows, "settings": settings, "best": best,
        "pareto": front, "knee": knee and knee["label"], "notes": notes_of(rows, best),
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
            f"no setting could be judged; {reasons[0] if reasons else 'all were stopped'}",
            where=str(folder),
            remedy="correct what failed; the same words then try the failed trials again",
        )
    return found


def _deliver(
    folder: Location,
    planned: Sequence[Trial],
    found: Mapping[str, Any],
    tracker: Tracker,
    trackers: dict[str, Tracker],
    open_one: Callable[[Trial], Tracker],
) -> None:
    """Results and artifacts to MLflow; what is there already stays as it is."""
    for trial, row in zip(planned, found["rows"], strict=True):
        if trial.name not in trackers or not trackers[trial.name].run_id:  # MLflow may have been away
            trackers[trial.name] = open_one(trial)
        names = [name for name in (CONFIG, RESULT, GROUPING, STOPPED) if (trial.run / name).exists()]
        result = {"split": row["split"] or "val", "metrics": row["metrics"], "normalized_gain": row["gain"],
                  "grouping_name": row["grouping_name"]}  # fmt: skip
        if row["status"] == BROKEN:
            trackers[trial.name].fail()
        else:
            trackers[trial.name].finish(result, {name: (trial.run / name).read_text() for name in names})
    best = next(row for row in found["rows"] if row["label"] == found["best"]["label"] and row["status"] == DONE)
    result = {"split": best["split"], "metrics": {}, "normalized_gain": found["best"]["gain"],
              "grouping_name": best["grouping_name"]}  # fmt: skip
    tracker.finish(result, {name: (folder / name).read_text() for name in (PAGE, BEST, SWEEP, CONFIG)})
