"""Unreachable MLflow servers: during training, at its end, at registration, and after a driver was killed."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from typer.testing import CliRunner

from dmtg_core.input_spec import InputSpec
from dmtg_core.tasks import Task
from dmtg_core.training.context import Save
from pipelines import storage
from pipelines.cli.app import app
from pipelines.config.loading import Config
from pipelines.config.sections import TrackSection
from pipelines.config.validation import checked
from pipelines.data.manifest import Manifest
from pipelines.data.sources.base import Description
from pipelines.errors import UserError, without_credentials
from pipelines.registry import tracking
from pipelines.registry.errors import reached
from pipelines.registry.tracking import MlflowTracker, connect, open_tracker, shown
from pipelines.runs.files import METRICS, read_jsonl
from pipelines.storage import Location, locate
from pipelines.training.context import RunContext
from pipelines.training.driver import Trained, train
from pipelines.training.publish import register_run
from tests.paths import ROOT
from tests.pipelines.conftest import make_config
from tests.pipelines.proxy import Proxy, proxy_to

SECRET = "swordfish"  # noqa: S105 - the server of the tests asks for none
EPOCHS = {"naive_mtl": [1, 2, 3, 4], "start_0": [1, 2, 3, 4]}


@dataclass
class Server:
    """An MLflow server behind a proxy, and clients of the server itself and of its database."""

    proxy: Proxy
    client: mlflow.MlflowClient
    database: mlflow.MlflowClient  # the same figures without requests

    @property
    def uri(self) -> str:
        """The address of the proxy, with credentials."""
        return f"http://someone:{SECRET}@127.0.0.1:{self.proxy.port}"

    def epochs(self, run_id: str, stage: str) -> list[int]:
        """The epochs of a stage that the server has."""
        return [metric.step for metric in self.database.get_metric_history(run_id, f"score/{stage}")]

    def holds_all_once(self, run_id: str, run: Location) -> bool:
        """Whether the server has every metric of the run folder exactly once."""
        for record in read_jsonl(run / METRICS):
            for name, value in _figures(record):
                history = self.database.get_metric_history(run_id, name)
                found = [metric.value for metric in history if metric.step == record["epoch"]]
                if found != ([] if value is None else [pytest.approx(value)]):
                    return False
        return {stage: sorted(self.epochs(run_id, stage)) for stage in EPOCHS} == EPOCHS


def _figures(record: dict[str, Any]) -> list[tuple[str, float]]:
    stage = record["stage"]
    found = [
        (f"{name}/{stage}/{task}", value) for task, held in record["val"].items() for name, value in held.items()
    ]
    throughput = f"throughput/{stage}"
    return [
        *found, (f"score/{stage}", record["val_score"]), (f"gain/{stage}/error", record["gain"]),
        (f"gate/{stage}/entropy", record["gate"]["entropy"]), (f"gate/{stage}/groups", record["groups"]),
        (f"{throughput}/samples_per_second", record["samples_per_second"]),
        (f"{throughput}/waiting_for_data", record["data_share"]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def server(mlflow_server: str, mlflow_folder: Path) -> Iterator[Server]:
    with proxy_to(int(mlflow_server.rpartition(":")[2])) as proxy:
        database = mlflow.MlflowClient(f"sqlite:///{mlflow_folder / 'mlflow.db'}")
        yield Server(proxy, mlflow.MlflowClient(mlflow_server), database)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No retries of requests to an unreachable server; variables that MLflow sets are restored."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "")


@dataclass
class Delivered:
    """A run whose server was unreachable during training, at its end, and at registration."""

    config: Config
    done: Trained
    logged: list[str]
    error: UserError  # of the first call
    messages: str


@pytest.fixture(scope="module")
def delivered(images: Path, tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Delivered]:
    config = make_config(
        images, tmp_path_factory.mktemp("run"), track={"uri": server.uri, "experiment": "unreachable"}
    )
    run = locate(config.run.root) / config.run_name()
    logged: list[str] = []

    def on(line: str, *steps: tuple[str, Callable[[], object]]) -> None:
        logged.append(line)
        for words, act in steps:
            if words in " ".join(line.split()):
                act()

    def until(condition: Callable[[], object]) -> None:
        while not condition():
            time.sleep(0.02)

    def delivered_again() -> bool:
        return any("could be written again" in message for message in messages.held)

    report = RunContext.report

    def paced(context: RunContext, record: Mapping[str, Any] | None, save: Save) -> None:
        """Report an epoch and wait for its line: the epochs of this run take less time than a poll."""
        report(context, record, save)
        if record is not None:
            until(lambda: any(f"{record['stage']} epoch {record['epoch']:>3}" in line for line in logged))

    logger, messages = logging.getLogger("pipelines"), Messages()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setattr(storage, "PATIENCE_S", 1.0)
        monkeypatch.setattr(RunContext, "report", paced)
        logger.addHandler(messages)
        try:
            with pytest.raises(UserError) as caught:
                train(config, lambda line: on(
                    line,
                    ("naive_mtl epoch 2", server.proxy.refuse),
                    ("naive_mtl epoch 3", lambda: until(lambda: server.proxy.refused)),
                    ("start_0 epoch 1", server.proxy.open),
                    ("start_0 epoch 3", lambda: until(delivered_again)),
                    ("start_0 epoch 3", server.proxy.refuse),
                ))  # fmt: skip
            assert (run / "result.json").exists()
            assert (run / "report.html").exists()
            assert (run / "models").folders()
            server.proxy.open()
            monkeypatch.setattr(storage, "PATIENCE_S", 600.0)
            done = train(config, lambda line: on(
                line, ("registering the grouping", server.proxy.refuse), ("retrying for", server.proxy.open)
            ))  # fmt: skip
        finally:
            logger.removeHandler(messages)
            server.proxy.open()
        yield Delivered(config, done, logged, caught.value, "\n".join(messages.held))


class Messages(logging.Handler):
    """The logged messages."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.held.append(record.getMessage())


