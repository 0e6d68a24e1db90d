"""Reads the configuration that a run folder holds."""

from __future__ import annotations

from typing import Any

import yaml

from pipelines.config.yaml_text import load_yaml
from pipelines.errors import UserError
from pipelines.runs.files import CONFIG
from pipelines.storage import Location


def stored_values(run: Location) -> dict[str, Any]:
    """The sections of the configuration in a run folder.

    Raises:
        FileNotFoundError: Without a configuration.
        UserError: If it is damaged.
    """
    try:
        values = load_yaml((run / CONFIG).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise unreadable(run, "it is damaged") from error
    if not isinstance(values, dict):
        raise unreadable(run, "it is damaged")
    return values


def unreadable(run: Location, problem: str) -> UserError:
    """The error for a run folder whose configuration cannot be read."""
    return UserError(
        f"the configuration in this run folder cannot be read: {problem}",
        where=str(run / CONFIG),
        remedy="another version of dmtg wrote it: use that version, or give another run.name",
    )
