"""`dmtg regroup`: the nightly job. A challenger is trained on the newest data and takes over where it is better.

Everything a night does is in its folder, `<run.root>/regroup/<name>/<date>`, and every step is taken up where a
call before left it. The registry's alias `champion` moves in one step, after all that can fail and before the
verdict is written: whenever the job is killed, a whole champion serves, and the same words finish the night.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dmtg_core.grouping import Grouping
from dmtg_core.network.grouping_network import GroupModel
from dmtg_core.tasks import Task
from dmtg_core.training.warm_start import WarmStart
from pipelines.cluster import session, user_error
from pipelines.config.loading import Config
from pipelines.data import statistics
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.data.shards import ensure_shards
from pipelines.errors import UserError
from pipelines.nightly.datasets import checked_night, newest
from pipelines.nightly.evaluation import judge, verdict_of
from pipelines.nightly.leakage import check_champion, check_evaluation, seen_by
from pipelines.nightly.lease import Lease
from pipelines.nightly.page import write_night
from pipelines.nightly.webhook import check_address, send
from pipelines.registry import aliases
from pipelines.registry.models import load_registered
from pipelines.registry.tracking import connect, enabled
from pipelines.runs.files import LABELS
from pipelines.runs.models import write_model
from pipelines.storage import Location, locate
from pipelines.training.driver import Trained, train

NIGHT, COMPARISON, VERDICT, REPORT, SENT = (
    "night.json", "comparison.json", "verdict.json", "regroup.html", "webhook.json",
)  # fmt: skip
LEASE, CHALLENGER, CHAMPION = "lease.json", "challenger", "champion"
PROMOTED, KEPT = "promoted", "kept"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Night:
    """What a night was begun with. A job that is started again does the same work, whatever is newest by then.

    Args:
        date: Of the night.
        config: Digest of the configuration.
        data: Date of the shards.
        shards, digest: What the challenger is trained on.
        evaluation, evaluation_digest: What both are judged on.
        champion: Version that served when the night began; None for none.
        start: What of it the challenger starts from: folders of models.
        notes: What to know of all this.
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
    night: str = "",
    *,
    dry_run: bool = False,
    wait_s: float = 0.0,
    log: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Do a night's work once, from wherever an earlier call got to.

    Args:
        config: The configuration; its section `regroup` says how to judge.
        night: Date, YYYY-MM-DD; today's by default.
        dry_run: Train and judge, but register, promote and tell nobody. A later call goes on from there.
        wait_s: How long to wait for another job on the same model.

    Returns:
        The verdict, as in `verdict.json`, with `repeated` where the night had been done before.

    Raises:
        UserError: For anything that stands in the way. The champion goes on serving.
    """
    night = checked_night(night)
    config.check_options()
    if config.regroup.webhook:
        check_address(config.regroup.webhook)
    if not enabled(config.track):
        raise UserError(
            "regrouping needs a model registry",
            where="track.uri=none",
            remedy="set track.uri, or leave it out for an SQLite file in the current folder",
            wrong_use=True,
        )
    root = (locate(config.run.root) / "regroup" / config.name).retrying()
    root.check_writable()
    with Lease(root / LEASE, config.regroup.lease_s, f"regroup of {config.name}").held(wait_s, log) as lease:
        folder = root / night
        if (folder / VERDICT).exists():
            log(f"this night is done: {folder}")
            _after(config, folder, log)
            return job_result(folder) | {"repeated": True}
        with session(config.ray):
            job = _Job(config, folder, lease, log)
            return job.rehearse(night) if dry_run else job.work(night)


class _Job:
    def __init__(self, config: Config, folder: Location, lease: Lease, log: Callable[[str], None]) -> None:
        self.config, self.folder, self.lease, self.log = config, folder, lease, log

    def rehearse(self, night: str) -> dict[str, Any]:
        plan = self.plan(night)
        trained = self.train(plan, register=False)
        return self.verdict(plan, trained) | {"dry_run": True}

    def work(self, night: str) -> dict[str, Any]:
        plan = self.plan(night)
        trained = self.train(plan, register=True)
        verdict = self.verdict(plan, trained)
        version = int(trained.models[0].uri.rsplit("/", 1)[1])
        verdict |= {"challenger": trained.models[0].uri, "models": [model.uri for model in trained.models]}
        self.lease.check()
        serving = aliases.champion(self.config.track, self.config.name)
        now = None if serving is None else int(serving["version"])
        if now not in (plan.champion, version):
            verdict |= {"verdict": KEPT, "reason": f"the champion was changed to version {now} during the night"}
        if verdict["verdict"] == PROMOTED:
            aliases.promote(self.config.track, self.config.name, version)
        (self.folder / VERDICT).write_json(verdict)
        _after(self.config, self.folder, self.log)
        return job_result(self.folder) | {"repeated": False}

    def plan(self, night: str) -> Night:
        """What the night works on: fixed by its first call, with a copy of the champion's models."""
        file = self.folder / NIGHT
        if file.exists():
            held = file.read_json()
            if held["config"] != self.digest():
                raise UserError(
                    "this night was begun with another configuration",
                    where=str(file),
                    remedy="use the same words again, or delete the folder to begin the night anew",
                    wrong_use=True,
                )
            return Night(**{**held, "start": tuple(held["start"]), "notes": tuple(held["notes"])})
        plan = self._planned(night)
        file.write_json(asdict(plan))
        return plan

    def digest(self) -> str:
        judging = self.config.regroup.model_dump_json(exclude={"webhook", "lease_s"})
        return f"{self.config.digest()}-{hashlib.sha256(judging.encode()).hexdigest()[:8]}"

    def _planned(self, night: str) -> Night:
        config = self.config
        if not config.regroup.shards:
            ensure_shards(config, self.log)
        data = newest(config, night, self.log)
        manifest = read_manifest(locate(data.shards))
        tasks = manifest.tasks(config.data.tasks, data.shards)
        evaluation = config.regroup.evaluation or data.shards
        judged = read_manifest(locate(evaluation))
        check_evaluation(manifest, data.shards, judged, evaluation, tasks, config.regroup.split)
        champion = aliases.champion(config.track, config.name)
        notes: list[str] = [] if data.date == night else [f"the newest data is of {data.date}"]
        start: tuple[str, ...] = ()
        if champion is not None:
            groups, preparation = load_registered(champion["uri"], config.track)
            check_champion(groups, tasks, champion["uri"], manifest, preparation)
            for name, model in groups.items():
                write_model(self.folder / CHAMPION / name, model)
            why = self._cold(groups, manifest, tasks)
            if why:
                notes.append(f"the challenger starts afresh: {why}")
            else:
                start = tuple(str(self.folder / CHAMPION / name) for name in groups)
            notes += seen_by(champion, judged, evaluation, config.regroup.split)
        self.log(f"night {night}: shards {data.shards}, " + (
            f"champion {champion['uri']}" if champion else "no champion yet"
        ))  # fmt: skip
        for note in notes:
            self.log(f"note: {note}")
        return Night(
            night, self.digest(), data.date, data.shards, manifest.digest(), evaluation, judged.digest(),
            None if champion is None else int(champion["version"]), start, tuple(notes),
        )  # fmt: skip

    def _cold(self, groups: Mapping[str, GroupModel], manifest: Manifest, tasks: tuple[Task, ...]) -> str:
        """Why the challenger cannot start from the champion; empty where it can."""
        if not self.config.regroup.warm_start:
            return "regroup.warm_start is off"
        if len(groups) < 2:
            return "copies of the champion's single group would not part"
        try:
            WarmStart(list(groups.values())).check(
                self.config.network_spec(manifest.description.input, tasks)
            )  # fmt: skip
        except ValueError as error:
            return str(error)
        return ""

    def train(self, plan: Night, *, register: bool) -> Trained:
        """The challenger, in the night's folder."""
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
        )

    def verdict(self, plan: Night, trained: Trained) -> dict[str, Any]:
        """What the comparison says, with how grouping and data have changed."""
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
            "grouping_drift": drifted(before, after),
            "data_drift": self.data_drift(plan),
        }

    def compare(self, plan: Night) -> dict[str, Any]:
        """Champion and challenger on the same samples, judged by a task of the cluster."""
        import ray

        file = self.folder / COMPARISON
        if not file.exists():
            ray_section = self.config.ray
            self.log(f"judging champion and challenger on split {self.config.regroup.split} of {plan.evaluation}")
            task = ray.remote(judge).options(
                num_cpus=ray_section.cpus_per_worker, num_gpus=ray_section.gpus_per_worker or None,
                max_retries=ray_section.max_failures,
            )  # fmt: skip
            try:
                found = ray.get(task.remote(self.config, plan.evaluation, plan.evaluation_digest, self.folder))
            except Exception as error:
                raise user_error(error) or UserError(
                    f"champion and challenger could not be judged: {str(error).splitlines()[-1][:200]}",
                    where=plan.evaluation,
                    remedy="run the same words again; --debug shows where it failed",
                ) from error
            file.write_json(found)
        compared: dict[str, Any] = file.read_json()
        return compared

    def data_drift(self, plan: Night) -> list[str]:
        """How the labels of the training split differ from those that the champion was trained on, in words."""
        champion = aliases.champion(self.config.track, self.config.name)
        held = None if champion is None else label_sums(self.config, str(champion["run_id"]))
        if held is None:
            return ["the label statistics of the champion's data are not known"]
        manifest = read_manifest(locate(plan.shards))
        lines = []
        for task in manifest.tasks(self.config.data.tasks, plan.shards):
            if task.name in held:
                change = statistics.drift(task, held[task.name], manifest.sums["train"][task.name])
                lines += [f"{task.name}: {change.replace('in train', 'for the champion')}"] if change else []
        return lines


