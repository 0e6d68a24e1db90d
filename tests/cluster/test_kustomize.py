"""How the overlays are rendered: as the real program does, and from one specification of the cluster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kustomize import LOCAL, Build, real_build, real_command
from tests.cluster.manifests import KUBERAY, OVERLAYS

needs_kustomize = pytest.mark.skipif(not real_command(), reason="neither kustomize nor kubectl is installed")
OBJECT = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "a"},
    "spec": {"entrypoint": "x", "groups": [{"name": "g"}]},
}


def by_name(objects: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(one["kind"], one["metadata"]["name"]): one for one in objects}
    assert len(found) == len(objects)
    return found


@pytest.fixture
def with_another_image(tmp_path: Path) -> Path:
    """A copy of the manifests, as README.md says that the image is set."""
    folder = tmp_path / "kuberay"
    shutil.copytree(KUBERAY, folder)
    file = folder / "base" / "image" / "kustomization.yaml"
    held = yaml.safe_load(file.read_text(encoding="utf-8"))
    held["images"] = [{"name": "dmtg", "newName": "registry.example.org:5000/team/dmtg", "newTag": "2.0"}]
    file.write_text(yaml.safe_dump(held), encoding="utf-8")
    return folder


@needs_kustomize
@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_the_real_program_renders_the_same(folder: Path) -> None:
    assert by_name(real_build(folder)) == by_name(Build(folder).objects)


@pytest.mark.parametrize("name", [folder.name for folder in OVERLAYS])
def test_the_image_is_set_in_one_file(name: str, with_another_image: Path) -> None:
    folder = with_another_image / "overlays" / name
    objects = Build(folder).objects
    text = json.dumps(objects)
    assert text.count('"image": "registry.example.org:5000/team/dmtg:2.0"') == text.count('"image": ') >= 3
    if real_command():
        assert by_name(real_build(folder)) == by_name(objects)


def test_every_file_is_used() -> None:
    used = set().union(*(Build(folder).files for folder in (*OVERLAYS, *(KUBERAY / "options").iterdir())))
    assert used == {file.resolve() for file in KUBERAY.rglob("*") if file.is_file()}


@pytest.mark.parametrize("field", ["headGroupSpec", "rayVersion", "autoscalerOptions", "submitterPodTemplate"])
def test_the_specification_of_the_cluster_is_written_once(field: str) -> None:
    files = [file for file in KUBERAY.rglob("*.yaml") if f"{field}:" in file.read_text(encoding="utf-8")]
    assert len(files) == 1


def write(folder: Path, kustomization: dict[str, Any], **more: Any) -> Path:
    """A kustomization of one object; `more` are fields of the object."""
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": ["a.yaml"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(head | kustomization), encoding="utf-8")
    (folder / "a.yaml").write_text(yaml.safe_dump(OBJECT | more), encoding="utf-8")
    return folder


def patched(*operations: dict[str, Any], kind: str = "RayJob") -> dict[str, Any]:
    return {"patches": [{"target": {"kind": kind}, "patch": json.dumps(operations)}]}


@pytest.mark.parametrize(
    ("kustomization", "more", "named"),
    [
        (patched({"op": "test", "path": "/spec/groups/0/name", "value": "h"}), {}, "is 'g', not 'h'"),
        (patched({"op": "remove", "path": "/spec/groups/1"}), {}, "nothing is at /spec/groups/1"),
        ({}, {"metadata": {"generateName": "a-"}}, "needs metadata.name"),
        ({"resources": ["a.yaml", "a.yaml"]}, {}, "same kind and name"),
    ],
)
def test_what_kustomize_refuses_is_refused(tmp_path: Path, kustomization: Any, more: Any, named: str) -> None:
    folder = write(tmp_path, kustomization, **more)
    with pytest.raises(ValueError, match=named):
        Build(folder)
    if real_command():
        with pytest.raises(ValueError, match=r"\w"):
            real_build(folder)


@pytest.mark.parametrize(
    ("kustomization", "named"),
    [
        ({"namePrefix": "x-"}, "namePrefix"),
        (patched({"op": "copy", "from": "/spec", "path": "/status"}), "copy"),
        (patched({"op": "replace", "path": "/spec/entry", "value": "y"}), "nothing is at /spec/entry"),
        (patched({"op": "remove", "path": "/spec"}, kind="RayJobs"), "no object matches"),
        ({"patches": [{"target": {"kind": "RayJob"}, "patch": "spec: {groups: []}"}]}, "merge of groups"),
        ({"patches": [{"target": {"kind": "RayJob"}, "patch": "$patch: delete"}]}, "merge of "),
        ({"images": [{"name": "a", "digest": "sha256:1"}]}, "digest"),
    ],
)
def test_what_is_not_supported_is_refused_and_not_passed_over(
    tmp_path: Path, kustomization: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Build(write(tmp_path, kustomization))


def test_local_objects_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, {}, metadata={"name": "a", "annotations": {LOCAL: "true"}})
    assert Build(folder).objects == []
