"""cluster/monitoring/: its manifests, and the names of metrics that dashboard and alerts read."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from pipelines.monitoring.names import NIGHTLY, TRAINING
from tests.cluster.kustomize import Build
from tests.cluster.manifests import objects
from tests.cluster.schemas import problems
from tests.paths import ROOT

FOLDER = ROOT / "cluster" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
OBJECTS = Build(FOLDER).objects
LABELS = {metric.name: {*metric.labels} for metric in (*TRAINING, *NIGHTLY)}
ANY = r"\(ray_\)\?"  # Ray's endpoint has the prefix, that of an embedded run has not


def names(expression: str) -> set[str]:
    """The metrics of DMTG in an expression, without the prefix of Ray."""
    return set(re.findall(r"dmtg_\w+", expression))


def expressions() -> list[tuple[str, str]]:
    """Title and expression of every panel and every alert."""
    panels = [(panel["title"], one["expr"]) for panel in DASHBOARD["panels"] for one in panel.get("targets", ())]
    return [*panels, *((rule["alert"], rule["expr"]) for rule in rules())]


def rules() -> list[dict[str, Any]]:
    (found,) = [one for one in OBJECTS if one["kind"] == "PrometheusRule"]
    return [rule for group in found["spec"]["groups"] for rule in group["rules"]]


def dashboard_names() -> set[str]:
    """The metrics that the dashboard reads."""
    return names(json.dumps([panel.get("targets") for panel in DASHBOARD["panels"]]))


def test_the_dashboard_reads_every_metric_that_is_emitted_and_no_other() -> None:
    assert dashboard_names() == set(LABELS)
    variables = {one["name"]: one.get("definition", "") for one in DASHBOARD["templating"]["list"]}
    assert names(variables["run"] + variables["model"]) <= set(LABELS)


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_an_expression_reads_metrics_and_labels_that_are_emitted(title: str, expression: str) -> None:
    found = names(expression)
    assert found
    assert found <= set(LABELS)
    for name in found & {metric.name for metric in TRAINING}:
        assert re.search(rf'__name__=~"{ANY}{name}"', expression), "with and without the prefix of Ray"
    for label in re.findall(r"(\w+)=~?\"", expression):
        assert label == "__name__" or all(label in LABELS[name] for name in found)


def test_the_legend_of_a_panel_has_labels_of_its_metric() -> None:
    for panel in DASHBOARD["panels"]:
        for one in panel.get("targets", ()):
            used = set(re.findall(r"\{\{(\w+)\}\}", one["legendFormat"]))
            assert all(used <= LABELS[name] for name in names(one["expr"])), panel["title"]


def test_there_is_an_alert_for_each_failure_that_needs_one() -> None:
    found = {rule["alert"]: names(rule["expr"]) for rule in rules()}
    assert found == {
        "DmtgNightlyRunMissing": {"dmtg_nightly_finished_timestamp_seconds"},
        "DmtgNightlyRunNeverFinished": {"dmtg_nightly_finished_timestamp_seconds"},
        "DmtgChampionOld": {"dmtg_champion_timestamp_seconds"},
        "DmtgChampionKept": {"dmtg_nightly_kept_runs"},
        "DmtgWaitingForData": {"dmtg_data_wait_ratio"},
    }
    for rule in rules():
        shown = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        assert all(label in LABELS[name] for label in shown for name in found[rule["alert"]])


@pytest.mark.parametrize("one", OBJECTS, ids=lambda one: f"{one['kind']}:{one['metadata']['name']}")
def test_the_api_would_take_it(one: dict[str, Any]) -> None:
    if not one["apiVersion"].startswith("monitoring.coreos.com/"):
        assert problems(one) == []
    assert one["metadata"]["namespace"] == "dmtg"


def test_prometheus_finds_the_pods_and_may_read_their_ports() -> None:
    monitors = {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "PodMonitor"}
    assert monitors["dmtg-ray"]["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    assert [one["port"] for one in monitors["dmtg-ray"]["podMetricsEndpoints"]] == ["metrics"]
    (gateway,) = [one for one in OBJECTS if one["kind"] == "Deployment"]
    labels = gateway["spec"]["template"]["metadata"]["labels"]
    assert monitors["dmtg-pushgateway"]["selector"]["matchLabels"].items() <= labels.items()
    (port,) = gateway["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert [one["port"] for one in monitors["dmtg-pushgateway"]["podMetricsEndpoints"]] == [port["name"]]
    head = next(one.value for one in objects() if one.kind == "RayCluster")["spec"]["headGroupSpec"]["template"]
    ports = {one["name"]: one["containerPort"] for one in head["spec"]["containers"][0]["ports"]}
    policies = {one.name: one.value["spec"] for one in objects() if one.kind == "NetworkPolicy"}
    policies |= {one["metadata"]["name"]: one["spec"] for one in OBJECTS if one["kind"] == "NetworkPolicy"}
    for policy, number in (("ray-nodes", ports["metrics"]), ("pushgateway", port["containerPort"])):
        assert [
            rule["ports"]
            for rule in policies[policy]["ingress"]
            if any("monitoring" in json.dumps(peer) for peer in rule["from"])
        ] == [[{"protocol": "TCP", "port": number}]]


def test_the_address_in_the_comment_is_that_of_the_service() -> None:
    text = (FOLDER / "pushgateway.yaml").read_text(encoding="utf-8")
    (service,) = [one for one in yaml.safe_load_all(text) if one["kind"] == "Service"]
    port = service["spec"]["ports"][0]["port"]
    assert f"http://{service['metadata']['name']}.dmtg.svc.cluster.local:{port} " in text
