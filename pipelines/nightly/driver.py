"""`dmtg regroup`: a nightly run. It trains a challenger on the newest data and promotes it if it is better.

The folder of a nightly run is `<run.root>/regroup/<name>/<date>`. Every step resumes where an earlier call
stopped. The decision is written before the alias `champion` moves, and the verdict after it. If the job is killed
at any point, a complete champion serves, and the same command finishes the nightly run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dmtg_core.grouping import Grouping
from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.tasks import Task
from dmtg_core.training.warm_start import WarmStart
from pipelines.config.loading import Config
from pipelines.data import statistics
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.data.renewal import ensure_shards
from pipelines.errors import UserError
from pipelines.execution.choice import open_executor
from pipelines.execution.errors import user_error
from pipelines.execution.executor import Executor
from pipelines.monitoring.prometheus import is_address
from pipelines.nightly.datasets import DATE, checked_date, newest, no_data_set, of_date
from pipelines.nightly.evaluation import KEPT, PROMOTED, VERDICT, evaluate, verdict_of
from pipelines.nightly.leakage import check_champion, check_evaluation, leakage_notes
from pipelines.nightly.publish import job_result, publish
from pipelines.nightly.webhook import check_address
from pipelines.registry import aliases
from pipelines.registry.models import load_registered
from pipelines.registry.tracking import connect, enabled
from pipelines.registry.versions import show_model
from pipelines.runs.files import LABELS
from pipelines.runs.folders import check_folder
from pipelines.runs.lease import Lease
from pipelines.runs.models import write_models
from pipelines.storage import Location, locate
from pipelines.training.driver import Trained, train

PLAN, COMPARISON = "plan.json", "comparison.json"
EARLIER_PLAN = "night.json"  # of earlier versions
DECISION = "decision.json"  # the verdict before the alias moves
LEASE, CHALLENGER, CHAMPION = "lease.json", "challenger", "champion"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NightlyRun:
    """The inputs of a nightly run. Its first call fixes them, so that a resumed job does the same work.

    Args:
        date: Date of the nightly run.
        config: Digest of the configuration.
        data: Date of the shards.
        shards, digest: Training data of the challenger: address and data digest.
        evaluation, evaluation_digest: Evaluation data of champion and challenger: address and data digest.
        champion: Version of the champion at the start; None without a champion.
        start: Folders of the champion's models from which the challenger starts.
        notes: Notes about data and champion.
    """

    date: str
    config: str
    data: str
    shards: str
    digest: str
    evaluation: str
    evaluation_digest: str
    champion: int | None
    start: tuple[str, ...]
    notes: tuple[str, ...]


def regroup(
    config: Config,
    date: str = "",
    *,
    shard: bool = False,
    dry_run: bool = False,
    wait_s: float = 0.0,
    trust_code: bool = False,
    log: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Do a nightly run once. It resumes where an earlier call stopped.

    Args:
        config: Configuration; its section `regroup` has the rules of promotion.
        date: Date, YYYY-MM-DD; today by default.
        shard: Write the data set of the date first; see `datasets.of_date`.
        dry_run: Train and evaluate, but do not register, promote or send the verdict. A later call resumes it.
        wait_s: Seconds to wait for another job with the same model.
        trust_code: As `pipelines.registry.models.load_registered`, for the champion.
        log: Log callback.

    Returns:
        The verdict, as in `verdict.json`, with `repeated`: whether the nightly run was finished before.

    Raises:
        UserError: For every problem. The champion keeps serving.
    """
    date = checked_date(date)
    config.check_options()
    if config.regroup.webhook:
        check_address(config.regroup.webhook)
    if is_address(config.regroup.metrics):
        check_address(config.regroup.metrics, "regroup.metrics")
    source = of_date(config, date) if shard else None
    if not enabled(config.track):
        raise UserError(
            "regrouping needs a model registry",
            where="track.uri=none",
            remedy="set track.uri, or leave it out for an SQLite file in the current folder",
            wrong_use=True,
        )
    root = _root(config, date)
    with Lease(root / LEASE, config.regroup.lease_s, f"regroup of {config.name}").held(wait_s, log) as lease:
        folder = root / date
        if (folder / VERDICT).exists():
            log(f"the nightly run of {date} is finished: {folder}")
            publish(config, folder, log)
            return job_result(config, folder) | {"repeated": True}
        with open_executor(config.ray) as executor:
            if source is not None and not _plan_of(folder).exists():
                ensure_shards(source, log, executor)
            job = _Job(config, folder, lease, executor, log, trust_code)
            return job.dry_run(date) if dry_run else job.run(date)


def _root(config: Config, date: str) -> Location:
    """The folder of all nightly runs of a model, which has a folder for each date.

    Raises:
        UserError: If it or the folder of the date has other contents, or cannot be written.
    """
    root = (locate(config.run.root) / "regroup" / config.name).retrying()
    dated = [name for name in root.folders() if DATE.fullmatch(name)]
    check_folder(root, "run.root", "nightly runs", lambda: False, (LEASE, *dated))
    folder = root / date
    check_folder(folder, "run.root", "a nightly run", lambda: _plan_of(folder).exists(), (CHAMPION,))
    root.check_writable()
    return root


