"""What the shell offers after a Tab: nothing here may be slow, or stop because something is away."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pipelines.recipes import recipes

SERVER_S = "3"  # how long a person who has pressed Tab waits for the tracking server


def complete_config(incomplete: str) -> list[str]:
    """Recipes, and the YAML files and folders that begin like this."""
    folder, _, begun = incomplete.rpartition("/")
    place = Path(f"{folder}/") if folder or incomplete.startswith("/") else Path()
    prefix = f"{folder}/" if "/" in incomplete else ""
    found = [path for path in place.glob(f"{begun}*") if not path.name.startswith(".") or begun.startswith(".")]
    files = [f"{prefix}{path.name}" for path in found if path.suffix in (".yaml", ".yml") and path.is_file()]
    folders = [f"{prefix}{path.name}/" for path in found if path.is_dir()]
    return [*(name for name in recipes() if name.startswith(incomplete)), *sorted(files), *sorted(folders)]


def complete_model(incomplete: str) -> list[str]:
    """Registered models: the newest version of each, and those that have an alias."""
    return [address for address in _addresses() if address.startswith(incomplete)]


def complete_name(incomplete: str) -> list[str]:
    """Names of registered composites."""
    names = {address.removeprefix("models:/").partition("/")[0].partition("@")[0] for address in _addresses()}
    return sorted(name for name in names if name.startswith(incomplete) and "." not in name)


def complete_address(incomplete: str) -> list[str]:
    """`complete_model` without `models:/`, which the commands of the registry can do without."""
    return [
        short for address in _addresses() if (short := address.removeprefix("models:/")).startswith(incomplete)
    ]


def _addresses() -> list[str]:
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": SERVER_S, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    logging.disable()
    try:
        from pipelines.config.loading import load_track
        from pipelines.registry.tracking import tracking_uri
        from pipelines.registry.versions import list_models

        section = load_track()
        file = tracking_uri(section).removeprefix("sqlite:///")
        if "://" not in file and not Path(file).exists():
            return []  # MLflow would make it
        found = list_models(section)
    except Exception:  # noqa: BLE001 - a Tab that finds nothing says nothing
        return []
    aliases = [f"models:/{model['name']}@{alias}" for model in found for alias in model["aliases"]]
    return [*(model["uri"] for model in found), *aliases]
