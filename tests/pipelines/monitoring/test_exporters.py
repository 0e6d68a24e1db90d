"""Exporters of metrics: what they send, and what they refuse."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipelines.config.regroup_section import RegroupSection
from pipelines.config.sections import TrackSection
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.monitoring.names import EPOCH, GAIN, LOST_WORKERS, NIGHTLY, TRAINING
from pipelines.monitoring.opening import open_exporters
from pipelines.monitoring.prometheus import PrometheusEndpoint, leave
from pipelines.monitoring.values import run_values, step_values
from tests.paths import ROOT
from tests.pipelines.monitoring.endpoints import parsed, read
from tests.pipelines.s3_server import free_port

VALUES = {
    (EPOCH, ("first", "guided")): 3.0,
    (EPOCH, ('a "b"\nc', "guided")): 1.0,
    (GAIN, ("first", "guided")): -2.5,
}
FIRST = (("run", "first"), ("stage", "guided"))


def test_names_are_those_of_prometheus_and_unique() -> None:
    metrics = [*TRAINING, *NIGHTLY]
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert metric.name.startswith("dmtg_")
        assert metric.description.endswith(".")
        assert metric.name.endswith("_seconds") == (metric.unit == "s" and "per" not in metric.name)
        assert metric.name.endswith("_bytes") == (metric.unit == "By")
        assert metric.name.endswith("_percent") == (metric.unit == "%")


def test_an_endpoint_has_the_values_of_the_last_export() -> None:
    port = free_port()
    with open_exporters(TrackSection(metrics_port=port)) as (endpoint,):
        assert read(port) == {}
        endpoint.export(VALUES)
        endpoint.export(VALUES | {(EPOCH, ("first", "guided")): 4.0})
        found = read(port)
        assert found["dmtg_gain_percent"] == {FIRST: -2.5}
        assert found["dmtg_epoch"] == {FIRST: 4.0, (("run", 'a "b"\nc'), ("stage", "guided")): 1.0}
    with pytest.raises(OSError, match="refused"):
        read(port)


def test_no_exporter_is_open_by_default() -> None:
    with open_exporters(TrackSection()) as exporters:
        assert exporters == []


def test_a_port_in_use_is_refused() -> None:
    port = free_port()
    endpoint = PrometheusEndpoint(port)
    try:
        with pytest.raises(UserError, match="Address already in use") as caught:
            PrometheusEndpoint(port)
        assert caught.value.where == f"track.metrics_port={port} on 127.0.0.1"
        assert caught.value.wrong_use
    finally:
        endpoint.close()


def test_a_file_for_node_exporter_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "dmtg.prom"
    for epoch in (1.0, 2.0):
        leave({(EPOCH, ("first", "guided")): epoch}, str(file), {})
        assert parsed(file.read_text()) == {"dmtg_epoch": {FIRST: epoch}}
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match="No such file"):
        leave(VALUES, str(tmp_path / "missing" / "dmtg.prom"), {})


def test_a_pushgateway_gets_the_metrics_of_a_model() -> None:
    requests: list[tuple[str, str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.command, self.path, body.decode()))
            self.send_response(500 if len(requests) > 1 else 200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        place = f"http://127.0.0.1:{server.server_port}"
        try:
            leave(VALUES, place, {"model": "clothing"})
            with pytest.raises(OSError, match="500"):
                leave(VALUES, place, {"model": "clothing"})
        finally:
            server.shutdown()
            thread.join()
    command, path, body = requests[0]
    assert (command, path) == ("PUT", "/metrics/job/dmtg_regroup/model/clothing")
    assert parsed(body)["dmtg_gain_percent"] == {FIRST: -2.5}


@pytest.mark.parametrize("place", ["/var/lib/dmtg.txt", "pushgateway:9091", "ftp://host"])
def test_a_place_for_the_metrics_of_a_nightly_run_is_an_address_or_a_file(place: str) -> None:
    with pytest.raises(UserError, match=r"Pushgateway, or a file that ends in \.prom"):
        checked(RegroupSection, {"metrics": place})


SENDING = """
from pipelines.config.sections import TrackSection
from pipelines.monitoring.names import EPOCH, GPU_MEMORY
from pipelines.monitoring.opening import open_exporters

