"""The Kubernetes objects that the overlays in cluster/kuberay render to, and what they hold."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.cluster.kustomize import Build
from tests.paths import ROOT

KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted((KUBERAY / "overlays").iterdir())
MOUNTED = "/etc/dmtg"


@dataclass(frozen=True)
class Object:
    """One object of an overlay."""

    overlay: str
    value: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.value["kind"])

    @property
    def name(self) -> str:
        return str(self.value["metadata"]["name"])

    def __str__(self) -> str:
        return f"{self.overlay}:{self.kind}:{self.name}"


@functools.cache
def objects() -> tuple[Object, ...]:
    """All objects of all overlays."""
    return tuple(Object(folder.name, value) for folder in OVERLAYS for value in Build(folder).objects)


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