def job_result(folder: Location) -> dict[str, Any]:
    """The verdict of a night that is done, with the place of its page."""
    verdict: dict[str, Any] = (folder / VERDICT).read_json()
    return verdict | {"report": str(folder / REPORT)}


def drifted(before: Grouping, after: Grouping) -> dict[str, Any]:
    """How a grouping has changed, over the tasks that both have."""
    common = [name for name in before.tasks if name in after.tasks]
    old, new = before.among(common), after.among(common)
    return {
        "before": before.to_dict(),
        "adjusted_rand_index": old.adjusted_rand_index(new),
        "moved": old.moved(new),
        "new_tasks": [name for name in after.tasks if name not in common],
    }


def label_sums(config: Config, run_id: str) -> dict[str, statistics.Sums] | None:
    """Sums of the labels that a run was trained on, from its MLflow artifacts; None where they are not there."""
    import mlflow

    connect(config.track)
    try:
        found: dict[str, statistics.Sums] = mlflow.artifacts.load_dict(f"runs:/{run_id}/{LABELS}")
    except Exception:  # noqa: BLE001 - MLflow raises another kind of error for every kind of store
        return None
    return found


def _after(config: Config, folder: Location, log: Callable[[str], None]) -> None:
    """Page, tracking and webhook of a night that is decided; what is done is not done again."""
    verdict = (folder / VERDICT).read_json()
    if not (folder / REPORT).exists():
        write_night(folder)
        _track(config, folder, verdict, log)
    if config.regroup.webhook and not (folder / SENT).exists():
        problem = send(config.regroup.webhook, verdict)
        if problem:
            log(f"note: the webhook did not take the verdict: {problem}; the same words try it again")
        else:
            (folder / SENT).write_json({"night": verdict["night"]})


def _track(config: Config, folder: Location, verdict: Mapping[str, Any], log: Callable[[str], None]) -> None:
    try:
        client = connect(config.track)
        for name in (VERDICT, REPORT):
            client.log_text(verdict["run_id"], (folder / name).read_text(), name)
        client.set_tag(verdict["run_id"], "dmtg.verdict", verdict["verdict"])
        client.set_tag(verdict["run_id"], "dmtg.night", verdict["night"])
    except Exception as error:  # noqa: BLE001 - the night is decided; a copy that is missing must not undo it
        log(f"note: MLflow did not take the verdict ({str(error).splitlines()[0][:200]}); it is in {folder}")
