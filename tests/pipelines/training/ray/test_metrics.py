"""Metrics of a run on Ray: the endpoint of a node has every name that the dashboard reads."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray

from pipelines.monitoring.names import TRAINING
from pipelines.training.driver import train
from pipelines.training.profiling import profile
from tests.pipelines.driver import OFTEN, Undisturbed, disturbed
from tests.pipelines.monitoring.endpoints import reading

pytestmark = [pytest.mark.ray, pytest.mark.soak]
TRIES = 60  # of half a second: Ray sends its metrics to the endpoint every 10 s


def test_the_endpoint_of_ray_has_every_metric_that_the_dashboard_reads(run: Undisturbed, tmp_path: Path) -> None:
    (node,) = ray.nodes()
    # a low rate, so that naive MTL has an error on every task: there is no gain over an error of 0
    values = disturbed(run, tmp_path, train={**OFTEN, "epochs": 3, "learning_rate": 1e-4}).values
    config = type(run[0]).model_validate(values)
    profile(config, lambda _: None)
    expected = {f"ray_{metric.name}" for metric in TRAINING}
    with reading(node["MetricsExportPort"]) as endpoint:
        done = train(config)
        for _ in range(TRIES):
            if expected <= endpoint.names:
                break
            time.sleep(0.5)
    assert expected <= endpoint.names
    found = endpoint.last["ray_dmtg_gain_percent"]
    assert {dict(labels)["run"] for labels in found} == {done.run.name}
    assert {dict(labels)["stage"] for labels in found} == {"start_0"}