class TestUnreachable:
    def test_training_continues_and_every_metric_arrives_once(self, delivered: Delivered, server: Server) -> None:
        assert (
            "MLflow's copy of the metrics cannot be written, training continues without it" in delivered.messages
        )
        assert "could be written again" in delivered.messages
        assert sum("epoch" in line and "score" in line for line in delivered.logged) == 8
        assert server.holds_all_once(delivered.done.run_id, delivered.done.run)

    def test_the_error_at_the_end_names_the_command_that_publishes_later(self, delivered: Delivered) -> None:
        run = delivered.done.run
        assert f"training is done, its result and models are in {run}" in delivered.error.what
        assert f"dmtg models register {run}" in delivered.error.remedy
        assert not delivered.error.wrong_use

    def test_the_same_command_retries_and_publishes(self, delivered: Delivered, server: Server) -> None:
        assert delivered.done.resumed
        assert sum("retrying for" in line for line in delivered.logged) == 2
        stored = server.client.get_run(delivered.done.run_id)
        assert stored.info.status == "FINISHED"
        assert stored.data.metrics["normalized_gain"] == pytest.approx(delivered.done.result["normalized_gain"])
        assert {"report.html", "grouping.json", "config.yaml"} <= {
            file.path for file in server.client.list_artifacts(delivered.done.run_id)
        }
        names = {model.name for model in delivered.done.models}
        assert names == {"patches", *(f"patches.{group}" for group in delivered.done.result["grouping"])}
        for name in names:
            assert (
                len(server.client.search_model_versions(f"name='{name}' and run_id='{stored.info.run_id}'")) == 1
            )

    def test_no_credentials_are_shown_or_kept(self, delivered: Delivered, server: Server) -> None:
        shown_by = [*delivered.logged, str(delivered.error), delivered.messages]
        for file in delivered.done.run.files():
            assert SECRET.encode() not in (delivered.done.run / file).read_bytes(), file
        stored = server.client.get_run(delivered.done.run_id)
        assert stored.data.params["track.uri"] == f"http://127.0.0.1:{server.proxy.port}"
        assert not [text for text in [*shown_by, str(stored.to_dictionary())] if SECRET in text]

    def test_a_run_folder_registers_later(
        self, delivered: Delivered, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "copy"  # a run that MLflow does not have
        shutil.copytree(str(delivered.done.run), folder)
        for name in (tracking.TRACKING, tracking.REGISTERED):
            (folder / name).unlink()
        monkeypatch.setattr(storage, "PATIENCE_S", 0.0)
        server.proxy.refuse()
        with pytest.raises(UserError, match="training is done") as caught:
            register_run(str(folder))
        server.proxy.open()
        assert "dmtg models register" in caught.value.remedy
        first = register_run(str(folder))
        assert first.run_id != delivered.done.run_id
        assert server.holds_all_once(first.run_id, locate(str(folder)))
        assert server.client.get_run(first.run_id).info.status == "FINISHED"
        assert len(first.models) == len(delivered.done.models)

        again = CliRunner().invoke(app, ["models", "register", str(folder), "--uri", server.uri, "--json"])
        assert again.exit_code == 0, again.stderr
        assert SECRET not in again.output
        found = json.loads(again.stdout.splitlines()[-1])
        assert (found["run_id"], found["models"]) == (first.run_id, [model.uri for model in first.models])
        (folder / tracking.REGISTERED).unlink()  # as after a kill before this file was written
        assert register_run(str(folder)).models == first.models
        assert server.holds_all_once(first.run_id, locate(str(folder)))

    def test_registering_names_what_is_missing(self, delivered: Delivered, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no finished run: there is no config.yaml and no result.json"):
            register_run(str(tmp_path))
        folder = tmp_path / "copy"
        shutil.copytree(str(delivered.done.run), folder)
        values = yaml.safe_load((folder / "config.yaml").read_text())
        values["data"]["shards"] = "gone"
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(UserError, match="no data set here") as caught:
            register_run(str(folder))
        assert "data.shards is relative" in caught.value.remedy
        note = json.loads((folder / tracking.TRACKING).read_text())
        (folder / tracking.TRACKING).write_text(json.dumps(note | {"data_digest": "another"}))
        values["data"]["shards"] = delivered.config.data.shards
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(UserError, match="not the shards that the run was trained on"):
            register_run(str(folder))


def test_an_interruption_does_not_wait_for_a_request_that_hangs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = _tracker(tmp_path, server.uri)
    server.proxy.silence()
    tracker.record(_record("start_0", 1))
    while not server.proxy.waiting:
        time.sleep(0.02)
    monkeypatch.setattr(tracking, "FAREWELL_S", 0.1)
    tracker.fail()
    assert len(server.proxy.waiting) == 1  # the request hangs as before
    server.proxy.refuse()
    server.proxy.open()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SQLite file, without a server."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


class TestStore:
    def test_metrics_of_a_killed_driver_are_sent_by_the_next_one(self, store: str, tmp_path: Path) -> None:
        killed = _tracker(tmp_path, store)
        killed.record(_record("start_0", 1))
        assert killed.writer.flush(600)
        records = [_record("start_0", epoch) for epoch in (1, 2, 3)] + [_record("start_0", 4, score=None)]
        (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
        tracker = _tracker(tmp_path, store)
        assert tracker.run_id == killed.run_id
        assert tracker.writer.flush(600)
        tracker.record(_record("start_0", 3) | {"time": 77.0})  # an epoch that was trained again
        tracker.finish({"split": "test", "metrics": {"task": {"accuracy": 0.5}}, "grouping_name": "all"}, {})
        for _ in range(2):
            history = tracker.client.get_metric_history(tracker.run_id, "score/start_0")
            assert [(m.step, m.timestamp) for m in history] == [
                (1, 1000), (2, 2000), (3, 3000), (4, 4000)
            ]  # fmt: skip
            history = tracker.client.get_metric_history(tracker.run_id, "accuracy/start_0/task")
            assert [m.step for m in history] == [1, 2, 3, 4]
            assert len(tracker.client.get_metric_history(tracker.run_id, "accuracy/test/task")) == 1
            tracker.finish({"split": "test", "metrics": {"task": {"accuracy": 0.5}}, "grouping_name": "all"}, {})
        assert tracker.client.get_run(tracker.run_id).info.status == "FINISHED"

    def test_epochs_that_were_sent_by_an_earlier_version_are_not_sent_again(
        self, store: str, tmp_path: Path
    ) -> None:
        tracker = _tracker(tmp_path, store)
        tracker.client.log_metric(tracker.run_id, "start_0/val_score", 0.5, step=1)
        (tmp_path / METRICS).write_text("".join(json.dumps(_record("start_0", n)) + "\n" for n in (1, 2)))
        tracker.deliver()
        assert [m.step for m in tracker.client.get_metric_history(tracker.run_id, "score/start_0")] == [2]

    def test_a_run_has_its_verdict_and_the_picture_of_its_groups_as_description(
        self, store: str, tmp_path: Path
    ) -> None:
        tracker, result = _tracker(tmp_path, store), {"split": "test", "grouping_name": "all"}
        tracker.finish(result, {"grouping.png": b"picture"}, "Two groups.")
        note = tracker.client.get_run(tracker.run_id).data.tags["mlflow.note.content"]
        assert note == f"Two groups.\n\n![groups](get-artifact?path=grouping.png&run_uuid={tracker.run_id})"
        path = tracker.client.download_artifacts(tracker.run_id, "grouping.png", str(tmp_path))
        assert Path(path).read_bytes() == b"picture"

    def test_a_run_that_was_deleted_in_mlflow_is_created_again(self, store: str, tmp_path: Path) -> None:
        tracker = _tracker(tmp_path, store)
        (tmp_path / METRICS).write_text(json.dumps(_record("start_0", 1)) + "\n")
        (tmp_path / tracking.REGISTERED).write_text("[]")
        tracker.client.delete_run(tracker.run_id)
        again = _tracker(tmp_path, store)
        assert again.run_id != tracker.run_id
        assert not (tmp_path / tracking.REGISTERED).exists()
        again.deliver()
        assert [m.step for m in again.client.get_metric_history(again.run_id, "score/start_0")] == [1]

    def test_a_run_can_be_a_part_of_another(self, store: str, tmp_path: Path) -> None:
        whole = _tracker(tmp_path / "whole", store)
        part = _tracker(tmp_path / "part", store, whole.run_id)
        assert part.client.get_run(part.run_id).data.tags["mlflow.parentRunId"] == whole.run_id

    def test_the_registry_can_have_another_address(self, store: str, tmp_path: Path) -> None:
        registry = f"sqlite:///{tmp_path / 'registry.db'}"
        connect(TrackSection(uri=store, registry_uri=registry)).create_registered_model("there")
        assert mlflow.get_registry_uri() == registry
        assert [m.name for m in mlflow.MlflowClient(registry).search_registered_models()] == ["there"]
        assert connect(TrackSection(uri=store)).search_registered_models() == []
        assert mlflow.get_registry_uri() == store


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("http://me:secret@host:5000/a", "http://host:5000/a"),
        ("asked https://me:s@cret@host/x, see http://b:c@d", "asked https://host/x, see http://d"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=…"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("models:/patches@champion", "models:/patches@champion"),
    ],
)  # fmt: skip
def test_addresses_lose_their_credentials(raw: str, clean: str) -> None:
    assert without_credentials(raw) == clean


def test_a_refusal_is_not_retried() -> None:
    from mlflow.exceptions import MlflowException, RestException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, PERMISSION_DENIED

    unreachable = [
        MlflowException("API request to http://host failed with exception"),
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}),
        ConnectionRefusedError(111, "Connection refused"),
    ]
    refused = [
        MlflowException("bad name", INVALID_PARAMETER_VALUE),
        MlflowException("not you", PERMISSION_DENIED),
        MlflowException("an error of the client"),
        PermissionError(13, "Permission denied"),
    ]
    for error in unreachable + refused:
        with pytest.raises(UserError) as caught, reached("http://host"):
            raise error
        assert storage.is_transient(caught.value) == (error in unreachable)
        assert ("does not answer" if error in unreachable else "refuses") in caught.value.what
    with pytest.raises(KeyError), reached("http://host"):
        raise KeyError("a mistake of ours")


