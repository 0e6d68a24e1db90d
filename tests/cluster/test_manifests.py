"""The Kubernetes manifests: against KubeRay's schemas, and for what no schema says."""

from __future__ import annotations

import copy
import importlib
import json
import re
from importlib.metadata import version
from typing import Any

import pytest
import yaml

from pipelines.config.ray_section import RaySection
from pipelines.execution.resources import missing_resources
from tests.cluster.manifests import MOUNTED, Object, config_files, inside, objects, pods
from tests.cluster.schemas import closed, problems
from tests.paths import ROOT

OBJECTS = objects()
RAY = [one for one in OBJECTS if one.value["apiVersion"] == "ray.io/v1"]
JOBS = [one for one in RAY if one.kind in ("RayJob", "RayCronJob")]
README = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")


def cluster(one: Object) -> dict[str, Any]:
    """The specification of the cluster within one of KubeRay's objects."""
    spec = one.value["spec"]
    spec = spec.get("jobTemplate", spec)
    found: dict[str, Any] = spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec))
    return found


def copied(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = [one.value for one in OBJECTS if one.overlay == overlay and one.kind == kind]
    return copy.deepcopy(found)


@pytest.mark.parametrize("one", OBJECTS, ids=str)
def test_the_api_would_take_it(one: Object) -> None:
    assert problems(one.value) == []


def test_every_kind_that_was_promised_is_there() -> None:
    kinds = {(one.kind, one.overlay) for one in OBJECTS}
    assert kinds >= {
        (kind, "cluster") for kind in ("RayCluster", "CronJob", "NetworkPolicy", "Deployment", "ConfigMap")
    }
    # an overlay of a job starts that job and touches nothing else
    assert [str(one) for one in OBJECTS if one.overlay != "cluster"] == [
        "nightly:RayCronJob:dmtg-regroup",
        "serve:RayService:dmtg",
        "sweep:RayJob:dmtg-sweep",
        "train:RayJob:dmtg-train",
    ]


@pytest.mark.parametrize("one", JOBS, ids=str)
def test_the_cluster_of_a_job_has_the_pods_of_the_standing_one(one: Object) -> None:
    standing, own = copied("cluster", "RayCluster")["spec"], copy.deepcopy(cluster(one))
    (gpu,) = [group for group in standing["workerGroupSpecs"] if group["groupName"] == "gpu"]
    (workers,) = own.pop("workerGroupSpecs")
    assert workers["template"] == gpu["template"]
    assert workers["minReplicas"] == 1
    assert own == {key: value for key, value in standing.items() if key != "workerGroupSpecs"}


@pytest.mark.parametrize(
    ("kind", "overlay", "spoil", "named"),
    [
        ("RayCluster", "cluster", lambda s: s["workerGroupSpecs"][1].update(maxReplica=3), "maxReplica"),
        ("RayCluster", "cluster", lambda s: s["workerGroupSpecs"][0].pop("groupName"), "groupName"),
        ("RayCluster", "cluster", lambda s: s.update(enableInTreeAutoscaling="yes"), "yes"),
        ("RayCluster", "cluster", lambda s: s["autoscalerOptions"].update(version="v3"), "v3"),
        ("RayCluster", "cluster", lambda s: s["authOptions"].update(mode="tokens"), "tokens"),
        ("RayCluster", "cluster",
         lambda s: s["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagePullPolice="Always"),
         "imagePullPolice"),
        ("RayCluster", "cluster",
         lambda s: s["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"].update(cpu=[4]),
         "cpu"),
        ("RayJob", "train", lambda s: s.update(ttlSecondAfterFinished=3), "ttlSecondAfterFinished"),
        ("RayJob", "train", lambda s: s.update(backoffLimit="3"), "backoffLimit"),
        ("RayJob", "train", lambda s: s["rayClusterSpec"].pop("headGroupSpec"), "headGroupSpec"),
        ("RayCronJob", "nightly", lambda s: s.update(concurrencyPolicy="Forbid"),
         "concurrencyPolicy"),
        ("RayCronJob", "nightly", lambda s: s.pop("schedule"), "schedule"),
        ("RayService", "serve", lambda s: s.update(serveConfig="applications: []"), "serveConfig"),
        ("RayService", "serve", lambda s: s.pop("rayClusterConfig"), "rayClusterConfig"),
        ("CronJob", "cluster", lambda s: s.update(concurencyPolicy="Forbid"), "concurencyPolicy"),
        ("CronJob", "cluster", lambda s: s["jobTemplate"]["spec"].pop("template"), "template"),
        ("CronJob", "cluster",
         lambda s: s["jobTemplate"]["spec"]["template"]["spec"].update(restartPolcy="Never"), "restartPolcy"),
        ("Deployment", "cluster", lambda s: s.update(replicas="1"), "replicas"),
    ],
)  # fmt: skip
def test_a_typo_a_missing_field_and_a_wrong_type_are_caught(
    kind: str, overlay: str, spoil: Any, named: str
) -> None:
    value = copied(overlay, kind)
    assert problems(value) == []
    spoil(value["spec"])
    found = problems(value)
    assert len(found) == 1
    assert named in found[0]


def test_a_wrong_field_of_the_metadata_is_caught() -> None:
    value = copied("cluster", "RayCluster")
    value["metadata"]["label"] = {}
    value["metadta"] = {}
    assert [any(word in text for text in problems(value)) for word in ("label", "metadta")] == [True, True]


def test_unknown_fields_stay_where_a_schema_says_that_it_keeps_them() -> None:
    import jsonschema

    schema = closed(
        {
            "type": "object",
            "properties": {
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "shut": {"type": "object", "properties": {"type": {"type": "string"}}},
                "any": {"type": "object", "additionalProperties": {"type": "string"}},
                "empty": {"type": "object"},
                "pod": {"type": "object", "x-kubernetes-embedded-resource": True},
            },
        }
    )
    whole = {"open": {"a": {"b": 1}}, "shut": {"type": "x"}, "any": {"a": "b"}, "empty": {},
             "pod": {"kind": "Pod", "metadata": {"name": "x"}}}  # fmt: skip
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(whole)
    for name, wrong in (("shut", {"a": 1}), ("any", {"a": 1}), ("empty", {"a": 1}), ("pod", {"a": 1})):
        assert not validator.is_valid(whole | {name: wrong}), name


@pytest.mark.parametrize("one", RAY, ids=str)
def test_clusters_take_only_those_who_know_the_token(one: Object) -> None:
    spec = cluster(one)
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"] == {"mode": "token", "secretName": "dmtg-ray-token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("one", JOBS, ids=str)
def test_jobs_end_leave_nothing_behind_and_are_tried_again(one: Object) -> None:
    spec = one.value["spec"]
    spec = spec.get("jobTemplate", spec)
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["backoffLimit"] >= 1


@pytest.mark.parametrize("one", JOBS, ids=str)
def test_the_smallest_cluster_of_a_job_has_room_for_its_fewest_workers(one: Object) -> None:
    words = dict(re.findall(r"ray\.(\w+)=(\S+)", json.dumps(one.value)))
    held = yaml.safe_load(config_files()["ray_config.yaml"]) | {k: yaml.safe_load(v) for k, v in words.items()}
    section = RaySection(**held)
    resources = {"CPU": 0.0, "GPU": 0.0}
    most = dict(resources)
    for group in cluster(one)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for name, key in (("CPU", "cpu"), ("GPU", "nvidia.com/gpu")):
            resources[name] += group["minReplicas"] * float(limits.get(key, 0))
            most[name] += group["maxReplicas"] * float(limits.get(key, 0))
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert missing_resources(section, resources) == ""
    assert most["GPU"] >= section.most * section.gpus_per_worker


def test_the_service_has_an_application_that_ray_serve_can_build() -> None:
    from ray.serve.schema import ServeDeploySchema

    from pipelines.config.validation import checked
    from pipelines.serving.ray_serve import ServeOptions

    service = copied("serve", "RayService")["spec"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = schema.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    options = checked(ServeOptions, application.args)
    assert options.ray_config == f"{MOUNTED}/ray_config.yaml", "MLflow is that of this file"
    standing = copied("cluster", "RayCluster")["spec"]
    assert service["rayClusterConfig"] == standing
    (group,) = [one for one in standing["workerGroupSpecs"] if one["groupName"] == "cpu"]
    (container,) = group["template"]["spec"]["containers"]
    most = group["maxReplicas"] * (float(container["resources"]["limits"]["cpu"]) // options.cpus)
    assert options.replicas <= most
    (head,) = standing["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": schema.http_options.port} in head["ports"]


def test_two_nightly_runs_never_overlap_where_the_scheduler_can_prevent_it() -> None:
    spec = copied("cluster", "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600
    (regroup,) = [one for one in OBJECTS if one.kind == "RayCronJob"]
    assert "--wait" in regroup.value["spec"]["jobTemplate"]["entrypoint"], "there the command itself waits"


def test_there_are_no_credentials_in_the_tree_and_every_secret_is_explained() -> None:
    assert not [one for one in OBJECTS if one.kind == "Secret"]
    named = set()
    for one in OBJECTS:
        for part in inside(one.value):
            named |= {part[k]["name"] for k in ("secretRef", "secretKeyRef") if k in part}
            if re.search("KEY|SECRET|TOKEN|PASSWORD", str(part.get("name", ""))):
                assert "value" not in part, part
    assert named == {"dmtg-storage", "dmtg-ray-token"}
    for name in named:
        assert f"create secret generic {name}" in README


def test_pods_run_without_rights() -> None:
    found = [(one, pod["spec"]) for one in OBJECTS for pod in pods(one.value)]
    assert len(found) >= 12
    for one, spec in found:
        assert spec["securityContext"]["runAsNonRoot"] is True, one
        head = any(container["name"] == "ray-head" for container in spec["containers"])
        # the head's account is the one that KubeRay makes for the autoscaler
        assert head or spec["automountServiceAccountToken"] is False, one
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            }, one  # fmt: skip


def test_pods_find_what_they_name() -> None:
    accounts = {one.name for one in OBJECTS if one.kind == "ServiceAccount"}
    maps = {one.name for one in OBJECTS if one.kind == "ConfigMap"}
    claims = {one.name for one in OBJECTS if one.kind == "PersistentVolumeClaim"}
    images = set()
    for one in OBJECTS:
        assert one.kind == "Namespace" or one.value["metadata"]["namespace"] == "dmtg", one
        for pod in pods(one.value):
            spec = pod["spec"]
            volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
            assert spec.get("serviceAccountName", "dmtg") in accounts
            for volume in volumes.values():
                assert volume.get("configMap", {}).get("name", "dmtg-config") in maps
                assert volume.get("persistentVolumeClaim", {}).get("claimName", "mlflow") in claims
            for container in spec["containers"]:
                images.add(container["image"])
                assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes), one
                held = container["resources"]
                for name, limit in held["limits"].items():
                    assert held["requests"][name] == limit or name in ("cpu", "memory"), one
    assert images == {f"dmtg:{version('dmtg')}"}
    places = [m["mountPath"] for one in RAY for part in inside(one.value) for m in part.get("volumeMounts", [])]
    assert set(places) == {MOUNTED}


def test_mlflow_answers_to_the_name_that_runs_use_and_to_no_other() -> None:
    uri = yaml.safe_load(config_files()["ray_config.yaml"])["tracking_uri"]
    (container,) = pods(copied("cluster", "Deployment"))[0]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    allowed = environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert uri.removeprefix("http://") in allowed
    assert not [host for host in allowed if "*" in host]
    service = copied("cluster", "Service")["spec"]
    labels = pods(copied("cluster", "Deployment"))[0]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert {port["targetPort"] for port in service["ports"]} == {port["name"] for port in container["ports"]}


def test_policies_speak_of_labels_that_pods_have() -> None:
    # what KubeRay's operator and its pods carry
    known = [{"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"},
             {"app.kubernetes.io/name": "kuberay-operator"}]  # fmt: skip
    known += [pod["metadata"]["labels"] for one in OBJECTS for pod in pods(one.value)]
    policies = [one for one in OBJECTS if one.kind == "NetworkPolicy"]
    for policy in policies:
        for part in inside(policy.value["spec"]):
            wanted = part.get("podSelector", {}).get("matchLabels", {})
            assert any(wanted.items() <= labels.items() for labels in known), (policy, wanted)


def test_only_ray_nodes_reach_all_ports_and_only_submitters_and_the_operator_the_dashboard() -> None:
    policies = {one.name: one.value["spec"] for one in OBJECTS if one.kind == "NetworkPolicy"}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    every_port = [
        (name, rule["from"]) for name, spec in policies.items() for rule in spec.get("ingress", [])
        if "ports" not in rule
    ]  # fmt: skip
    nodes = {"podSelector": {"matchLabels": {"ray.io/is-ray-node": "yes"}}}
    assert every_port == [("ray-nodes", [nodes])]
    (rule,) = policies["ray-head"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert [sorted(peer) for peer in rule["from"]] == [
        ["podSelector"], ["namespaceSelector", "podSelector"], ["namespaceSelector"]
    ]  # fmt: skip
