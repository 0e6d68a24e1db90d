"""MLflow runs, and a tracker that does nothing where tracking is off.

The run folder is the truth and MLflow its copy: what could not be delivered is still in `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.manifest import Manifest
from pipelines.sections import TrackSection
from pipelines.storage import Location

NOTE = "tracking.json"
log = logging.getLogger(__name__)

# A server that does not answer is found out in seconds, not after MLflow's default of many retries.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


class Tracker(Protocol):
    """Where a run's figures go."""

    run_id: str

    def record(self, record: Mapping[str, Any]) -> None:
        """The figures of one epoch of one stage."""
        ...

    def finish(self, result: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Final figures, and small text files (name → text) as artifacts."""
        ...

    def fail(self) -> None:
        """The run stopped before its end; it may be taken up again."""
        ...


class NullTracker:
    """Tracking is off."""

    run_id = ""

    def record(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def finish(self, result: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Nothing."""

    def fail(self) -> None:
        """Nothing."""


class MlflowTracker:
    """One MLflow run, taken up again where the run folder knows it."""

    def __init__(self, config: Config, run: Location, manifest: Manifest) -> None:
        import mlflow

        self.client = connect(config.track)
        note = run / NOTE
        if note.exists():
            self.run_id: str = note.read_json()["run_id"]
            with _reached(config.track):
                if self.client.get_run(self.run_id).info.status == "FAILED":
                    self.client.update_run(self.run_id, status="RUNNING")
            return
        with _reached(config.track):
            experiment = mlflow.set_experiment(config.track.experiment)
            created = self.client.create_run(experiment.experiment_id, run_name=run.name)
            self.run_id = created.info.run_id
            self._describe(config, manifest)
        note.write_json({"run_id": self.run_id, "uri": tracking_uri(config.track)})

    def _describe(self, config: Config, manifest: Manifest) -> None:
        import mlflow.data
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        flat = _flatten(config.model_dump(mode="json", exclude={"ray"}))
        self.client.log_batch(self.run_id, params=[Param(k, str(v)[:5000]) for k, v in flat.items()])
        self.client.set_tag(self.run_id, "dmtg.data_digest", manifest.digest())
        with warnings.catch_warnings():  # a local path is a path to several of MLflow's kinds; any will do
            warnings.simplefilter("ignore", UserWarning)
            source = mlflow.data.dataset_source_registry.resolve_dataset_source(config.data.shards)
        entity = Dataset(
            config.name,
            manifest.digest(),
            source_type=source._get_source_type(),  # noqa: SLF001 - the public way is bound to the active run
            source=source.to_json(),
        )
        self.client.log_inputs(self.run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])

    def record(self, record: Mapping[str, Any]) -> None:
        """One batch of metrics: `<stage>/<task>/<metric>` and the gate's probabilities."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        values = {f"{record['stage']}/val_score": record["val_score"]}
        for task, found in record["val"].items():
            values |= {f"{record['stage']}/{task}/{name}": value for name, value in found.items()}
            values[f"{record['stage']}/{task}/train_loss"] = record["train_loss"][task]
        stamp = int(record["time"] * 1000)
        metrics = [Metric(k, v, stamp, record["epoch"]) for k, v in values.items() if v is not None]
        try:
            self.client.log_batch(self.run_id, metrics=metrics)
        except (MlflowException, OSError) as error:  # a server that is away must not end a training run
            log.warning(
                "MLflow did not take epoch %s of %s (%s); its figures are in metrics.jsonl of the run folder",
                record["epoch"],
                record["stage"],
                str(error).partition("\n")[0][:200],
            )

    def finish(self, result: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Test figures and artifacts, and the run is marked finished."""
        from mlflow.entities import Metric

        values = {
            f"{result['split']}/{task}/{name}": value
            for task, found in result["metrics"].items()
            for name, value in found.items()
        }
        if result["normalized_gain"] is not None:
            values["normalized_gain"] = result["normalized_gain"]
        stamp = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id, metrics=[Metric(k, v, stamp, 0) for k, v in values.items() if v is not None]
        )
        self.client.set_tag(self.run_id, "dmtg.grouping", result["grouping_name"])
        for name, text in files.items():
            self.client.log_text(self.run_id, text, name)
        self.client.set_terminated(self.run_id)

    def fail(self) -> None:
        """The run is marked failed."""
        with contextlib.suppress(Exception):  # the error that ended the run is the one to show
            self.client.set_terminated(self.run_id, status="FAILED")


def tracking_uri(section: TrackSection) -> str:
    """The tracking address: the configured one, MLFLOW_TRACKING_URI, or an SQLite file in the current folder."""
    return section.uri or os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def enabled(section: TrackSection) -> bool:
    """Whether there is tracking at all."""
    return section.uri != "none"


def connect(section: TrackSection) -> Any:
    """An MLflow client that has been answered once.

    Raises:
        UserError: When the server does not answer.
    """
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri(section)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    with _reached(section):
        client.search_experiments(max_results=1)
    return client


@contextlib.contextmanager
def _reached(section: TrackSection) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        uri = urlsplit(tracking_uri(section))
        shown = f"{uri.scheme}://{uri.hostname or ''}{f':{uri.port}' if uri.port else ''}{uri.path}"
        raise UserError(
            f"the tracking server does not answer: {str(error).splitlines()[0][:200]}",
            where=f"track.uri = {shown}",
            remedy="start it, correct track.uri, or set track.uri=none to go without",
        ) from error


def open_tracker(config: Config, run: Location, manifest: Manifest) -> Tracker:
    """The tracker of a run.

    Raises:
        UserError: When the server does not answer.
    """
    return MlflowTracker(config, run, manifest) if enabled(config.track) else NullTracker()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping) and value
            else {f"{prefix}{key}": value}
        )
    return flat
