"""Relative paths of a configuration: beside its file, or below the storage of the `ray` section."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.config.sections import RunSection

SQLITE = "sqlite:///"  # three slashes before a relative path, four before an absolute one
PATHS = (
    ("source", "root"), ("data", "shards"), ("data", "like"), ("network", "start_from"), ("run", "root"),
    ("regroup", "shards"), ("regroup", "evaluation"), ("track", "uri"), ("track", "registry_uri"),
)  # fmt: skip
logger = logging.getLogger(__name__)


def relative(path: str) -> bool:
    """Whether a value is a local path that does not begin at the root or in a home folder."""
    return bool(path.strip()) and "://" not in path and not path.startswith(("/", "~"))


def anchored(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The values of a file, with its relative paths as seen from the working directory.

    Files of earlier versions have paths that are relative to the working directory. If one of the paths exists
    there and not beside the file, all paths of the file stay as they are. So do those of a stored configuration,
    which has `run.folder`.

    Args:
        values: The sections of the file.
        file: The file.
    """
    run, folder = values.get("run"), file.parent
    stored = isinstance(run, dict) and "folder" in run
    if stored or folder.resolve() == Path.cwd():
        return dict(values)
    made = {name: dict(held) if isinstance(held, dict) else held for name, held in values.items()}
    changed = False
    for section, key in PATHS:
        held = made.get(section)
        if not isinstance(held, dict) or key not in held:
            continue
        before, after = held[key], _joined(held[key], folder, section)
        if _exists(before) and not _exists(after):
            logger.info("note: %s.%s=%s is in the current folder, not beside %s", section, key, before, file)
            return dict(values)
        held[key], changed = after, changed or after != before
    if changed and isinstance(made.setdefault("run", {}), dict):
        made["run"]["folder"] = str(folder)
    return made


def placed(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with the addresses of the `ray` section in other sections that have none."""
    ray = values.get("ray")
    if not isinstance(ray, dict):
        return values
    made = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for section, key, address in (
        ("track", "uri", ray.get("tracking_uri")), ("track", "registry_uri", ray.get("registry_uri"))
    ):  # fmt: skip
        held = made.setdefault(section, {})
        if address and isinstance(held, dict) and not held.get(key):
            held[key] = address
    storage = ray.get("storage")
    if isinstance(storage, str) and storage:
        if isinstance(made.setdefault("run", {}), dict):
            made["run"].setdefault("root", RunSection().root)
        for section, key in (
            ("run", "root"),
            ("data", "shards"),
            ("data", "like"),
            ("regroup", "shards"),
            ("regroup", "evaluation"),
        ):
            held = made.get(section)
            if isinstance(held, dict) and isinstance(held.get(key), str) and relative(held[key]):
                held[key] = f"{storage.rstrip('/')}/{held[key]}"
    return made


def _joined(value: Any, folder: Path, section: str) -> Any:
    """A value as seen from the working directory; other values than relative paths stay as they are."""
    if isinstance(value, list):
        return [_joined(one, folder, section) for one in value]
    if not isinstance(value, str):
        return value
    if section == "track":
        path = value.removeprefix(SQLITE)
        return f"{SQLITE}{folder / path}" if value.startswith(SQLITE) and relative(path) else value
    return f"{folder}/{value}" if relative(value) else value


def _exists(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_exists, value))
    path = value.removeprefix(SQLITE) if isinstance(value, str) else ""
    return bool(path) and "://" not in path and Path(path).expanduser().exists()


def as_written(values: dict[str, Any], folder: str) -> dict[str, Any]:
    """The dumped sections of a configuration, with the paths as its file has them.

    Args:
        values: The sections.
        folder: Folder of the file; empty if its paths have not been changed.
    """
    if folder:
        for section, key in PATHS:
            held = values.get(section) or {}
            if key in held:
                held[key] = _without(held[key], f"{folder}/")
    return values


def _without(value: Any, prefix: str) -> Any:
    if isinstance(value, list):
        return [_without(one, prefix) for one in value]
    return value.removeprefix(prefix) if isinstance(value, str) else value