def _config(uri: str) -> Config:
    return checked(Config, {"name": "made", "data": {"shards": "shards"}, "track": {"uri": uri}})


def _tracker(folder: Path, uri: str, parent: str = "") -> MlflowTracker:
    task = Task("task", "binary")
    manifest = Manifest(Description(InputSpec("features", (2,)), (task,), {}), {}, {})
    tracker = open_tracker(_config(uri), locate(str(folder)), manifest, parent)
    assert isinstance(tracker, MlflowTracker)
    return tracker


def _record(stage: str, epoch: int, score: float | None = 0.5) -> dict[str, Any]:
    """The record of an epoch that ended at `epoch` seconds since 1970."""
    return {"stage": stage, "epoch": epoch, "val_score": score, "val": {"task": {"accuracy": 0.25, "auroc": None}},
            "train_loss": {"task": 1.0}, "time": float(epoch)}  # fmt: skip


def test_a_configuration_is_shown_without_credentials() -> None:
    config = _config(f"http://me:{SECRET}@host:5000")
    assert shown(config)["track"]["uri"] == "http://host:5000"
    assert config.track.uri.endswith(f"{SECRET}@host:5000")


ENVIRONMENT = """
import os
before = dict(os.environ)
from pipelines.registry import aliases, models, tracking, versions
assert os.environ == before
from pipelines.registry.environment import mlflow_environment
mlflow_environment()
print(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"], os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
"""


def test_variables_of_mlflow_are_not_set_at_import_and_given_ones_are_kept() -> None:
    found = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT], capture_output=True, text=True, cwd=ROOT, check=True,
        env={"PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7"},
    )  # fmt: skip
    assert found.stdout.split() == ["20", "7"]
