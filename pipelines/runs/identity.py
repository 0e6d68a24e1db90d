"""What `dmtg signal` said of a configuration before anything else was trained."""

from __future__ import annotations

from pipelines.config.loading import Config
from pipelines.storage import locate

SIGNAL = "signal.json"


def folder_name(config: Config, what: str) -> str:
    """The folder of a comparison or pre-flight: it follows from all that changes what is trained there."""
    return f"{config.name}-{what}-{config.digest()}"


def said_before(config: Config) -> str:
    """The verdict of `dmtg signal` with the same configuration; empty where it was not asked."""
    file = locate(config.run.root) / folder_name(config, "signal") / SIGNAL
    return str(file.read_json()["verdict"]) if file.exists() else ""