class _Job:
    def __init__(
        self,
        config: Config,
        folder: Location,
        lease: Lease,
        executor: Executor,
        log: Callable[[str], None],
        trust_code: bool,
    ) -> None:
        self.trust_code = trust_code
        self.config, self.folder, self.lease, self.executor, self.log = config, folder, lease, executor, log

    def dry_run(self, date: str) -> dict[str, Any]:
        plan = self.plan(date)
        trained = self.train(plan, register=False)
        return self.verdict(plan, trained) | {"dry_run": True}

    def run(self, date: str) -> dict[str, Any]:
        plan = self.plan(date)
        verdict = self.decision(plan)
        version = int(verdict["challenger"].rpartition("/")[2])
        self.lease.check()
        serving = aliases.champion(self.config.track, self.config.name)
        now = None if serving is None else int(serving["version"])
        if now not in (plan.champion, version):
            verdict |= {
                "verdict": KEPT,
                "reason": f"the champion was changed to version {now} during the nightly run",
            }
        if verdict["verdict"] == PROMOTED:
            aliases.promote(self.config.track, self.config.name, version)
        (self.folder / VERDICT).write_json(verdict)
        publish(self.config, self.folder, self.log)
        return job_result(self.config, self.folder) | {"repeated": False}

    def decision(self, plan: NightlyRun) -> dict[str, Any]:
        """The verdict before the alias moves. It is made once: afterwards the challenger may be the champion."""
        file = self.folder / DECISION
        if not file.exists():
            trained = self.train(plan, register=True)
            models = [model.uri for model in trained.models]
            file.write_json(self.verdict(plan, trained) | {"challenger": models[0], "models": models})
        held: dict[str, Any] = file.read_json()
        return held

    def plan(self, date: str) -> NightlyRun:
        """The inputs of the nightly run. The first call stores them with a copy of the champion's models."""
        file = _plan_of(self.folder)
        if file.exists():
            held = file.read_json()
            if held["config"] != self.digest():
                raise UserError(
                    "this nightly run was started with another configuration",
                    where=str(file),
                    remedy="use the same configuration again, or delete the folder to start from scratch",
                    wrong_use=True,
                )
            plan = NightlyRun(**{**held, "start": tuple(held["start"]), "notes": tuple(held["notes"])})
            check_unchanged(plan, file)
            return plan
        plan = self._new_plan(date)
        file.write_json(asdict(plan))
        return plan

    def digest(self) -> str:
        rules = self.config.regroup.model_dump_json(exclude={"webhook", "lease_s", "metrics"})
        return f"{self.config.digest()}-{hashlib.sha256(rules.encode()).hexdigest()[:8]}"

    def _new_plan(self, date: str) -> NightlyRun:
        config = self.config
        if not config.regroup.shards:
            ensure_shards(config, self.log, self.executor)
        data = newest(config, date, self.log)
        manifest = read_manifest(locate(data.shards))
        tasks = manifest.tasks(config.data.tasks, data.shards)
        evaluation = config.regroup.evaluation or data.shards
        evaluated = read_manifest(locate(evaluation))
        check_evaluation(manifest, data.shards, evaluated, evaluation, tasks, config.regroup.split)
        champion = aliases.champion(config.track, config.name)
        notes: list[str] = [] if data.date == date else [no_data_set(date, data.date)]
        start: tuple[str, ...] = ()
        if champion is not None:
            groups, preparation = load_registered(champion["uri"], config.track, trust_code=self.trust_code)
            check_champion(groups, tasks, champion["uri"], manifest, preparation)
            (self.folder / CHAMPION).delete()  # an earlier call may have copied another champion
            write_models(self.folder / CHAMPION, groups)
            why = self._cold_start(groups, manifest, tasks)
            if why:
                notes.append(f"the challenger starts from scratch: {why}")
            else:
                start = tuple(str(self.folder / CHAMPION / name) for name in groups)
            notes += leakage_notes(champion, evaluated, evaluation, config.regroup.split)
        self.log(f"nightly run of {date}: shards {data.shards}, " + (
            f"champion {champion['uri']}" if champion else "no champion yet"
        ))  # fmt: skip
        for note in notes:
            self.log(f"note: {note}")
        return NightlyRun(
            date, self.digest(), data.date, data.shards, manifest.digest(), evaluation, evaluated.digest(),
            None if champion is None else int(champion["version"]), start, tuple(notes),
        )  # fmt: skip

    def _cold_start(self, groups: Mapping[str, GroupModel], manifest: Manifest, tasks: tuple[Task, ...]) -> str:
        """The reason that the challenger does not start from the champion; empty if it does."""
        if not self.config.regroup.warm_start:
            return "regroup.warm_start is off"
        if len(groups) < 2:
            return "the champion has one group, and copies of one branch stay equal"
        try:
            WarmStart(list(groups.values())).check(
                self.config.network_spec(manifest.description.input, tasks)
            )  # fmt: skip
        except ValueError as error:
            return str(error)
        return ""

    def train(self, plan: NightlyRun, *, register: bool) -> Trained:
        """Train the challenger in the folder of the nightly run."""
        config = self.config
        network = {"start_from": plan.start} if plan.start else {}
        return train(
            config.model_copy(
                update={
                    "data": config.data.model_copy(update={"shards": plan.shards}),
                    "network": config.network.model_copy(update=network),
                    "run": config.run.model_copy(update={"root": str(self.folder), "name": CHALLENGER}),
                    "track": config.track.model_copy(update={"register_models": register}),
                }
            ),
            self.log,
            renew=False,
        )

    def verdict(self, plan: NightlyRun, trained: Trained) -> dict[str, Any]:
        """The verdict with its comparison, and the drift of grouping and data."""
        after = Grouping.from_dict(trained.result["grouping"])
        found: dict[str, Any] = {
            "name": self.config.name,
            "night": plan.date,
            "champion": None if plan.champion is None else f"models:/{self.config.name}/{plan.champion}",
            "challenger": None,
            "grouping": after.to_dict(),
            "shards": plan.shards,
            "evaluation": plan.evaluation,
            "split": self.config.regroup.split,
            "run_dir": str(trained.run),
            "run_id": trained.run_id,
            "notes": [*plan.notes, *trained.result["notes"]],
        }
        if plan.champion is None:
            metrics = trained.result["metrics"]
            reason = "there was no champion"
            return found | {"verdict": PROMOTED, "reason": reason, "metrics": metrics, "comparison": None}
        comparison = self.compare(plan)
        verdict, reason = verdict_of(comparison, self.config.regroup)
        before = Grouping.of(comparison["champion_groups"].values())
        return found | {
            "verdict": verdict,
            "reason": reason,
            "metrics": comparison["challenger"],
            "comparison": comparison,
            "grouping_drift": grouping_drift(before, after),
            "data_drift": self.data_drift(plan),
        }

    def compare(self, plan: NightlyRun) -> dict[str, Any]:
        """Evaluate champion and challenger on the same samples, as a task of the executor."""
        file = self.folder / COMPARISON
        if not file.exists():
            self.log(
                f"evaluating champion and challenger on split {self.config.regroup.split} of {plan.evaluation}"
            )
            task = partial(evaluate, self.config, plan.evaluation, plan.evaluation_digest)
            (done,) = self.executor.run(task, [self.folder])
            if done.error is not None:
                raise user_error(done.error) or UserError(
                    f"champion and challenger could not be evaluated: {str(done.error).splitlines()[-1][:200]}",
                    where=plan.evaluation,
                    remedy="run the same command again to resume; --debug shows the full error",
                ) from done.error
            file.write_json(done.value)
        compared: dict[str, Any] = file.read_json()
        return compared

    def data_drift(self, plan: NightlyRun) -> list[str]:
        """The differences between the labels of the training split and those of the champion's training data."""
        champion = show_model(self.config.track, f"{self.config.name}/{plan.champion}")
        held = label_sums(self.config, str(champion["run_id"]))
        if held is None:
            return ["the label statistics of the champion's data are unknown"]
        manifest = read_manifest(locate(plan.shards))
        lines = []
        for task in manifest.tasks(self.config.data.tasks, plan.shards):
            if task.name in held:
                change = statistics.drift(task, held[task.name], manifest.sums["train"][task.name])
                lines += [f"{task.name}: {change.replace('in train', 'for the champion')}"] if change else []
        return lines