with open_exporters(TrackSection(opentelemetry=True)) as (exporter,):
    for epoch in (1.0, 2.0):
        exporter.export({(EPOCH, ("first", "guided")): epoch, (GPU_MEMORY, ("first",)): 0.0})
"""


def test_opentelemetry_sends_the_last_values_when_the_command_ends() -> None:
    environment = {**os.environ, "OTEL_METRICS_EXPORTER": "console", "OTEL_SERVICE_NAME": "night"}
    done = subprocess.run(
        [sys.executable, "-c", SENDING], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    (resource,) = json.loads(done.stdout)["resource_metrics"]
    assert resource["resource"]["attributes"]["service.name"] == "night"
    (scope,) = resource["scope_metrics"]
    found = {
        metric["name"]: (metric["unit"], point["attributes"], point["value"])
        for metric in scope["metrics"]
        for point in metric["data"]["data_points"]
    }
    assert found == {
        "dmtg_epoch": ("1", {"run": "first", "stage": "guided"}, 2.0),
        "dmtg_gpu_memory_bytes": ("By", {"run": "first"}, 0.0),
    }


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "pip install opentelemetry-exporter-otlp-proto-grpc, or set OTEL_METRICS_EXPORTER"),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "pip install opentelemetry-exporter-otlp-proto-http, or",
        ),
        (
            {"OTEL_METRICS_EXPORTER": "carbon"},
            "set OTEL_METRICS_EXPORTER to one of those that are installed: console",
        ),
    ],
)
def test_an_exporter_that_is_not_installed_is_named(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_METRICS_EXPORTER", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="there is no OpenTelemetry exporter") as caught:
        open_exporters(TrackSection(opentelemetry=True)).__enter__()
    assert caught.value.remedy.startswith(named)


RECORD = {
    "stage": "guided", "epoch": 2, "val_score": -1.5, "gate": {"entropy": 0.25}, "samples_per_second": 100.0,
    "data_share": 0.2, "train_loss": {"a": 1.0, "b": None}, "val": {"a": {"loss": 2.0}, "b": {"loss": 3.0}},
}  # fmt: skip


def test_values_are_those_of_the_last_epoch_of_each_stage() -> None:
    new = {"gain": 4.0, "groups": 2, "checkpoint_seconds": 0.5, "gpu_memory": 7}
    first = RECORD | {"stage": "naive_mtl", "val_score": None}
    events = [{"kind": kind} for kind in ("lost", "resumed", "lost")]
    found = run_values("r", [first, RECORD | {"epoch": 1}, RECORD | new], events)
    shown = {(metric.name, *labels): value for (metric, labels), value in found.items()}
    assert shown == {
        ("dmtg_epoch", "r", "naive_mtl"): 2, ("dmtg_epoch", "r", "guided"): 2,
        ("dmtg_validation_score", "r", "guided"): -1.5, ("dmtg_gain_percent", "r", "guided"): 4.0,
        ("dmtg_groups", "r", "guided"): 2, ("dmtg_checkpoint_seconds", "r"): 0.5,
        ("dmtg_gpu_memory_bytes", "r"): 7, ("dmtg_lost_workers", "r"): 2,
        **{
            (name, "r", stage, *task): value
            for stage in ("naive_mtl", "guided")
            for name, task, value in (
                ("dmtg_gate_entropy_ratio", (), 0.25), ("dmtg_samples_per_second", (), 100.0),
                ("dmtg_data_wait_ratio", (), 0.2), ("dmtg_train_loss", ("a",), 1.0),
                ("dmtg_validation_loss", ("a",), 2.0), ("dmtg_validation_loss", ("b",), 3.0),
            )
        },
    }  # fmt: skip


def test_a_run_without_epochs_has_lost_no_workers() -> None:
    assert run_values("r", [], []) == {(LOST_WORKERS, ("r",)): 0}


def test_parts_of_a_step_have_their_share_of_its_time() -> None:
    found = step_values("r", {"seconds_per_step": 0.5, "shares": {"forward": 0.2, "other": 0.8}})
    assert {(metric.name, *labels): value for (metric, labels), value in found.items()} == {
        ("dmtg_step_seconds", "r", "forward"): 0.1, ("dmtg_step_seconds", "r", "other"): 0.4,
    }  # fmt: skip
