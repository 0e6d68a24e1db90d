"""`kustomize build` for the features that cluster/kuberay uses; every other feature is refused.

The manifests can thus be tested where neither kustomize nor kubectl is installed. test_kustomize.py compares the
output with that of the real program where one is.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

LOCAL = "config.kubernetes.io/local-config"
# in the order in which kustomize applies them
FIELDS = ("resources", "components", "patches", "images", "replacements")


class Build:
    """Objects of a kustomization, and the files that were read for them.

    Raises:
        ValueError: For a feature that is not supported here, and where kustomize fails as well.
    """

    def __init__(self, folder: Path) -> None:
        self.files: set[Path] = set()
        self.objects = self._accumulated(folder)
        self.objects = [one for one in self.objects if _annotations(one).get(LOCAL) != "true"]

    def _read(self, file: Path) -> str:
        self.files.add(file.resolve())
        return file.read_text(encoding="utf-8")

    def _accumulated(self, folder: Path) -> list[dict[str, Any]]:
        held = self._kustomization(folder, "Kustomization")
        objects: list[dict[str, Any]] = []
        for resource in held.get("resources", []):
            place = folder / resource
            objects += self._accumulated(place) if place.is_dir() else _loaded(self._read(place))
        self._transform(folder, held, objects)
        names = [(one["apiVersion"], one["kind"], one["metadata"]["name"]) for one in objects]
        if len(set(names)) < len(names):
            raise ValueError(f"{folder}: two objects have the same kind and name")
        return objects

    def _kustomization(self, folder: Path, kind: str) -> dict[str, Any]:
        held: dict[str, Any] = yaml.safe_load(self._read(folder / "kustomization.yaml"))
        if held["kind"] != kind:
            raise ValueError(f"{folder}: {held['kind']} in place of {kind}")
        _only(held, "apiVersion", "kind", *FIELDS)
        return held

    def _transform(self, folder: Path, held: dict[str, Any], objects: list[dict[str, Any]]) -> None:
        for name in held.get("components", []):
            component = self._kustomization(folder / name, "Component")
            _only(component, "apiVersion", "kind", "patches", "images", "replacements")
            self._transform(folder / name, component, objects)
        for patch in held.get("patches", []):
            _only(patch, "path", "patch", "target", "options")
            content = yaml.safe_load(self._read(folder / patch["path"]) if "path" in patch else patch["patch"])
            for one in _selected(objects, patch["target"]):
                if isinstance(content, list):
                    _json_patch(one, content)
                else:
                    _merge_patch(one, content, patch.get("options", {}))
        for image in held.get("images", []):
            _set_image(objects, image)
        for replacement in held.get("replacements", []):
            _replace(objects, replacement)


def _only(value: dict[str, Any], *known: str) -> None:
    if value.keys() - set(known):
        raise ValueError(f"not supported: {', '.join(sorted(value.keys() - set(known)))}")


def _loaded(text: str) -> list[dict[str, Any]]:
    # YAML's anchors make one value appear in several places: copies can be patched one by one
    objects = [_unshared(one) for one in yaml.safe_load_all(text)]
    for one in objects:
        if not one["metadata"].get("name"):
            raise ValueError(f"{one['kind']}: kustomize needs metadata.name")
    return objects


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _annotations(one: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = one["metadata"].get("annotations", {})
    return found


def _selected(objects: list[dict[str, Any]], target: dict[str, str]) -> list[dict[str, Any]]:
    """The objects of a kind, and of a name where one is given; kustomize itself accepts that there are none."""
    _only(target, "kind", "name")
    found = [
        one
        for one in objects
        if one["kind"] == target["kind"] and target.get("name", one["metadata"]["name"]) == one["metadata"]["name"]
    ]
    if not found:
        raise ValueError(f"no object matches {target}")
    return found


def _merge_patch(one: dict[str, Any], patch: dict[str, Any], options: dict[str, Any]) -> None:
    """A strategic merge; mappings only, which kustomize merges in the same way for all kinds."""
    _only(options, "allowNameChange")
    name = one["metadata"]["name"]
    _merge(one, patch)
    if not options.get("allowNameChange"):
        one["metadata"]["name"] = name


def _merge(value: dict[str, Any], patch: dict[str, Any]) -> None:
    for key, part in patch.items():
        if part is None or isinstance(part, list) or key.startswith("$"):
            raise ValueError(f"a merge of {key} is not supported: patch it with JSON operations")
        if isinstance(part, dict):
            _merge(value.setdefault(key, {}), part)
        else:
            value[key] = part


def _json_patch(one: dict[str, Any], operations: list[dict[str, Any]]) -> None:
    for operation in operations:
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
        holder: Any = one
        for part in parents:
            holder = holder[int(part) if isinstance(holder, list) else part]
        key = int(last) if isinstance(holder, list) else last
        op, value = operation["op"], copy.deepcopy(operation.get("value"))
        if op not in ("add", "remove", "replace", "test") or (op == "add" and isinstance(holder, list)):
            raise ValueError(f"not supported: {operation}")
        if op != "add" and (key not in holder if isinstance(holder, dict) else key >= len(holder)):
            raise ValueError(f"nothing is at {operation['path']}")
        if op == "test" and holder[key] != value:
            raise ValueError(f"{operation['path']} is {holder[key]!r}, not {value!r}")
        if op == "remove":
            del holder[key]
        else:
            holder[key] = value


def _containers(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        for key in ("containers", "initContainers"):
            yield from value.get(key, [])
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _containers(part)


def _set_image(objects: list[dict[str, Any]], image: dict[str, str]) -> None:
    _only(image, "name", "newName", "newTag")
    for container in _containers(objects):
        found = re.fullmatch(rf"{re.escape(image['name'])}(:[\w.-]+)?", container.get("image", ""))
        if found:
            tag = f":{image['newTag']}" if "newTag" in image else found[1] or ""
            container["image"] = image.get("newName", image["name"]) + tag


def _replace(objects: list[dict[str, Any]], replacement: dict[str, Any]) -> None:
    _only(replacement, "source", "targets")
    source = replacement["source"]
    (value,) = _selected(objects, {key: source[key] for key in source if key != "fieldPath"})
    for part in source["fieldPath"].split("."):
        value = value[part]
    for target in replacement["targets"]:
        _only(target, "select", "fieldPaths", "options")
        options = target.get("options", {})
        _only(options, "create")
        for one in _selected(objects, target["select"]):
            for path in target["fieldPaths"]:
                *parents, last = path.split(".")
                holder = one
                for part in parents:
                    holder = holder.setdefault(part, {}) if options.get("create") else holder[part]
                if last not in holder and not options.get("create"):
                    raise ValueError(f"{one['kind']} has no {path}")
                holder[last] = copy.deepcopy(value)


def real_command() -> list[str]:
    """The command of the real program; empty where none is installed."""
    known = (["kustomize", "build"], ["kubectl", "kustomize"])
    return next((command for command in known if shutil.which(command[0])), [])


def real_build(folder: Path) -> list[dict[str, Any]]:
    """What `kustomize build` writes."""
    done = subprocess.run([*real_command(), str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return list(yaml.safe_load_all(done.stdout))
