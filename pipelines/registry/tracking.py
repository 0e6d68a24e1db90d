"""Tracking of runs in MLflow, and a tracker that does nothing.

MLflow has a copy of the run folder. An unreachable server does not stop training: metrics are sent by a background
writer, which retries, and before anything is sent again MLflow is asked which metrics it has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dmtg_core.names import key_of
from pipelines.config.loading import Config
from pipelines.config.sections import TrackSection
from pipelines.errors import UserError, without_credentials
from pipelines.registry.environment import mlflow_environment
from pipelines.registry.errors import reached
from pipelines.registry.lost_runs import ENDED, PROCESS, end_lost_runs, owner_tag
from pipelines.registry.records import LONGEST_TAG, SCORE, digest_of, epoch_metrics, final_metrics, run_description
from pipelines.registry.sqlite_store import PREFIX as SQLITE
from pipelines.registry.sqlite_store import ensure_store
from pipelines.runs.files import METRICS, REGISTERED, TRACKING, read_jsonl
from pipelines.runs.writer import BackgroundWriter, PendingWrite
from pipelines.scratch import temporary_folder
from pipelines.storage import Location

if TYPE_CHECKING:  # it imports torch, which the registry alone does not need
    from pipelines.data.manifest import Manifest

GROUPING_TAG, FILES_TAG = "dmtg.grouping", "dmtg.files"
PARENT_TAG, NOTE_TAG = "mlflow.parentRunId", "mlflow.note.content"
KEY_TAG = "dmtg.key"  # a key that the run folder has before the run is created
NAME_TAG = "dmtg.name."  # with the key of a task whose name MLflow does not take: its name
MOST_AT_ONCE = 100  # parameters or tags of a request
FAREWELL_S = 10.0  # an interrupted run waits so long for MLflow to receive its status
logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives the metrics of a run."""

    run_id: str

    def record(self, record: Mapping[str, Any]) -> None:
        """Add the metrics of an epoch of a stage, without waiting."""
        ...

    def deliver(self) -> None:
        """Wait until all metrics of the run have been sent."""
        ...

    def finish(self, result: Mapping[str, Any], files: Mapping[str, str | bytes], description: str = "") -> None:
        """Send the final metrics, and small files (name → content) as artifacts; mark the run as finished."""
        ...

    def fail(self) -> None:
        """Mark the run as failed; it may be resumed."""
        ...


