"""Publishes a finished run: writes its report, and sends metrics, models and artifacts to MLflow.

`dmtg train` and `dmtg models register` end with it. What MLflow has received before is not sent again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.config.loading import Config
from pipelines.config.validation import checked
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.errors import UserError, without_credentials
from pipelines.registry.errors import not_published, reached, retry_while_unreachable
from pipelines.registry.models import Registered, are_registered, register
from pipelines.registry.records import PICTURE
from pipelines.registry.tracking import Tracker, enabled, open_tracker, tracking_uri
from pipelines.runs.configuration import stored_values
from pipelines.runs.files import CONFIG, GROUPING, LABELS, REGISTERED, REPORT, RESULT, TRACKING
from pipelines.storage import Location, locate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A published run: its folder, its MLflow run, its registered models, and the server."""

    run: Location
    run_id: str
    models: list[Registered]
    uri: str


def publish(
    config: Config, run: Location, tracker: Tracker, manifest: Manifest, log: Callable[[str], None] = logger.info
) -> list[Registered]:
    """Write the report of a finished run and publish the run to MLflow; the registered models.

    Raises:
        UserError: When MLflow is unreachable or refuses. The run folder is complete by then.
    """
    from pipelines.report.run import verdict, write_report

    if not (run / REPORT).exists():
        write_report(run)
    result = (run / RESULT).read_json()
    registers = config.track.register_models and enabled(config.track)
    if registers and not (run / REGISTERED).exists():
        log("registering the grouping and its group models")

    def send() -> list[Registered]:
        tracker.deliver()
        models = _registered(config, run, tracker.run_id, manifest, result) if registers else []
        files: dict[str, str | bytes] = {name: (run / name).read_text() for name in (REPORT, GROUPING, CONFIG)}
        if (run / PICTURE).exists():  # a report of an earlier version has none
            files[PICTURE] = (run / PICTURE).read_bytes()
        files[LABELS] = json.dumps(manifest.sums["train"])
        tracker.finish(result, files, verdict(result))
        return models

    return retry_while_unreachable(send, run, log)


def _registered(
    config: Config, run: Location, run_id: str, manifest: Manifest, result: dict[str, Any]
) -> list[Registered]:
    """Register the models of a run if the registry does not have them; the registered models."""
    if (run / REGISTERED).exists():
        held = [Registered(**entry) for entry in (run / REGISTERED).read_json()]
        with reached(tracking_uri(config.track)):
            if are_registered(config.track, held, run_id):
                return held
        logger.warning("the registry does not have all models of %s any more: they are registered again", run)
    example = stored_example(locate(config.data.shards), manifest)
    with reached(tracking_uri(config.track)):
        models = register(config, run, run_id, manifest, example, result)
    (run / REGISTERED).write_json([vars(model) for model in models])
    return models


def reopen_tracker(config: Config, run: Location, manifest: Manifest) -> Tracker:
    """The tracker of a finished run.

    Raises:
        UserError: When the server is unreachable; it names the command that publishes the run later.
    """
    try:
        return open_tracker(config, run, manifest)
    except UserError as error:
        raise not_published(error, run) from error


def register_run(
    run_dir: str, uri: str = "", log: Callable[[str], None] = logger.info, *, trust_code: bool = False
) -> Published:
    """Publish a finished run to MLflow.

    Args:
        run_dir: The run folder; its `config.yaml` and `tracking.json` name the server.
        uri: Another tracking server, or the same with credentials.
        log: Called with each line.
        trust_code: Import the code of other packages that the run names.

    Raises:
        UserError: When the run is not finished, its shards are missing, or MLflow does not accept it.
    """
    run = locate(run_dir).retrying()
    missing = [name for name in (CONFIG, RESULT) if not (run / name).exists()]
    if missing:
        raise UserError(
            f"no finished run: there is no {' and no '.join(missing)}",
            where=str(run),
            remedy="give the folder of a run that dmtg train has finished, or run its dmtg train command again",
        )
    held = checked(Config, stored_values(run))
    track = held.track.model_copy(update={"uri": uri or _address(held, run), "register_models": True})
    section = held.run.model_copy(update={"trust_code": trust_code})  # a run folder cannot allow its own code
    config = held.model_copy(update={"track": track, "run": section})
    if not enabled(track):
        raise UserError("the run was not tracked", where=f"{run / CONFIG}: track.uri=none", remedy="give --uri")
    manifest = _data_of(config, run)
    tracker = reopen_tracker(config, run, manifest)
    models = publish(config, run, tracker, manifest, log)
    return Published(run, tracker.run_id, models, without_credentials(tracking_uri(track)))


def _data_of(config: Config, run: Location) -> Manifest:
    """The manifest of the shards that a run was trained on; it describes the input of a model.

    Raises:
        UserError: When the shards are missing, or have been replaced by others.
    """
    shards, note = locate(config.data.shards), run / TRACKING
    remedy = "put the shards of the run back"
    if "://" not in config.data.shards and not config.data.shards.startswith(("/", "~")):
        remedy += ", or work in the folder where dmtg train did: data.shards is relative"
    try:
        manifest = read_manifest(shards)
    except UserError as error:
        raise UserError(error.what, where=error.where, remedy=remedy) from error
    digest = note.read_json().get("data_digest") if note.exists() else None
    if digest not in (None, manifest.digest()):
        raise UserError("these are not the shards that the run was trained on", where=str(shards), remedy=remedy)
    return manifest


def _address(config: Config, run: Location) -> str:
    """The tracking server of a run, with credentials if they are available."""
    given, note = tracking_uri(config.track), run / TRACKING
    if not enabled(config.track) or not note.exists():
        return given
    known: str = note.read_json()["uri"]
    return given if without_credentials(given) == known else known


def stored_example(folder: Location, manifest: Manifest, rows: int = 2) -> np.ndarray:
    """The first stored inputs of the training split."""
    import pyarrow.parquet as pq

    first = next(shard for shard in manifest.shards["train"] if shard.rows >= rows)
    with (folder / first.file).filesystem.open_input_file((folder / first.file).path) as file:
        table = pq.ParquetFile(file).read_row_group(0, columns=["input"]).slice(0, rows)
    spec = manifest.description.input
    values = [np.frombuffer(value.as_py(), np.dtype(spec.dtype).newbyteorder("<")) for value in table["input"]]
    return np.stack(values).reshape(len(values), *spec.shape).astype(spec.dtype)
