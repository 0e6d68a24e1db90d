"""Metrics of an embedded run: its endpoint has every name that the dashboard reads, while the run trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.monitoring.names import TRAINING
from pipelines.monitoring.prometheus import PrometheusEndpoint
from pipelines.runs.files import METRICS, read_jsonl
from pipelines.runs.writer import BackgroundWriter, PendingWrite
from pipelines.training.driver import train
from pipelines.training.profiling import profile
from tests.pipelines.conftest import make_config
from tests.pipelines.monitoring.endpoints import reading
from tests.pipelines.s3_server import free_port

pytestmark = pytest.mark.usefixtures("plain_reports")


def test_a_port_in_use_is_refused_before_shards_are_written(images: Path, tmp_path: Path) -> None:
    port = free_port()
    endpoint = PrometheusEndpoint(port)
    try:
        with pytest.raises(UserError, match="the metrics endpoint cannot be opened"):
            train(make_config(images, tmp_path, track={"metrics_port": port}))
    finally:
        endpoint.close()
    assert not (tmp_path / "shards").exists()


def test_the_endpoint_of_a_run_has_every_metric_while_it_trains(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    # a low rate, so that naive MTL has an error on every task: there is no gain over an error of 0
    slow = {"checkpoint_every": 2, "learning_rate": 1e-4, "epochs": 3}
    config = make_config(images, tmp_path, track={"uri": "none", "metrics_port": port}, train=slow)
    profile(config, lambda _: None)
    with reading(port) as endpoint, monkeypatch.context() as patch:
        put = BackgroundWriter.put

        def put_and_wait(writer: BackgroundWriter, name: str, pending: PendingWrite) -> None:
            put(writer, name, pending)
            assert writer.flush(60)

        # training waits for each write, so the record of an epoch has the time of a checkpoint on any disk
        patch.setattr(BackgroundWriter, "put", put_and_wait)
        # the last epochs are read while the report is written
        patch.setattr("pipelines.report.run.page", lambda run: endpoint() or "")
        done = train(config)
    assert endpoint.names == {metric.name for metric in TRAINING}
    records = read_jsonl(done.run / METRICS)
    last = {record["stage"]: record for record in records}
    assert set(last) == {"naive_mtl", "start_0"}
    assert last["naive_mtl"]["gain"] is None
    run = ("run", done.run.name)
    for stage, record in last.items():
        labels = (run, ("stage", stage))
        assert endpoint.last["dmtg_epoch"][labels] == record["epoch"] == 3
        assert endpoint.last["dmtg_groups"][labels] == record["groups"]
        assert endpoint.last["dmtg_data_wait_ratio"][labels] == pytest.approx(record["data_share"])
        for task, loss in record["train_loss"].items():
            assert endpoint.last["dmtg_train_loss"][*labels, ("task", task)] == pytest.approx(loss)
    assert endpoint.last["dmtg_gain_percent"] == {
        (run, ("stage", "start_0")): pytest.approx(last["start_0"]["gain"])
    }
    assert last["start_0"]["groups"] == len(done.result["grouping"])
    assert records[0]["checkpoint_seconds"] > 0  # of the checkpoint in the middle of the epoch