class NullTracker:
    """A tracker that does nothing, for tracking that is off."""

    run_id = ""

    def record(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def deliver(self) -> None:
        """Do nothing."""

    def finish(self, result: Mapping[str, Any], files: Mapping[str, str | bytes], description: str = "") -> None:
        """Do nothing."""

    def fail(self) -> None:
        """Do nothing."""


class MlflowTracker:
    """An MLflow run. It is resumed if the run folder names one that still exists in MLflow.

    Args:
        config: The configuration.
        run: The run folder; metrics in it that MLflow lacks are sent.
        manifest: The data, for the run's lineage.
        parent: MLflow run of which this one is a part.

    Raises:
        UserError: When the server does not answer.
    """

    def __init__(self, config: Config, run: Location, manifest: Manifest, parent: str = "") -> None:
        self.uri, self.run = tracking_uri(config.track), run
        self.client = connect(config.track)
        self.records: dict[tuple[str, int], Mapping[str, Any]] = {}  # by stage and epoch
        self.received: dict[str, set[int]] = {}  # stage → epochs that MLflow has, once it has been asked
        self.sending = threading.Lock()
        with reached(self.uri):
            self.run_id: str = self._resumed() or self._created(config, manifest, parent)
        self.writer = BackgroundWriter(lambda _, message: logger.warning(message))
        self._add(read_jsonl(run / METRICS))
        self._send_later()

    def _resumed(self) -> str:
        """The MLflow run that the run folder names; empty if it does not exist."""
        from mlflow.exceptions import MlflowException

        note = self.run / TRACKING
        if not note.exists():
            return ""
        run_id: str = note.read_json()["run_id"]
        if not run_id:  # the process was killed while it created the run
            return ""
        try:
            info = self.client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return ""
        if info.lifecycle_stage != "active":  # it has been deleted
            return ""
        if info.status in ENDED:
            self.client.update_run(run_id, status="RUNNING")
        if info.status != "FINISHED":
            self.client.set_tag(run_id, PROCESS, owner_tag()[PROCESS])
        return run_id

    def _created(self, config: Config, manifest: Manifest, parent: str) -> str:
        import mlflow

        experiment = mlflow.set_experiment(config.track.experiment).experiment_id
        note = self._new_note(manifest)
        tags = {KEY_TAG: note["key"], **owner_tag(), **({PARENT_TAG: parent} if parent else {})}
        run_id: str = self._keyed(experiment, note["key"]) or (
            self.client.create_run(experiment, run_name=self.run.name, tags=tags).info.run_id
        )
        self._describe(run_id, config, manifest)
        (self.run / REGISTERED).delete()  # models of a run that MLflow does not have any more
        (self.run / TRACKING).write_json(note | {"run_id": run_id})
        return run_id

    def _new_note(self, manifest: Manifest) -> dict[str, str]:
        """The note of a run that is created next. It has a key, by which a killed process finds the run again."""
        note = {"run_id": "", "uri": without_credentials(self.uri), "data_digest": manifest.digest()}
        file = self.run / TRACKING
        held: dict[str, str] = file.read_json() if file.exists() else {}
        if {key: held.get(key) for key in note} != note or "key" not in held:
            held = note | {"key": uuid.uuid4().hex}
            file.write_json(held)
        return held

    def _keyed(self, experiment: str, key: str) -> str:
        """The MLflow run with a key; empty if it was not created."""
        found = self.client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        for run in found:
            self.client.update_run(run.info.run_id, status="RUNNING")
            self.client.set_tag(run.info.run_id, PROCESS, owner_tag()[PROCESS])
        return str(found[0].info.run_id) if found else ""

    def _describe(self, run_id: str, config: Config, manifest: Manifest) -> None:
        import mlflow.data
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        values = shown(config)
        flat = _flatten({section: value for section, value in values.items() if section != "ray"})
        for params in _parts([Param(key, str(value)[:5000]) for key, value in flat.items()]):
            self.client.log_batch(run_id, params=params)
        names = {task.name: key_of(task.name) for task in manifest.description.tasks}
        tags = [RunTag(NAME_TAG + key, name[:LONGEST_TAG]) for name, key in names.items() if key != name]
        for some in _parts(tags):
            self.client.log_batch(run_id, tags=some)
        self.client.set_tag(run_id, "dmtg.data_digest", manifest.digest())
        with (
            warnings.catch_warnings()
        ):  # several kinds of MLflow's sources accept a local path; any of them is right
            warnings.simplefilter("ignore", UserWarning)
            source = mlflow.data.dataset_source_registry.resolve_dataset_source(config.data.shards)
        entity = Dataset(
            config.name,
            manifest.digest(),
            source_type=source._get_source_type(),  # noqa: SLF001 - the public function needs an active run
            source=source.to_json(),
        )
        self.client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])

    def record(self, record: Mapping[str, Any]) -> None:
        """Add the metrics of an epoch; see `records.epoch_metrics`. The background writer sends them."""
        self._add([record])
        self._send_later()

    def _add(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            self.records.setdefault((record["stage"], record["epoch"]), record)

    def _send_later(self) -> None:
        self.writer.put("MLflow's copy of the metrics", PendingWrite(self._send))

    def deliver(self) -> None:
        """Send all metrics of the run folder that MLflow does not have.

        Raises:
            UserError: When the server does not answer; see `registry.errors.retry_while_unreachable`.
        """
        self._add(read_jsonl(self.run / METRICS))
        self._send()

    def _send(self) -> None:
        with self.sending, reached(self.uri):
            try:
                for (stage, epoch), record in list(self.records.items()):
                    if stage not in self.received:
                        self.received[stage] = self._epochs(stage)
                    if epoch not in self.received[stage]:
                        self.client.log_batch(self.run_id, metrics=epoch_metrics(record))
                        self.received[stage].add(epoch)
            except BaseException:
                self.received.clear()  # it is unknown whether the last request arrived
                raise

    def _epochs(self, stage: str) -> set[int]:
        """The epochs of a stage that MLflow has, also under the names of earlier versions."""
        names = (f"{SCORE}/{stage}", f"{stage}/val_score")
        return {held.step for name in names for held in self.client.get_metric_history(self.run_id, name)}

    def finish(self, result: Mapping[str, Any], files: Mapping[str, str | bytes], description: str = "") -> None:
        """Send test metrics and artifacts and mark the run as finished, unless MLflow has these artifacts.

        A comparison that was extended has others than before.

        Args:
            result: As in `result.json`; missing entries are left out.
            files: Name → content of the artifacts.
            description: Text that MLflow shows for the run, above the picture of the groups.

        Raises:
            UserError: When the server does not answer; see `registry.errors.retry_while_unreachable`.
        """
        self.deliver()
        with reached(self.uri):
            held, sent = self.client.get_run(self.run_id), digest_of(files)
            if held.info.status != "FINISHED" or held.data.tags.get(FILES_TAG) != sent:
                self.client.log_batch(self.run_id, metrics=final_metrics(result, held.data.metrics))
                self._log_files(files)
                if description:
                    self.client.set_tag(self.run_id, NOTE_TAG, run_description(description, self.run_id, files))
                self.client.set_tag(self.run_id, GROUPING_TAG, result.get("grouping_name", ""))
                self.client.set_tag(self.run_id, FILES_TAG, sent)
                self.client.set_terminated(self.run_id)
        self.writer.close()

    def _log_files(self, files: Mapping[str, str | bytes]) -> None:
        with temporary_folder() as folder:
            for name, content in files.items():
                if isinstance(content, str):
                    self.client.log_text(self.run_id, content, name)
                else:
                    (folder / name).write_bytes(content)
                    self.client.log_artifact(self.run_id, str(folder / name))

    def fail(self) -> None:
        """Mark the run as failed, unless MLflow is unreachable."""

        def write() -> None:
            with contextlib.suppress(Exception):  # the user sees the error that ended the run
                self.client.set_terminated(self.run_id, status="FAILED")

        self.writer.put("the end of the run", PendingWrite(write))
        self.writer.flush(0 if self.writer.failing else FAREWELL_S)
        self.writer.close()


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The values in parts of at most `MOST_AT_ONCE`."""
    for start in range(0, len(values), MOST_AT_ONCE):
        yield values[start : start + MOST_AT_ONCE]


def tracking_uri(section: TrackSection) -> str:
    """The tracking address: the configured one, MLFLOW_TRACKING_URI, or an SQLite file in the current folder."""
    return section.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def enabled(section: TrackSection) -> bool:
    """Whether tracking is on."""
    return section.uri != "none"


def shown(config: Config) -> dict[str, Any]:
    """The configuration without credentials, to be written and shown. The webhook is left out.

    The address of a webhook often is a secret.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        return without_credentials(value) if isinstance(value, str) else value

    cleaned: dict[str, Any] = clean(config.model_dump(mode="json", exclude={"regroup": {"webhook"}}))
    return cleaned


def exists(section: TrackSection) -> bool:
    """Whether there can be a registry: its address is no SQLite file, or the file exists."""
    uri = tracking_uri(section)
    return not uri.startswith(SQLITE) or Path(uri.removeprefix(SQLITE)).exists()


def connect(section: TrackSection, *, create: bool = True) -> Any:
    """Connect to MLflow: a client whose first request has been answered. The registry is set for all of MLflow.

    Args:
        section: The addresses.
        create: Whether an SQLite file that does not exist is created.

    Raises:
        UserError: When the server does not answer, or the file does not exist and is not created.
    """
    uri = tracking_uri(section)
    if not create and not exists(section):
        raise UserError(
            "there is no registry",
            where=without_credentials(uri),
            remedy="run the command in the folder of mlflow.db, name the registry with --uri, or train first",
        )
    _announce(uri)
    mlflow_environment()
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    given = os.environ.get("MLFLOW_REGISTRY_URI", "")
    registry = section.registry_uri or given
    with reached(uri):
        for store in (uri, registry):
            ensure_store(store)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(registry)
        os.environ["MLFLOW_REGISTRY_URI"] = given  # MLflow sets it too, and the next section may have none
        client = mlflow.MlflowClient(uri, registry or uri)
        client.search_experiments(max_results=1)
        end_lost_runs(client, uri, section.experiment)
    return client


@cache
def _announce(uri: str) -> None:
    """Log an address before the first connection to it, which takes seconds."""
    logger.info("opening MLflow at %s", without_credentials(uri))


def open_tracker(config: Config, run: Location, manifest: Manifest, parent: str = "") -> Tracker:
    """The tracker of a run, optionally as a part of the MLflow run `parent`.

    Raises:
        UserError: When the server does not answer.
    """
    return MlflowTracker(config, run, manifest, parent) if enabled(config.track) else NullTracker()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{key_of(str(key))}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{key_of(str(key))}": value}
        )
    return flat
