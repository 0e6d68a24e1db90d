"""The network policies do what the table of cluster/README.md says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.cluster.kustomize import Build
from tests.cluster.manifests import KUBERAY, objects, pods
from tests.cluster.network import Endpoint, allowed
from tests.cluster.schemas import problems
from tests.paths import ROOT

README = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
POLICIES = [one.value for one in objects() if one.kind == "NetworkPolicy"]
OPTIONS = {folder.name: Build(folder).objects for folder in sorted((KUBERAY / "options").iterdir())}


def labels(kind: str) -> dict[str, str]:
    """Labels of the pods of the cluster's only object of a kind."""
    (found,) = [one.value for one in objects() if one.overlay == "cluster" and one.kind == kind]
    (pod,) = pods(found)
    return dict(pod["metadata"]["labels"])


NODE = {"ray.io/is-ray-node": "yes"}  # KubeRay's
HEAD = Endpoint({**NODE, "ray.io/node-type": "head"})
WORKER = Endpoint({**NODE, "ray.io/node-type": "worker"})
SUBMITTER, MLFLOW = Endpoint(labels("CronJob")), Endpoint(labels("Deployment"))
PLACES = {
    "Ray pod": [HEAD, WORKER],
    "Ray head": [HEAD],
    "Ray worker": [WORKER],
    "MLflow": [MLFLOW],
    "pod that submits a job": [SUBMITTER],
    "KubeRay's operator": [Endpoint({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system")],
    "pod in a namespace with `dmtg-submit=allowed`": [Endpoint({}, "pipelines", {"dmtg-submit": "allowed"})],
    "pod in a namespace with `dmtg-mlflow=allowed`": [Endpoint({}, "pipelines", {"dmtg-mlflow": "allowed"})],
    # a label of ours on a pod of another namespace opens nothing
    "pod in a namespace with `dmtg-serve=allowed`": [Endpoint({}, "gateway", {"dmtg-serve": "allowed"})],
    "pod in another namespace": [
        Endpoint({}, "other"),
        Endpoint(SUBMITTER.labels, "other"),
        Endpoint(NODE, "other"),
    ],
    "any other pod of the namespace": [Endpoint({"app": "other"})],
    "Prometheus in `monitoring`": [Endpoint({"app": "prometheus"}, "monitoring")],
    "storage and webhooks": [Endpoint(address="52.216.1.1")],
    "Kubernetes API": [Endpoint(address="10.0.0.1")],
    "DNS of the cluster": [Endpoint({"k8s-app": "kube-dns"}, "kube-system")],
}


def places(text: str) -> list[Endpoint]:
    """The endpoints that a cell of the table names."""
    address = re.search(r"\(([0-9.]+)\)", text)
    if address:
        return [Endpoint(address=address[1])]
    return [place for name in re.split(r", (?=[A-Zp])", text) for place in PLACES[name]]


def rows() -> list[tuple[str, str, str, str]]:
    section = README.split("### Who reaches whom")[1]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    found: list[Any] = [tuple(cells) for cells in lines[2:]]
    return found


@pytest.mark.parametrize("row", rows(), ids=" ".join)
def test_the_policies_allow_what_the_table_says(row: tuple[str, str, str, str]) -> None:
    source, target, ports, how = row
    for one in places(source):
        for other in places(target):
            for port in map(int, ports.split(", ")):
                assert allowed(POLICIES, one, other, port) is (how == "yes"), (one, other, port)
                if how.startswith("with"):
                    option = OPTIONS[how.removeprefix("with ").strip("`")]
                    assert allowed([*POLICIES, *option], one, other, port)


def test_the_table_names_every_rule_and_option() -> None:
    assert len(rows()) > 20
    assert {row[3] for row in rows()} == {"yes", "no", *(f"with `{name}`" for name in OPTIONS)}
    for number, policy in enumerate(POLICIES):  # without any of them the table is wrong
        left = [one for n, one in enumerate(POLICIES) if n != number]
        assert [
            row for row in rows() if row[3] in ("yes", "no")
            and any(
                allowed(left, one, other, int(port)) is not (row[3] == "yes")
                for one in places(row[0]) for other in places(row[1]) for port in row[2].split(", ")
            )
        ], policy["metadata"]["name"]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_policies_that_the_api_would_take(name: str) -> None:
    (policy,) = OPTIONS[name]
    assert policy["kind"] == "NetworkPolicy"
    assert problems(policy) == []
    assert f"cluster/kuberay/options/{name}`" in (KUBERAY / "options" / name / "networkpolicy.yaml").read_text()
