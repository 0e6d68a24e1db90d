"""The Kubernetes objects in cluster/kuberay, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tests.paths import ROOT

KUBERAY = ROOT / "cluster" / "kuberay"
MOUNTED = "/etc/dmtg"


@dataclass(frozen=True)
class Object:
    """One object of a manifest."""

    file: str
    value: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.value["kind"])

    @property
    def name(self) -> str:
        metadata = self.value["metadata"]
        return str(metadata.get("name") or metadata["generateName"])

    def __str__(self) -> str:
        return f"{self.file}:{self.kind}:{self.name}"


def objects() -> list[Object]:
    """All objects; kustomization.yaml is none."""
    return [
        Object(file.name, value)
        for file in sorted(KUBERAY.glob("*.yaml"))
        for value in yaml.safe_load_all(file.read_text(encoding="utf-8"))
        if value["kind"] != "Kustomization"
    ]


def inside(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping within a value, itself first."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from inside(part)


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod template within an object."""
    return [part for part in inside(value) if isinstance(part.get("spec"), dict) and "containers" in part["spec"]]


def config_files() -> dict[str, str]:
    """The files that the pods find in MOUNTED."""
    (found,) = [one.value["data"] for one in objects() if one.kind == "ConfigMap"]
    return dict(found)
