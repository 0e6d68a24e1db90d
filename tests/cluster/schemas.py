"""What the Kubernetes API would refuse: schemas of KubeRay's and core objects, with unknown fields refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jsonschema
import pytest
import yaml

from tests.paths import SHARED

CRDS = SHARED / "schemas" / "kuberay-1.7.0"
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"},
        "generateName": {"type": "string", "pattern": r"^[a-z0-9][-a-z0-9.]*$"},
        "namespace": {"type": "string"},
        "labels": STRINGS,
        "annotations": STRINGS,
    },
}


def closed(schema: Any) -> Any:
    """A copy of a CRD's schema that refuses every field it does not name, as strict validation in the API does.

    An object that names no fields has none, unless the schema says that it keeps unknown ones. The object's own
    metadata is Kubernetes' business, so that a CRD leaves it open: it gets its fields here.
    """
    found = _closed(schema)
    if "metadata" in found.get("properties", {}):
        found["properties"]["metadata"] = _closed(METADATA)
    return found


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return copy.deepcopy(schema)
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") is True
    # below `properties` the keys are names of fields, whatever they are called
    found = {
        key: {name: _closed(field) for name, field in value.items()} if key == "properties" else _closed(value)
        for key, value in schema.items()
    }
    if schema.get("type") == "object" and "additionalProperties" not in schema and not keeps:
        found["additionalProperties"] = False
    if schema.get("x-kubernetes-embedded-resource") is True:
        fields = found.setdefault("properties", {})
        fields |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": _closed(METADATA)}
    return found


@functools.cache
def ray_schema(kind: str) -> dict[str, Any]:
    """The closed schema of one of KubeRay's kinds."""
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip(f"KubeRay's schemas are not available: no {file.name} in {CRDS.name}")
    versions = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    made: dict[str, Any] = closed(schema)
    return made


def core_schema(kind: str) -> dict[str, Any]:
    """The closed schema of a core kind, as far as manifests use it; pods and peers are those of KubeRay."""
    cluster = ray_schema("RayCluster")["properties"]["spec"]["properties"]
    pod = cluster["headGroupSpec"]["properties"]["template"]
    peers = cluster["networkPolicy"]["properties"]["head"]["properties"]
    job = _object(
        {"backoffLimit": COUNT, "activeDeadlineSeconds": COUNT, "ttlSecondsAfterFinished": COUNT, "template": pod},
        "template",
    )
    specs = {
        "CronJob": _object(
            {
                "schedule": {"type": "string", "pattern": r"^(\S+ ){4}\S+$"},
                "timeZone": TEXT,
                "concurrencyPolicy": {"enum": ["Allow", "Forbid", "Replace"]},
                "startingDeadlineSeconds": COUNT,
                "successfulJobsHistoryLimit": COUNT,
                "failedJobsHistoryLimit": COUNT,
                "jobTemplate": _object({"spec": job}, "spec"),
            },
            "schedule", "jobTemplate",
        ),
        "Deployment": _object(
            {
                "replicas": COUNT,
                "strategy": _object({"type": {"enum": ["Recreate", "RollingUpdate"]}}),
                "selector": _object({"matchLabels": STRINGS}, "matchLabels"),
                "template": pod,
            },
            "selector", "template",
        ),
        "NetworkPolicy": _object(
            {
                "podSelector": _object({"matchLabels": STRINGS}),
                "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}, "minItems": 1},
                "ingress": peers["ingressRules"],
                "egress": peers["egressRules"],
            },
            "podSelector", "policyTypes",
        ),
        "Service": _object(
            {
                "selector": STRINGS,
                "ports": {
                    "type": "array",
                    "items": _object({"name": TEXT, "port": COUNT, "targetPort": {"type": ["string", "integer"]}}),
                },
            },
            "selector", "ports",
        ),
        "PersistentVolumeClaim": _object(
            {
                "accessModes": {"type": "array", "items": {"enum": ["ReadWriteOnce", "ReadWriteMany"]}},
                "resources": _object({"requests": _object({"storage": TEXT}, "storage")}, "requests"),
            },
            "accessModes", "resources",
        ),
    }  # fmt: skip
    others = {
        "ConfigMap": {"data": STRINGS},
        "ServiceAccount": {"automountServiceAccountToken": {"type": "boolean"}},
        "Namespace": {},
    }
    fields = {"spec": specs[kind]} if kind in specs else others[kind]
    schema = _object({"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, **fields}, "metadata", *fields)
    return closed(schema)  # type: ignore[no-any-return]


TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}


def _object(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required)}


def problems(found: dict[str, Any]) -> list[str]:
    """What is wrong with an object, each with its place; empty where nothing is."""
    ray = found["apiVersion"].startswith("ray.io/")
    schema = ray_schema(found["kind"]) if ray else core_schema(found["kind"])
    errors = jsonschema.Draft202012Validator(schema).iter_errors(found)
    return [f"{error.json_path}: {error.message}" for error in errors]