def _plan_of(folder: Location) -> Location:
    """The file of the plan of a nightly run; it need not exist."""
    earlier = folder / EARLIER_PLAN
    return earlier if earlier.exists() else folder / PLAN


def check_unchanged(plan: NightlyRun, file: Location) -> None:
    """Check that the training data is that with which the nightly run began.

    Raises:
        UserError: If it has changed.
    """
    if read_manifest(locate(plan.shards)).digest() != plan.digest:
        raise UserError(
            f"the training data has changed since the nightly run of {plan.date} began",
            where=plan.shards,
            remedy=f"delete the folder {file.parent} to start from scratch, or put the data back",
        )


def grouping_drift(before: Grouping, after: Grouping) -> dict[str, Any]:
    """The change of a grouping over the tasks that both groupings have."""
    common = [name for name in before.tasks if name in after.tasks]
    old, new = before.among(common), after.among(common)
    return {
        "before": before.to_dict(),
        "adjusted_rand_index": old.adjusted_rand_index(new),
        "moved": old.moved(new),
        "new_tasks": [name for name in after.tasks if name not in common],
    }


def label_sums(config: Config, run_id: str) -> dict[str, statistics.Sums] | None:
    """Label sums of the training data of a run, from its MLflow artifacts; None if they are missing."""
    import mlflow

    connect(config.track)
    try:
        found: dict[str, statistics.Sums] = mlflow.artifacts.load_dict(f"runs:/{run_id}/{LABELS}")
    except Exception:  # noqa: BLE001 - the kind of error depends on the artifact store
        return None
    return found
