"""Shell completion of configurations and models. It must be fast and must not fail if a server is unreachable."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

from pipelines.recipes import recipes

SERVER_S = "3"  # timeout of requests to the tracking server, in seconds


def complete_config(incomplete: str) -> list[str]:
    """Recipes, YAML files and folders whose names begin with `incomplete`."""
    return [*(name for name in recipes() if name.startswith(incomplete)), *_files(incomplete, (".yaml", ".yml"))]


def _files(incomplete: str, ends: Collection[str]) -> list[str]:
    """Files with one of some endings, or with any if there is none, and folders."""
    folder, _, begun = incomplete.rpartition("/")
    place = Path(f"{folder}/") if folder or incomplete.startswith("/") else Path()
    prefix = f"{folder}/" if "/" in incomplete else ""
    found = [path for path in place.glob(f"{begun}*") if not path.name.startswith(".") or begun.startswith(".")]
    files = [f"{prefix}{path.name}" for path in found if path.is_file() and (not ends or path.suffix in ends)]
    folders = [f"{prefix}{path.name}/" for path in found if path.is_dir()]
    return [*sorted(files), *sorted(folders)]


def complete_input(incomplete: str) -> list[str]:
    """Files and folders whose names begin with `incomplete`."""
    return _files(incomplete, ())


def complete_model(incomplete: str) -> list[str]:
    """Addresses of registered models: the newest version of each model, and every alias."""
    return [address for address in _addresses() if address.startswith(incomplete)]


def complete_name(incomplete: str) -> list[str]:
    """Names of registered composites."""
    names = {address.removeprefix("models:/").partition("/")[0].partition("@")[0] for address in _addresses()}
    return sorted(name for name in names if name.startswith(incomplete) and "." not in name)


def complete_address(incomplete: str) -> list[str]:
    """Addresses as of `complete_model`, without `models:/`, which is optional for the commands of the registry."""
    return [
        short for address in _addresses() if (short := address.removeprefix("models:/")).startswith(incomplete)
    ]


def _addresses() -> list[str]:
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": SERVER_S, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    logging.disable()
    try:
        from pipelines.config.loading import load_track
        from pipelines.registry.versions import list_models

        found = list_models(load_track())
    except Exception:  # noqa: BLE001 - a completion that fails offers nothing
        return []
    aliases = [f"models:/{model['name']}@{alias}" for model in found for alias in model["aliases"]]
    return [*(model["uri"] for model in found), *aliases]
